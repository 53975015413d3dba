"""One attention layer on a CPU whose heads read only some of what is there, against the same layer reading all.

    python benchmarks/reads_cpu.py [--only decode prefill off] [--lengths N ...] [--prompt N] [--rounds N]

Decode: quest (pages of 16, 1024 tokens), 1024 single entries, a choice for later layers and a static pattern at several
lengths, against our dense decode and packed SDPA. Prefill: MoBA, PowerAttention and block sets at several live shares,
against our dense causal prefill and SDPA. Off: a whole model with layers that are off, beside one that has no attention
there. All contestants of a table take turns, as in attention_cpu.py. Writes benchmarks/results/reads_cpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from _common import machine, versions
from _turns import Claim, Contestant, Section, Sweep, judge, race

RESULTS = Path(__file__).parent / "results"
Q_HEADS, KV_HEADS, WIDTH = 32, 8, 128
GROUP = Q_HEADS // KV_HEADS
DTYPES = ("float32", "bfloat16")
DENSE = "kvcompile, dense"
PAGE, BUDGET = 16, 1024
QUEST = f"""policy quest():
    unit page({PAGE}) with lo = min[i] k, hi = max[i] k
    score s = sum[d] max(q * lo, q * hi)
    attend newest page | top({BUDGET // PAGE}) pages by s per query_head
    at step
"""
ENTRIES = f"policy entries():\n    attend top({BUDGET}) by logit per query_head\n    at step\n"
PICKS = f"""policy picks():
    layers 0:
        pick t = top({BUDGET}) by logit per query_head
        attend all
    rest: attend t
    at step
"""
WINDOW = f"policy window():\n    attend sink(64) | recent({BUDGET - 64})\n"


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes in tokens; `sweep` in MiB. `rounds` and `calls` of decode; prefills take `slow_rounds` of one call."""

    lengths: tuple[int, ...] = (4096, 8192, 32768)
    prompt: int = 8192
    rounds: int = 7
    calls: int = 5
    slow_rounds: int = 3
    threads: int = 2
    sweep: int = 64


def entries(n: int, dtype: Any) -> tuple[Any, Any, Any]:
    """q [1, Q_HEADS, 1, WIDTH], k and v [KV_HEADS, n, WIDTH]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = ((1, Q_HEADS, 1, WIDTH), (KV_HEADS, n, WIDTH), (KV_HEADS, n, WIDTH))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def decode(setting: Setting) -> Iterator[Section]:
    """One query a head; what is read is predicted from bytes: landmarks once a KV head, pages once a query head."""
    import torch
    import torch.nn.functional as F
    from _rows import Rows

    for name in DTYPES:
        for n in setting.lengths:
            q, k, v = entries(n, getattr(torch, name))
            packed = q.view(KV_HEADS, 1, GROUP, WIDTH), k[:, None], v[:, None]
            whole = 2 * k.numel() * k.element_size()
            entry = 2 * WIDTH * k.element_size()
            chosen = KV_HEADS * (n // PAGE) * entry + Q_HEADS * (BUDGET + PAGE) * entry
            parts = {
                "kvcompile, quest": (QUEST, chosen if n > BUDGET + PAGE else whole),  # else there is nothing to choose
                "kvcompile, sink and window": (WINDOW, KV_HEADS * min(n, BUDGET) * entry),
                "kvcompile, single entries": (ENTRIES, min(whole // 2 + Q_HEADS * BUDGET * entry, 2 * whole)),
                "kvcompile, all, and picks": (PICKS, whole + whole // 2),
                DENSE: ("keep_all", whole),
            }
            ours = []
            for title, (policy, moved) in parts.items():
                rows = Rows(policy, list(k), list(v), GROUP)
                like = "packed SDPA" if title == DENSE else None
                ours.append(
                    Contestant(title, lambda rows=rows, q=q: rows.step(q), rows.shorten, moved, like, flat)  # type: ignore[misc]
                )
            sdpa = Contestant(
                "packed SDPA", lambda p=packed: F.scaled_dot_product_attention(*p), bytes=whole, view=flat  # type: ignore[misc]
            )  # fmt: skip
            claims = (Claim("kvcompile, quest", DENSE, 0.25),) if n == max(setting.lengths) else ()
            facts = {"dtype": name, "entries": n}
            predicted = {title: moved / whole for title, (_, moved) in parts.items()}
            yield Section(
                "decode", f"Decode, {name}, {n} entries a row", facts, DENSE, [*ours, sdpa], claims, predicted
            )


def flat(out: Any) -> Any:
    return out.reshape(-1).clone()


def blocks(size: int, percent: int) -> str:
    """Each query head of each query reads its own block and so many percent of the blocks before it."""
    return f"""policy blocks():
    unit block({size}) with c = mean[i] k
    attend own block | top({percent}%) blocks by dot(q, c) per query_head
    at chunk, step
"""


def live_blocks(n: int, size: int, percent: int) -> float:
    """The part of the causal (query, block) pairs that such a policy reads."""
    read = sum(p // size * percent // 100 + 1 for p in range(n))
    return read / sum(p // size + 1 for p in range(n))


def live_power(n: int, size: int, sink: int, recent: int) -> float:
    """The part of the causal (query, entry) pairs in sink, window and blocks at distances that are powers of two."""
    read = 0
    for p in range(n):
        near, own, distance = {*range(min(sink, p + 1)), *range(max(0, p - recent + 1), p + 1)}, p // size, 1
        while distance <= own:
            near.update(range((own - distance) * size, (own - distance + 1) * size))
            distance *= 2
        read += len(near)
    return read / (n * (n + 1) / 2)


MOBA = """policy moba():
    unit block(512) with c = mean[i] k
    attend own block | top(2) blocks by dot(q, c) per query_head
    at chunk, step
"""
POWER = """policy power():
    unit block(256)
    attend sink(256) | recent(512) | pow2 block
"""


def prefill(setting: Setting) -> Iterator[Section]:
    """A causal prompt in one piece; time is predicted by the part of blocks, or of pairs, that is live."""
    import torch
    from _prefill_cases import dense_causal
    from _reads_cases import Piece

    n = setting.prompt
    moba = sum(min(p // 512, 2) + 1 for p in range(n)) / sum(p // 512 + 1 for p in range(n))
    cases = {"kvcompile, MoBA": (MOBA, moba), "kvcompile, PowerAttention": (POWER, live_power(n, 256, 256, 512))}
    for percent in (10, 25, 50):
        cases[f"kvcompile, {percent} % of blocks of 256"] = (blocks(256, percent), live_blocks(n, 256, percent))
    cases["kvcompile, 25 % of blocks of 64"] = (blocks(64, 25), live_blocks(n, 64, 25))
    for name in DTYPES:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, Q_HEADS, n, WIDTH), (1, KV_HEADS, n, WIDTH), (1, KV_HEADS, n, WIDTH))
        q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, name)) for shape in shapes)
        sdpa = Contestant("SDPA, dense causal", dense_causal(q, k, v), view=lambda out: out.reshape(Q_HEADS, n, WIDTH))
        dense = Piece("keep_all", q, k, v)
        parts = [
            sdpa,
            Contestant(DENSE, dense.read, like=sdpa.name, view=lambda out: out[0].transpose(0, 1)),
            *(Contestant(title, Piece(text, q, k, v).read) for title, (text, _) in cases.items()),
        ]
        claims = tuple(Claim(title, DENSE, 1.3 * share) for title, (_, share) in cases.items())
        predicted = {DENSE: 1.0} | {title: share for title, (_, share) in cases.items()}
        title = f"Prefill, {name}, {n} tokens"
        yield Section(
            "prefill", title, {"dtype": name, "tokens": n}, DENSE, parts, claims, predicted, slow=True
        )  # fmt: skip


def off(setting: Setting) -> Iterator[Section]:
    """Layers without attention beside a model that has none there."""
    from _off_cases import whole_models

    yield from whole_models(setting.prompt)


KINDS = {"decode": decode, "prefill": prefill, "off": off}


def measure(setting: Setting, kinds: list[str]) -> dict[str, Any]:
    """All sections, one after the other: rows, claims, machine and versions."""
    import torch
    from _rows import kernels

    torch.set_num_threads(setting.threads)
    sections, sweep = [], Sweep(setting.sweep)
    for kind in kinds:
        for section in KINDS[kind](setting):
            rounds, calls = (setting.slow_rounds, 1) if section.slow else (setting.rounds, setting.calls)
            rows = race(section.contestants, rounds, calls, sweep)
            claims = [judge(claim, rows) for claim in section.claims]
            found = {"kind": section.kind, "title": section.title, "base": section.base, **section.facts}
            sections.append({**found, "predicted": section.predicted, "rows": rows, "claims": claims})
            for name, row in rows.items():
                said = f"{row['ms']:10.3f} ms" if "ms" in row else row["error"]
                print(f"{section.title}: {name:36s} {said}", file=sys.stderr)
    used = versions("torch", "kvcompile")
    said = {"setting": asdict(setting), "machine": machine(), "versions": used, "kernels": kernels("cpu")}
    return {**said, "sections": sections}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), default=list(KINDS), help="kinds of comparison")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(Setting().lengths), help="entries of a row")
    for field in fields(Setting):
        if field.name != "lengths":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    args = parser.parse_args(argv)
    if not args.lengths or min(args.lengths) < 32 or args.prompt < 32 or min(args.rounds, args.calls) < 1:
        parser.error("lengths and prompt are at least 32, rounds and calls at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    given = {field.name: getattr(args, field.name) for field in fields(Setting)}
    found = measure(Setting(**{**given, "lengths": tuple(args.lengths)}), args.only)
    from _reads_cases import page

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "reads_cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found)
    (args.out / "reads_cpu.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
