"""P1 and P3 inside sliding windows: what has left a window counts for nothing, however soon it really goes.

Policies are drawn from seeds and carried out by tests/oracle_families.py; shares, states and `full` by their own tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import kvcompile
from tests.driving import BACKENDS, NEAR_TIE, drive, one_by_one, same
from tests.families import family_model, prompt
from tests.model.test_windows_counted import WINDOW, ran, sliding_model
from tests.oracle import Oracle, Piece, Row
from tests.oracle_families import FamilyOracle
from tests.oracle_policies import KeepAll, keep_set

MODELS = {"mistral_sliding": (True, True), "gemma2": (True, False), "gpt_oss": (True, False)}  # which layers slide
SCORES = {
    "norm(k)": lambda oracle, row: row.keys.norm(dim=-1),
    "pos": lambda oracle, row: torch.arange(len(row.keys)).float(),
    "acc": lambda oracle, row: row.acc,
    "mean[g] sum[q in last(3)] attn": lambda oracle, row: oracle.last_reads(row, 3).sum(1).mean(0),
    "mean[g] max[q in last(2)] attn": lambda oracle, row: oracle.last_reads(row, 2).amax(1).mean(0),
}
REGIONS: dict[str, Callable[[int, Piece, int], bool]] = {
    "sink": lambda p, piece, n: p < n,
    "recent": lambda p, piece, n: p > piece.now - n,
    "stride": lambda p, piece, n: p % n == 0,
    "prompt": lambda p, piece, n: p < piece.prompt,
    "generated": lambda p, piece, n: p >= piece.prompt,
}
TEXT = """
policy drawn():
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep {keep}
    at {at}
"""


@dataclass(slots=True)
class Drawn(KeepAll):
    """A union of regions (name, n) and selections (score, n), decided at one trigger."""

    regions: list[tuple[str, int]] = field(default_factory=list)
    selections: list[tuple[str, int]] = field(default_factory=list)
    across: bool = False
    trigger: str = "prefill.end"
    every: int = 1

    @property
    def text(self) -> str:
        plain = [name if name in ("prompt", "generated") else f"{name}({n})" for name, n in self.regions]
        scope = "across heads" if self.across else "per head"
        scored = [f"top({n}) by {score} {scope}" for score, n in self.selections]
        at = {"chunk": f"chunk({self.chunk})", "every": f"every({self.every})"}.get(self.trigger, self.trigger)
        return TEXT.format(keep=" | ".join(dict.fromkeys(plain + scored)), at=at)

    def on_read(self, row: Row, reads: torch.Tensor) -> None:
        row.acc += reads.mean(0)

    def fires(self, piece: Piece) -> bool:
        if self.trigger == "every":
            return piece.kind == "step" and piece.step % self.every == 0
        return piece.fires(self.trigger)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not self.fires(piece):
            return
        rows = [oracle.rows[layer][head] for head in heads]
        kept = [{p for p in r.positions() if any(REGIONS[x](p, piece, n) for x, n in self.regions)} for r in rows]
        for score, n in self.selections:
            values = [SCORES[score](oracle, row) for row in rows]
            open_ = [
                [(v[p].item(), p, i) for p in row.positions() if p not in kept[i]]
                for i, (row, v) in enumerate(zip(rows, values, strict=True))
            ]
            groups = (
                [([x for each in open_ for x in each], n * len(heads))]
                if self.across
                else [(each, n) for each in open_]
            )
            for place, i in [won for each, most in groups for won in oracle.best(each, most)]:
                kept[i].add(place)
        for row, places in zip(rows, kept, strict=True):
            keep_set(row, places)


def drawn(draw: random.Random) -> Drawn:
    trigger = draw.choice(["prefill.end", "prefill.end", "chunk", "step", "every"])
    scores = list(SCORES)[:3] if trigger == "chunk" else list(SCORES)  # `last` under `chunk` is an error
    return Drawn(
        chunk=draw.randint(1, 20) if trigger == "chunk" else None,
        regions=[(draw.choice(list(REGIONS)), draw.randint(1, 30)) for _ in range(draw.randint(0, 2))],
        selections=[(draw.choice(scores), draw.randint(1, 9)) for _ in range(draw.randint(1, 2))],
        across=draw.random() < 0.4,
        trigger=trigger,
        every=draw.randint(1, 6),
    )


def check(seed: int, backend: str) -> None:
    draw = random.Random(seed)
    name, window = draw.choice(list(MODELS)), draw.choice([1, 2, 5, 9, 12, 40, 60])
    rule = drawn(draw)
    first = max(1, draw.choice([window - 1, window, window + 1, draw.randint(1, 40)]))
    steps = one_by_one(prompt(draw.randint(0, 10), seed=seed + 1))
    turns = [prompt(first, seed=seed), *steps, prompt(draw.randint(2, 15), seed=seed + 2), [5]]
    truth = FamilyOracle(family_model(name, sliding_window=window), rule, [window * slides for slides in MODELS[name]])
    expected = [(truth.feed(turn), truth.kept()) for turn in turns]
    if truth.closest <= NEAR_TIE:
        return
    model = kvcompile.optimize(family_model(name, sliding_window=window), rule.text, backend=backend, compile="off")
    length = 0
    for turn, found, (logits, kept) in zip(turns, drive(model, *turns), expected, strict=True):
        length += len(turn)
        where = f"seed {seed}, {name}, window {window}, after {length} tokens:{rule.text}"
        assert truth.readable(found.kept[0], length) == truth.readable(kept, length), where
        same(found.logits[0], logits, where)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p1_drawn_policies_in_windows_equal_dense_attention_under_their_mask(backend):
    for seed in range(16):
        check(seed, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", range(100, 400, 50))
def test_p1_of_many_more_drawn_policies(first, backend):
    for seed in range(first, first + 50):
        check(seed, backend)


CUT = """
heads whole = table("mask.tsv")
heads local = rest

policy cut(c=64):
    state acc = 0
    on attend: acc += {add}
    whole: keep all
    at chunk(c)
    local: keep recent(2) | bottom(4) by {score} across heads
    at prefill.end
"""
JUDGED = {
    "earlier queries": ("mean[g] sum[q] attn", "mean[g] sum[q in last(6)] attn"),
    "softmax over entries": ("sum[q] softmax[i](logit + gumbel(3))", "acc"),
}


@pytest.mark.parametrize("judged", JUDGED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_p3_in_windows_the_cut_of_a_prompt_does_not_matter(backend, judged, tmp_path):
    (tmp_path / "mask.tsv").write_text("1\t0\n0\t0\n")
    add, score = JUDGED[judged]
    options = {"backend": backend, "compile": "off", "tables": {"whole": str(tmp_path / "mask.tsv")}}
    for seed in range(8):
        seen = []
        for c in (3, 64):
            model = family_model("gemma2", sliding_window=9)
            kvcompile.optimize(model, CUT.format(add=add, score=score), c=c, **options)
            seen.append(drive(model, prompt(30, seed=seed))[0].kept)
        assert seen[0] == seen[1]


def test_a_share_is_divided_by_what_is_in_the_windows():
    """The same where an earlier rule has dropped what left them, and where all of the prompt is in memory yet."""
    tail = "    keep top(b) by norm(k) per head\n    at prefill.end\n"
    head = "policy divided():\n    share b = 5 by cover(mean[g] sum[q in last(3)] attn)\n"
    for seed in range(12):
        seen = []
        for between in ("", "    keep sink(1000)\n    at chunk(5)\n"):
            model = family_model("mistral_sliding", sliding_window=15)
            kvcompile.optimize(model, head + between + tail, backend="reference", compile="off")
            seen.append(drive(model, prompt(40, seed=seed))[0].kept)
        assert seen[0] == seen[1]


@pytest.mark.parametrize(("n", "fires"), [(WINDOW, True), (WINDOW + 1, False)])
def test_full_counts_nothing_that_waits_outside_the_window(n, fires):
    model = sliding_model("mistral")
    kvcompile.optimize(model, f"policy some():\n    keep recent(4)\n    at full({n})\n", backend="reference")
    cache = ran(model, 30, 40)
    assert (max(len(head) for head in cache.positions(0)) < WINDOW - 1) == fires
