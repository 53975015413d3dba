"""P1 of what an `attend` set may be made of: regions, choices by tokens and by units, scopes, counts, triggers."""

from fractions import Fraction

import pytest
import torch

import kvcompile
from tests import oracle_read_sets as sets
from tests import oracle_reads as reads
from tests.driving import drive, one_by_one, same
from tests.following import policy
from tests.models import random_model, tokens
from tests.oracle_states import hashed
from tests.reading import Case, agrees, dense, some

PAGE = "unit page(4) with c = mean[i] k, lo = min[i] k, hi = max[i] k"
DOT = "score s = dot(q, c)"
SOFT = "score s = softmax[u] dot(q, c)"


def case(clauses, near=lambda p, asked: False, *choices, triggers=(), when=None, **changes):
    """One union for all rows."""
    return Case(
        policy(*clauses),
        lambda: reads.everywhere(sets.Union(near=near, choices=choices, triggers=triggers, when=when)),
        changes=changes,
    )


def recent(n):
    return lambda p, asked: p > asked.place - n


def random(n, seed):
    def near(p, asked):
        order = sorted(range(asked.place + 1), key=lambda x: (hashed(seed, asked.layer, asked.head, x), x))
        return p in order[:n]

    return near


def after(length):
    """`if len > n`, by the row's entries with the new ones."""
    return lambda oracle, layer, head: oracle.piece.kind == "step" and sets.length(oracle, layer, head) > length


def every(n, length=0):
    def when(oracle, layer, head):
        step = oracle.piece.step
        return step > 0 and step % n == 0 and sets.length(oracle, layer, head) > length

    return when


BOTH = ("chunk", "step")
ALWAYS = "at chunk, step"

SETS: dict[str, Case] = {
    "prompt": case(["attend prompt | recent(3)"], lambda p, a: p < a.oracle.piece.prompt or p > a.place - 3),
    "generated": case(["attend generated | sink(2)"], lambda p, a: p >= a.oracle.piece.prompt or p < 2),
    "stride": case(["attend stride(5) | recent(2)"], lambda p, a: p % 5 == 0 or p > a.place - 2),
    "random": case(["attend random(6, 9)"], random(6, 9)),
    "nothing but itself": case(["attend sink(0)"]),
    "own unit from an offset": case(
        ["unit page(5) from 2", "attend own page | sink(1)"], lambda p, a: p < 1 or (p - 2) // 5 == (a.place - 2) // 5
    ),
    "powers of two of a unit": case(
        ["unit page(3) from 1", "attend pow2 page"], lambda p, a: (a.place - 1) // 3 - (p - 1) // 3 in (1, 2, 4, 8, 16)
    ),
    "newest unit": case(
        [PAGE, "attend newest page | sink(3)"], lambda p, a: p < 3 or p // 4 == a.place // 4
    ),
    "tokens per query head": case(
        ["attend recent(3) | top(5) by logit per query_head", ALWAYS], recent(3),
        sets.of_tokens(sets.logit, sets.first(5)),
        triggers=BOTH,
    ),
    "tokens per head": case(
        ["attend recent(3) | top(5) by attn per head", ALWAYS], recent(3),
        sets.of_tokens(sets.mean_of_group(sets.attn), sets.first(5)), triggers=BOTH,
    ),
    "tokens shared": case(
        ["attend sink(1) | top(5) by attn shared heads", ALWAYS], lambda p, a: p < 1,
        sets.of_tokens(sets.mean_of_heads(sets.mean_of_group(sets.attn)), sets.first(5)), triggers=BOTH,
    ),
    "the shortest keys": case(
        ["attend recent(2) | bottom(6) by norm(k) per head", ALWAYS], recent(2),
        sets.of_tokens(sets.length_of_key, sets.first(6, -1)), triggers=BOTH,
    ),
    "a fraction of the candidates": case(
        ["attend recent(2) | top(30%) by attn per query_head", ALWAYS], recent(2),
        sets.of_tokens(sets.attn, sets.part(Fraction(3, 10))), triggers=BOTH,
    ),
    "a fraction of the prompt": case(
        ["attend top(20% of prompt) by attn per query_head", ALWAYS], lambda p, a: False,
        sets.of_tokens(sets.attn, sets.first(lambda a: a.oracle.piece.prompt // 5)), triggers=BOTH,
    ),
    "a cover of tokens": case(
        ["attend recent(1) | cover(80%) by attn per query_head", ALWAYS], recent(1),
        sets.of_tokens(sets.attn, sets.cover(Fraction(4, 5))), triggers=BOTH,
    ),
    "where tokens pass a threshold": case(
        ["attend where mean[g] attn > 0.05", ALWAYS], lambda p, a: False,
        sets.of_tokens(sets.mean_of_group(sets.attn), sets.over(0.05)), triggers=BOTH,
    ),
    "two choices": case(
        ["attend recent(2) | top(3) by attn per head | bottom(4) by norm(k) per head", ALWAYS], recent(2),
        sets.of_tokens(sets.mean_of_group(sets.attn), sets.first(3)),
        sets.of_tokens(sets.length_of_key, sets.first(4, -1)),
        triggers=BOTH,
    ),
    "pages and a region that takes some": case(
        [PAGE, DOT, "attend sink(6) | recent(5) | top(2) pages by s per query_head", ALWAYS],
        lambda p, a: p < 6 or p > a.place - 5, sets.of_pages(4, sets.by_mean_key(4), sets.first(2)), triggers=BOTH,
    ),
    "pages per head": case(
        [PAGE, DOT, "attend top(3) pages by s per head", ALWAYS], lambda p, a: False,
        sets.of_pages(4, sets.mean_of_group(sets.by_mean_key(4)), sets.first(3)), triggers=BOTH,
    ),
    "pages shared": case(
        [PAGE, DOT, "attend top(3) pages by s shared heads", ALWAYS], lambda p, a: False,
        sets.of_pages(4, sets.mean_of_heads(sets.mean_of_group(sets.by_mean_key(4))), sets.first(3)), triggers=BOTH,
    ),
    "the worst pages": case(
        [PAGE, DOT, "attend bottom(2) pages by s per query_head", ALWAYS], lambda p, a: False,
        sets.of_pages(4, sets.by_mean_key(4), sets.first(2, -1)), triggers=BOTH,
    ),
    "a fraction of the pages": case(
        [PAGE, DOT, "attend sink(5) | top(40%) pages by s per query_head", ALWAYS], lambda p, a: p < 5,
        sets.of_pages(4, sets.by_mean_key(4), sets.part(Fraction(2, 5))), triggers=BOTH,
    ),
    "a cover of pages": case(
        [PAGE, SOFT, "attend cover(70%) pages by s per query_head", ALWAYS], lambda p, a: False,
        sets.of_pages(4, sets.by_softmax(4), sets.cover(Fraction(7, 10))), triggers=BOTH,
    ),
    "pages that pass a threshold": case(
        [PAGE, SOFT, "attend recent(2) | where s > 0.1", ALWAYS], recent(2),
        sets.of_pages(4, sets.mean_of_group(sets.by_softmax(4)), sets.over(0.1)), triggers=BOTH,
    ),
    "pages by the mean of their entries": case(
        [PAGE, "attend top(3) pages by attn per query_head", ALWAYS], lambda p, a: False,
        sets.of_pages(4, sets.by_entries(4, sets.attn), sets.first(3)), triggers=BOTH,
    ),
    "inside of each page": case(
        [PAGE, "attend recent(2) | top(1) by attn per head per page", ALWAYS], recent(2),
        sets.in_pages(4, sets.mean_of_group(sets.attn), sets.first(1)), triggers=BOTH,
    ),
    "at the end of a prompt, held through steps": case(
        [PAGE, DOT, "attend top(3) pages by s per query_head", "at prefill.end"], lambda p, a: False,
        sets.of_pages(4, sets.by_mean_key(4), sets.first(3)), triggers=("prefill.end",),
    ),
    "at every third step": case(
        [PAGE, DOT, "attend top(3) pages by s per query_head", "at every(3)"], lambda p, a: False,
        sets.of_pages(4, sets.by_mean_key(4), sets.first(3)), when=every(3),
    ),
    "at steps beyond a length": case(
        [PAGE, DOT, "attend top(3) pages by s per query_head", "at step if len > 41"], lambda p, a: False,
        sets.of_pages(4, sets.by_mean_key(4), sets.first(3)), when=after(41),
    ),
    "at every second step beyond a length": case(
        [PAGE, DOT, "attend top(3) pages by s per query_head", "at every(2) if len > 40"], lambda p, a: False,
        sets.of_pages(4, sets.by_mean_key(4), sets.first(3)), when=every(2, 40),
    ),
    "when it is long": case(
        ["attend sink(1) | recent(4)", "at when len > 42"], lambda p, a: p < 1 or p > a.place - 4,
        when=lambda oracle, layer, head: sets.length(oracle, layer, head) > 42,
    ),
    "counts that grow": case(
        ["attend sink(2) | recent(len / 3)", "at step"], lambda p, a: p < 2 or p > a.place - (a.place + 1) // 3,
        triggers=("step",),
    ),
}  # fmt: skip

SETS["pieces and steps by sets of their own"] = Case(
    policy(PAGE, DOT, "attend sink(2) | recent(9)", "at chunk", "attend top(2) pages by s per query_head", "at step"),
    lambda: reads.everywhere(
        reads.Window(sink=2, window=9, triggers=("chunk",)),
        sets.Union(choices=(sets.of_pages(4, sets.by_mean_key(4), sets.first(2)),), triggers=("step",)),
    ),
)
SETS["a set at the end of a prompt, another now and then"] = Case(
    policy(
        PAGE,
        DOT,
        "attend sink(2) | recent(9)",
        "at prefill.end",
        "attend top(2) pages by s per query_head",
        "at every(4)",
    ),
    lambda: reads.everywhere(
        reads.Window(sink=2, window=9, triggers=("prefill.end",)),
        sets.Union(choices=(sets.of_pages(4, sets.by_mean_key(4), sets.first(2)),), when=every(4)),
    ),
)
SETS["dense below a length"] = Case(
    policy(PAGE, DOT, "attend top(2) pages by s per query_head", "at chunk if now >= 40, step if now >= 40"),
    lambda: reads.everywhere(
        sets.Union(
            choices=(sets.of_pages(4, sets.by_mean_key(4), sets.first(2)),),
            when=lambda oracle, layer, head: oracle.piece.now >= 40,
        )
    ),
)
SETS["pages by one choice of a forward"] = Case(
    policy(PAGE, "attend top(2) pages by sum[q in last(3)] attn per head", "at chunk"),
    lambda: reads.everywhere(sets.PagesTogether()),
)
SETS["layers by sets of their own"] = Case(
    policy(
        PAGE,
        DOT,
        "layers 1: attend top(2) pages by s per query_head",
        "layers last: attend sink(2) | recent(5)",
        ALWAYS,
    ),
    lambda: reads.Reader(
        lambda layer, head: (
            (),
            (sets.Union(choices=(sets.of_pages(4, sets.by_mean_key(4), sets.first(2)),)),),
            (reads.Window(sink=2, window=5),),
        )[layer]
    ),
)


QUICK = [
    "generated", "own unit from an offset", "powers of two of a unit", "tokens shared", "two choices",
    "a cover of pages",
    "pages that pass a threshold", "inside of each page", "at every second step beyond a length", "when it is long",
    "pieces and steps by sets of their own", "layers by sets of their own", "pages by one choice of a forward",
]  # fmt: skip


@pytest.mark.parametrize(("name", "backend"), some(SETS, QUICK, ["reference"]))
def test_p1_of_sets_that_queries_read(name, backend):
    agrees(SETS[name], backend)


@pytest.mark.parametrize(("piece", "least"), [(4, 6), (4, 9), (12, 6), (4, 13)])
def test_p1_of_a_condition_that_holds_for_some_pieces_of_a_prompt(piece, least):
    """It is asked at the newest token of each; steps go on with the set of the last piece, or read all without one."""
    ids, prompt = tokens(14, seed=3), 10
    model = random_model("llama64")
    text = policy("attend recent(2)", f"at chunk({piece}) if now >= {least}")
    kvcompile.optimize(model, text, backend="cpu", compile="off")
    found = torch.cat([told.logits[0] for told in drive(model, ids[:prompt], *one_by_one(ids[prompt:]))])
    at = torch.arange(len(ids))
    mask = at[:, None] >= at
    for start in range(0, prompt, piece):
        stop = min(prompt, start + piece)
        if fires := stop - 1 >= least:
            mask[start:stop] &= at[start:stop, None] - at < 2
    if fires:
        mask[prompt:, : prompt - 2] = False
    same(found, dense(random_model("llama64"), ids, mask), "logits")
