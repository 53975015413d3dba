"""P1 of reads by units that begin late or overlap, of heads that compete, of picks, and of long decodes.

Sets are written from the language's sentences, as plain loops in the frame of tests/oracle_reads.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import pytest

from tests import oracle_policies as rules
from tests import oracle_reads as reads
from tests.driving import BACKENDS, drive, same
from tests.following import policy
from tests.models import tokens
from tests.oracle import Oracle
from tests.oracle_states import covered
from tests.reading import NEAR_READ, Case, agrees, some

ALWAYS = "at chunk, step"


@dataclass(slots=True)
class Late(reads.Reading):
    """Pages of `size` that begin behind the first `start` tokens, which belong to none and are read."""

    size: int = 5
    start: int = 3
    n: int = 2

    def read(self, asked: reads.Asked) -> reads.Sets:
        pages: dict[int, list[int]] = {}
        for p in asked.columns():
            u = (p - self.start) // self.size
            if u >= 0 and self.start + (u + 1) * self.size - 1 < asked.place:
                pages.setdefault(u, []).append(p)
        sets = []
        for query in asked.queries:
            gates = {u: (query @ asked.row.keys[m].mean(0)).item() for u, m in pages.items()}
            lost = set(pages) - asked.best(gates, self.n)
            sets.append(asked.among(lambda p, lost=lost: all(p not in pages[u] for u in lost)))
        return sets


@dataclass(slots=True)
class Across(reads.Reading):
    """recent(3), then n tokens per head on average, which the heads of a layer compete for by the group's mean
    attention, each with a floor; or so many pages by their mean key."""

    n: int = 5
    safe: int = 0
    pages: int = 0

    def read(self, asked: reads.Asked) -> reads.Sets:
        first, rest = set(), []
        for head in range(asked.oracle.heads):
            scored = self._scored(reads.Asked(asked.oracle, asked.layer, head, asked.place), head)
            own = set(asked.oracle.best(scored, self.safe)) if self.safe else set()
            first |= own
            rest += [s for s in scored if (s[1], s[2]) not in own]
        won = first | set(asked.oracle.best(rest, self.n * asked.oracle.heads - len(first)))
        mine = {u for u, head in won if head == asked.head}
        near = asked.among(lambda p: p > asked.place - 3)
        found = asked.with_units(self.pages, near, mine) if self.pages else near | mine
        return [found] * asked.oracle.group

    def _scored(self, asked: reads.Asked, head: int) -> list[tuple[float, int, int]]:
        near = asked.among(lambda p: p > asked.place - 3)
        if self.pages:
            query = asked.queries.mean(0)
            rivals = asked.rivals(self.pages, near)
            return [((query @ asked.row.keys[m].mean(0)).item(), u, head) for u, m in rivals.items()]
        attention = asked.attention().mean(0)
        return [(attention[p].item(), p, head) for p in asked.columns() if p not in near]


@dataclass(slots=True)
class PickedOnce(reads.Reading):
    """Layer 0 reads all and picks, for all queries of a piece, what its last four queries attend to most; the layers
    behind it read that."""

    n: int = 7
    alone: bool = False  # each query head by its own attention, else a KV head by the mean of its group
    triggers: tuple[str, ...] = ("chunk",)
    chosen: dict[int, reads.Sets] = field(default_factory=dict)

    def prepare(self, oracle: Oracle, layer: int) -> None:
        if layer > 0:
            return
        for head, row in enumerate(oracle.rows[0]):
            totals = oracle.last_reads(row, 4).sum(1)
            self.chosen[head] = []
            for total in totals if self.alone else [totals.mean(0)] * oracle.group:
                scored = [(total[p].item(), p, 0) for p in row.positions()]
                self.chosen[head].append({p for p, _ in oracle.best(scored, self.n)})

    def read(self, asked: reads.Asked) -> reads.Sets:
        if asked.layer == 0:
            return [set(asked.columns())] * asked.oracle.group
        return [asked.among(lambda p, c=c: p in c) for c in self.chosen[asked.head]]


@dataclass(slots=True)
class CoverTidal(reads.Tidal):
    """Tidal whose picks are the fewest tokens that hold 60 % of the attention."""

    def read(self, asked: reads.Asked) -> reads.Sets:
        if asked.layer in self.pickers:
            attention = asked.attention()
            for g in range(asked.oracle.group):
                scored = [(attention[g, p].item(), p, 0) for p in asked.columns()]
                self.chosen[asked.head, g] = {p for p, _ in covered(asked.oracle, scored, Fraction(3, 5))}
            return [set(asked.columns())] * asked.oracle.group
        return reads.Tidal.read(self, asked)


def kernels(size: int, stride: int, block: int) -> Case:
    text = policy(
        f"unit kernel({size}, stride={stride}) with c = mean[i] k",
        f"unit block({block})",
        "score s = sum[g] softmax[u] dot(q, c)",
        "attend sink(1) | recent(2) | top(2) blocks by s per head",
        ALWAYS,
    )
    reading = reads.InfLLMV2(n=2, sink=1, window=2, kernel=size, stride=stride, block=block)
    return Case(text, lambda: reads.everywhere(reading))


def picks(score: str, n: str, trigger: str) -> str:
    return policy("layers 0:", f"    pick t = {n} by {score}", "    attend all", "attend t", f"at {trigger}")


MEAN = "with c = mean[i] k"
HELD = "score s = sum[q in last(4)] attn"
UNITS: dict[str, Case] = {
    "pages that begin late": Case(
        policy(f"unit page(5) from 3 {MEAN}", "attend top(2) pages by dot(q, c) per query_head", ALWAYS),
        lambda: reads.everywhere(Late()),
    ),
    "kernels as long as two blocks": kernels(8, 4, 4),
    "kernels that do not fit into blocks": kernels(5, 3, 7),
    "kernels side by side": kernels(4, 4, 8),
    "heads that compete for tokens": Case(
        policy("attend recent(3) | top(5) by attn across heads", ALWAYS), lambda: reads.everywhere(Across())
    ),
    "heads that compete beyond a floor": Case(
        policy("attend recent(3) | top(5) by attn across heads floor 60%", ALWAYS),
        lambda: reads.everywhere(Across(safe=3)),
    ),
    "heads that compete for pages": Case(
        policy(f"unit page(4) {MEAN}", "attend recent(3) | top(2) pages by dot(q, c) across heads", ALWAYS),
        lambda: reads.everywhere(Across(n=2, pages=4)),
    ),
    "a choice of a prompt that later layers read": Case(
        policy(HELD, "layers 0:", "    pick t = top(7) by s per head", "    attend all", "attend t", "at chunk"),
        lambda: reads.everywhere(PickedOnce()),
    ),
    "a choice of each query head that later layers read": Case(
        policy(HELD, "layers 0:", "    pick t = top(7) by s per query_head", "    attend all", "attend t", "at chunk"),
        lambda: reads.everywhere(PickedOnce(alone=True)),
    ),
    "picks that cover": Case(
        picks("attn per query_head", "cover(60%)", "step"), lambda: reads.everywhere(CoverTidal(pickers=(0,)))
    ),
    "picks of what streaming keeps": Case(
        policy("keep sink(2) | recent(15)", ALWAYS, "layers 0:", "    pick t = top(4) by logit per query_head",
               "    attend all", "attend t", "at step"),
        lambda: reads.everywhere(reads.Tidal(n=4, pickers=(0,))),
        rule=lambda: rules.Streaming(sink=2, window=15),
    ),
    "pieces that attend itself asks for": Case(
        policy(f"unit page(4) {MEAN}", "attend top(2) pages by dot(q, c) per query_head", "at chunk(7), step"),
        lambda: reads.everywhere(reads.MoBA(size=4, n=3)),
        rule=lambda: rules.KeepAll(chunk=7),
    ),
    "every piece by its own last queries": Case(
        policy(HELD, "attend sink(2) | recent(4) | top(6) by s per head", "at chunk(9)"),
        lambda: reads.everywhere(reads.Vertical(observe=4)),
        rule=lambda: rules.KeepAll(chunk=9),
    ),
    "every piece by a sample of its queries": Case(
        policy("score s = sum[q in sample(30%)] attn", "attend recent(5) | cover(50%) by s per head", "at chunk(8)"),
        lambda: reads.everywhere(Sampled(mass=Fraction(1, 2), rows=Fraction(3, 10))),
        rule=lambda: rules.KeepAll(chunk=8),
    ),
}  # fmt: skip


@dataclass(slots=True)
class Sampled(reads.SampleAttention):
    """One choice a piece, beside recent(5)."""

    def near(self, oracle: Oracle, query: int) -> Callable[[int], bool]:
        return lambda p: p > query - 5


QUICK = [
    "pages that begin late", "kernels that do not fit into blocks", "heads that compete beyond a floor",
    "a choice of each query head that later layers read", "every piece by its own last queries",
]  # fmt: skip


@pytest.mark.parametrize(("name", "backend"), some(UNITS, QUICK, ["reference"]))
def test_p1_of_units_and_choices_that_queries_read(name, backend):
    agrees(UNITS[name], backend)


GROUPS = {
    "no group": {"num_attention_heads": 2},
    "groups of eight": {"num_attention_heads": 16},
    "one KV head": {"num_key_value_heads": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", GROUPS)
def test_p1_of_reads_for_other_numbers_of_query_heads(heads, backend):
    for reading, attend in (
        (reads.MoBA(size=4, n=3), f"unit page(4) {MEAN}\n    attend top(2) pages by dot(q, c) per query_head"),
        (reads.Quest(page=4, budget=8, triggers=("chunk", "step")),
         "unit page(4) with lo = min[i] k, hi = max[i] k\n"
         "    attend top(2) pages by sum[d] max(q * lo, q * hi) per query_head"),
        (reads.PowerAttention(size=4, sink=1, window=3), "unit b(4)\n    attend sink(1) | recent(3) | pow2 b"),
    ):  # fmt: skip
        case = Case(policy(attend, ALWAYS), lambda r=reading: reads.everywhere(r), changes=GROUPS[heads])
        agrees(case, backend)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_landmarks_grow_through_a_long_decode_from_a_short_prompt(backend):
    """100 steps after three tokens: pages fill one by one, and room for their bounds is taken again and again."""
    text = policy(
        "unit page(4) with lo = min[i] k, hi = max[i] k",
        "attend newest page | top(3) pages by sum[d] max(q * lo, q * hi) per query_head",
        "at step",
    )
    case = Case(text, lambda: reads.everywhere(reads.Quest(page=4, budget=12)), changes={"num_hidden_layers": 2})
    best, found = 0.0, None
    for seed in range(6):
        truth, turns = case.oracle(), [tokens(3, seed=seed), *([t] for t in tokens(100, seed=40 + seed))]
        logits = [truth.feed(turn) for turn in turns]
        if truth.closest > best:
            best, found = truth.closest, (turns, logits)
        if best > NEAR_READ:
            break
    assert found is not None and best > NEAR_READ / 10 and math.isfinite(best)
    turns, logits = found
    for i, seen in enumerate(drive(case.optimized(backend), *turns)):
        same(seen.logits[0], logits[i], f"call {i}")
