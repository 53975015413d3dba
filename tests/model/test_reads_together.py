"""`keep` and `attend` in one policy: what is evicted, what is read, and which attention either of them sees."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from tests import oracle_policies as rules
from tests import oracle_read_sets as sets
from tests import oracle_reads as reads
from tests.driving import call, drive, one_by_one, padded, same
from tests.following import END, H2O, STEPS, policy
from tests.models import tokens
from tests.oracle import Oracle, Piece
from tests.oracle_states import Judge, at, top
from tests.oracle_systems import PrefixKV
from tests.reading import Case, agrees, some

PAGE = "unit page(4) with lo = min[i] k, hi = max[i] k, c = mean[i] k"
BOUND = "score bound = sum[d] max(q * lo, q * hi)"
QUEST = ("attend newest page | top(2) pages by bound per query_head", "at step")
MOBA = ("attend own page | top(2) pages by dot(q, c) per query_head", "at chunk, step")
MASK = ((1, 0), (0, 1), (0, 0))


def quest(layer, head):
    return (reads.Quest(page=4, budget=8),)


def moba(layer, head):
    return (reads.MoBA(size=4, n=3),)


CLASSES = """
heads retrieval = table("mask.tsv")
heads local = rest

policy p():
    {unit}
    {score}
    {retrieval}
    local: keep sink(2) | recent(9)
    at {at}
"""


def classes(attend: str, when: str) -> str:
    """prulong's classes, whose retrieval heads read by pages."""
    retrieval = f"retrieval: keep all\n    at chunk(8), step\n    retrieval: {attend}\n    at {when}"
    return CLASSES.format(unit=PAGE, score=BOUND, retrieval=retrieval, at="chunk(8), step")


def on_retrieval(of):
    return lambda: reads.Reader(lambda layer, head: of(layer, head) if MASK[layer][head] else ())


@dataclass(slots=True)
class NewestLogits(rules.KeepAll):
    """recent(3) and the 9 entries of most attention from this forward's queries, summed."""

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if piece.fires("prefill.end", "step"):
            for head in heads:
                row = oracle.rows[layer][head]
                near, candidates = rules.split(row, lambda p: p > piece.now - 3)
                total = row.reads.sum(1).mean(0)
                rules.keep_set(row, set(near) | top(oracle, total[candidates].tolist(), candidates, 9))


TOGETHER: dict[str, Case] = {
    "a window read of what snapkv keeps": Case(
        policy("score s = maxpool(mean[g] sum[q in last(4)] attn, 3)", "keep recent(4) | top(12) by s per head", END,
               "attend sink(3) | recent(6)", "at chunk, step"),
        lambda: reads.everywhere(reads.Window(sink=3, window=6)),
        rule=lambda: rules.SnapKV(budget=16, observe=4, pool=3),
    ),
    "pages of what streaming keeps": Case(
        policy(PAGE, BOUND, "keep sink(3) | recent(14)", "at chunk, step", *QUEST),
        lambda: reads.Reader(quest),
        rule=lambda: rules.Streaming(sink=3, window=14),
    ),
    "pages of what snapkv keeps": Case(
        policy(PAGE, BOUND, "score s = maxpool(mean[g] sum[q in last(4)] attn, 3)",
               "keep recent(4) | top(16) by s per head", END, *QUEST),
        lambda: reads.Reader(quest),
        rule=lambda: rules.SnapKV(budget=20, observe=4, pool=3),
    ),
    "pages of what h2o keeps, by the attention that was read": Case(
        policy(PAGE, BOUND, *H2O, "keep recent(10% of prompt) | top(50% of prompt) by acc per head", STEPS, *QUEST),
        lambda: reads.Reader(quest),
        rule=lambda: rules.H2O(heavy=Fraction(1, 2), local=Fraction(1, 10)),
    ),
    "blocks in the prompt, too, under h2o": Case(
        policy(PAGE, *H2O, "keep recent(10% of prompt) | top(50% of prompt) by acc per head", STEPS, *MOBA),
        lambda: reads.Reader(moba),
        rule=lambda: rules.H2O(heavy=Fraction(1, 2), local=Fraction(1, 10)),
    ),
    "blocks under a keep that asks queries again": Case(
        policy(PAGE, "score s = mean[g] sum[q in last(3)] attn", "keep recent(3) | top(15) by s per head", STEPS,
               *MOBA),
        lambda: reads.Reader(moba),
        rule=lambda: Judge(
            fires=at("prefill.end", "step"),
            keeps=lambda oracle, layer, head, piece: _asked_again(oracle, layer, head, piece),
        ),
    ),
    "a window under a keep by this forward's attention": Case(
        policy("score s = mean[g] sum[q] attn", "keep recent(3) | top(9) by s per head", STEPS,
               "attend sink(2) | recent(7)", "at chunk, step"),
        lambda: reads.everywhere(reads.Window(sink=2, window=7)),
        rule=NewestLogits,
    ),
    "a window under prefixkv": Case(
        policy("score s = mean[h] sum[q] attn", "share b = 20% of prompt by cover(s)",
               "keep sink(4) | recent(1) | top(b - 5) by s shared heads", END,
               "attend sink(2) | recent(15)", "at chunk, step"),
        lambda: reads.everywhere(reads.Window(sink=2, window=15)),
        rule=lambda: PrefixKV(budget=Fraction(1, 5)),
    ),
    "peeked queries choose as others and are asked for all": Case(
        policy(PAGE, "score s = mean[g] sum[q in peek(4)] attn", "keep frozen | top(50% of chunk) by s per head",
               "at chunk(8)", *MOBA),
        lambda: reads.Reader(moba),
        rule=lambda: rules.SnapKVChunked(chunk=8, observe=4, pool=1, ratio=Fraction(1, 2)),
    ),
    "random tokens of what streaming keeps": Case(
        policy("keep sink(3) | recent(14)", "at chunk, step",
               "attend sink(1) | recent(4) | random(20, 5)", "at chunk, step"),
        lambda: reads.everywhere(reads.BigBird(block=1, window=4, n=20, seed=5)),
        rule=lambda: rules.Streaming(sink=3, window=14),
    ),
    "what won is read": Case(
        policy("score s = mean[g] sum[q in last(4)] attn", "keep recent(8) | top(12) by s per head", END,
               "attend frozen | recent(2)", "at step"),
        lambda: reads.everywhere(
            sets.Union(near=lambda p, a: bool(a.row.frozen[p]) or p > a.place - 2, triggers=("step",))
        ),
        rule=lambda: Frozen(budget=20, observe=8),
    ),
    "a held set of what goes": Case(
        policy(PAGE, BOUND, "keep sink(3) | recent(12)", "at chunk, step",
               "attend newest page | top(2) pages by bound per query_head", "at every(3)"),
        lambda: reads.everywhere(
            sets.Union(
                choices=(sets.of_pages(4, bounds, sets.first(2)),),
                when=lambda oracle, layer, head: oracle.piece.step > 0 and oracle.piece.step % 3 == 0,
            )
        ),
        rule=lambda: rules.Streaming(sink=3, window=12),
    ),
}  # fmt: skip


def bounds(asked, g):
    found = {}
    for u, members in asked.units(4).items():
        keys = asked.row.keys[members]
        found[u] = sum(max(q * a, q * b) for q, a, b in reads.channels(asked.queries[g], keys.amin(0), keys.amax(0)))
    return found


@dataclass(slots=True)
class Frozen(rules.SnapKV):
    """snapkv of window 4 that keeps the last `observe`, and marks what won."""

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if piece.fires("prefill.end"):
            for head in heads:
                row = oracle.rows[layer][head]
                near, candidates = rules.split(row, lambda p: p > piece.now - self.observe)
                total = oracle.last_reads(row, 4).sum(1).mean(0)
                won = top(oracle, total[candidates].tolist(), candidates, self.budget - self.observe)
                rules.keep_set(row, set(near) | won)
                row.frozen[sorted(won)] = True


def _asked_again(oracle, layer, head, piece):
    row = oracle.rows[layer][head]
    near, candidates = rules.split(row, lambda p: p > piece.now - 3)
    total = oracle.last_reads(row, 3).sum(1).mean(0)
    return set(near) | top(oracle, total[candidates].tolist(), candidates, 15)


QUICK = [
    "pages of what snapkv keeps", "pages of what h2o keeps, by the attention that was read",
    "peeked queries choose as others and are asked for all",
    "blocks under a keep that asks queries again", "what won is read", "a held set of what goes",
]  # fmt: skip


@pytest.mark.parametrize(("name", "backend"), some(TOGETHER, QUICK, ["reference"]))
def test_p1_of_keep_and_attend_together(name, backend):
    agrees(TOGETHER[name], backend)


RETRIEVAL = {
    "quest": (classes("attend newest page | top(2) pages by bound per query_head", "step"), on_retrieval(quest)),
    "moba": (classes("attend own page | top(2) pages by dot(q, c) per query_head", "chunk, step"), on_retrieval(moba)),
}


@pytest.mark.parametrize(("name", "backend"), some(RETRIEVAL, RETRIEVAL))
def test_p1_of_head_classes_whose_retrieval_heads_choose_pages(name, backend, tmp_path):
    (tmp_path / "mask.tsv").write_text("\n".join("\t".join(map(str, row)) for row in MASK) + "\n")
    text, reader = RETRIEVAL[name]
    options = {"tables": {"retrieval": str(tmp_path / "mask.tsv")}}
    agrees(Case(text, reader, options, rule=lambda: rules.prulong(MASK, 2, 9, 8)), backend)


@pytest.mark.parametrize(("name", "backend"), some(TOGETHER, ["pages of what streaming keeps"]))
def test_a_padded_batch_keeps_and_reads_what_each_does_alone(name, backend):
    model = TOGETHER[name].optimized(backend)
    prompts, steps = [tokens(n, seed=n) for n in (33, 9, 20)], [tokens(4, seed=b) for b in range(3)]
    alone = [drive(model, prompt, *one_by_one(mine)) for prompt, mine in zip(prompts, steps, strict=True)]
    ids, mask = padded(prompts, "left")
    found, cache = call(model, ids, mask=mask)
    for step in range(5):
        for b in range(3):
            logits = found.logits[b, mask[b].bool()] if step == 0 else found.logits[b]
            assert found.kept[b] == alone[b][step].kept[0], f"row {b}, call {step}"
            same(logits, alone[b][step].logits[0], f"row {b}, call {step}")
        if step < 4:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            found, cache = call(model, torch.tensor([[mine[step]] for mine in steps]), cache, mask)
