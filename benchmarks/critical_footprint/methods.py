"""The methods, each at every part to keep and every piece size: what a sweep is made of.

Naive: the prompt is fed in pieces, and after each one the method judges that piece by its own last queries. Patched:
it asks the prompt's last queries instead (PruLong's `peek`). Post-fill is either with the whole prompt in one piece.
All judge a piece once and keep the same part of it: what has won stays, as in PruLong's evaluation.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from heads import SINK, WINDOW

from kvcompile.evaluation.budgets import Case

KEEPS = tuple(range(10, 100, 10))  # per cent that is kept: sparsity 90 to 10 %
EIGHTH, COARSE, FEW = (
    KEEPS,
    KEEPS[::2],
    KEEPS[::4],
)  # in pieces of an eighth of the prompt, in larger ones, in one piece
OBSERVE, POOL = 4, 3  # newest queries that are asked, and the width of pooling
LAG = 16

SNAPKV = """
policy snapkv_{how}(ratio=30%, observe={observe}, pool={pool}{c}):
    score s = maxpool(mean[g] sum[q in {asked}] attn, pool)
    keep frozen | {window}top({count}) by s {scope}
    at {when}
"""
TOVA = """
policy tova_{how}(ratio=30%{c}):
    score s = mean[h] sum[q in {asked}] attn
    keep frozen | top(ratio of chunk) by s shared heads
    at {when}
"""
H2O = """
policy h2o_pieces(heavy=15%, local=5, c=32):
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep frozen | where age < local | top(heavy of chunk) by acc per head
    at chunk(c)
"""
LAGKV = f"""
policy lagkv_pieces(ratio=30%, n_sink={SINK}, lag={LAG}, c=32) extends lagkv:
    at chunk(c), filled(lot, 2)
"""
RANDOM = """
policy random_pieces(ratio=30%, seed=0, c=32):
    score s = sum[q in peek(1)] gumbel(seed)
    keep frozen | top(ratio of chunk) by s per head
    at chunk(c)
"""
STREAMING = f"""
policy streaming_pieces(n_sink={SINK}, window=60, c=32):
    keep sink(n_sink) | recent(window)
    at chunk(c), step
"""
HEADS = f"""
heads retrieval = table("heads.tsv", top=50%)
heads local = rest

policy heads_pieces(n_sink={SINK}, window={WINDOW}, c=32):
    retrieval: keep all
    local: keep sink(n_sink) | recent(window)
    at chunk(c), step
"""
RAZOR = f"""
heads far = table("far.tsv", top=50%)

policy razor_pieces(n_sink={SINK}, window={WINDOW}, c=32):
    far: keep all
    rest: keep sink(n_sink) | recent(window) else fold mean weight count
    at chunk(c), step
"""


def cases(length: int, chunk: int, layers: int, tables: dict[str, Path]) -> list[Case]:
    """All methods at one piece size. tables: scores of `duo`, `induction` and `echo`, 0/1 tables `prulong-30` and
    its like."""
    out = []
    for keep in EIGHTH if chunk <= length // 8 else COARSE if chunk < length else FEW:
        part = Fraction(keep, 100)
        budget = keep / 100
        out.append(Case("streaming", STREAMING, budget=budget, chunk=chunk))
        table = {"retrieval": tables[f"prulong-{keep}"]}
        out.append(Case("prulong", HEADS, {}, table, budget, chunk))
        out.append(Case("duo", HEADS, {}, {"retrieval": tables["duo"]}, budget, chunk))
        out.append(Case("razor, induction", RAZOR, {}, {"far": tables["induction"]}, budget, chunk))
        out.append(Case("razor, echo", RAZOR, {}, {"far": tables["echo"]}, budget, chunk))
        for patched in (False, True) if chunk < length else (False,):
            how = ", patched" if patched else ", naive" if chunk < length else ""
            # A policy that reads `last` queries has no pieces of its own: there the caller cuts.
            own = {"budget": budget, "chunk": chunk, "cut": not patched}
            out.append(Case(f"snapkv{how}", _snapkv(patched, "per head"), **own))
            out.append(Case(f"adakv{how}", _snapkv(patched, "across heads floor 20%"), **own))
            out.append(Case(f"pyramidkv{how}", _pyramid(patched, part, layers), chunk=chunk, cut=not patched))
            out.append(Case(f"tova{how}", _tova(patched), **own))
        local = int(part * chunk / 2)
        out.append(Case("h2o", H2O, {"heavy": f"{keep / 2:g}%", "local": local}, chunk=chunk))
        out.append(Case("lagkv", LAGKV, budget=budget, chunk=chunk))
        out.append(Case("random", RANDOM, budget=budget, chunk=chunk))
    return out


def _snapkv(patched: bool, scope: str) -> str:
    return SNAPKV.format(
        scope=scope, count="ratio of chunk" if patched else "ratio of chunk - observe", **_how(patched)
    )


def _tova(patched: bool) -> str:
    return TOVA.format(**{**_how(patched), "asked": "peek(1)" if patched else "last(1)"})


def _pyramid(patched: bool, part: Fraction, layers: int) -> str:
    """SnapKV with PyramidKV's parts by layer, which a piece is too short to tell in tokens: the mean is `part`."""
    text = _snapkv(patched, "per head").rstrip().splitlines()
    (keep,) = (line for line in text if line.lstrip().startswith("keep"))
    lines = [line for line in text if line is not keep]
    for layer, own in enumerate(pyramid(part, layers)):
        written = keep.strip().replace("ratio of chunk", f"{float(own * 100):.6g}% of chunk")
        lines.insert(-1, f"    layers {layer}: {written}")
    return "\n".join(lines) + "\n"


def pyramid(part: Fraction, layers: int, beta: int = 20) -> list[Fraction]:
    """The part of a piece that each layer keeps, falling from the first layer to the last."""
    least = part / beta
    most = 2 * part - least
    if most > 1:
        most, least = Fraction(1), 2 * part - 1
    return [most - (most - least) * layer / (layers - 1) for layer in range(layers)]


def _how(patched: bool) -> dict[str, object]:
    return {
        "how": "patched" if patched else "naive",
        "observe": OBSERVE,
        "pool": POOL,
        "asked": "peek(observe)" if patched else "last(observe)",
        "window": "" if patched else "where age < observe | ",
        "c": ", c=32" if patched else "",
        "when": "chunk(c)" if patched else "prefill.end",
    }
