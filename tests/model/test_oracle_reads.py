"""The oracle of reads against what is known without it: dense masks, bounds that hold, counts, held sets."""

from collections.abc import Callable

import pytest
import torch

from tests import oracle_policies as rules
from tests import oracle_reads as reads
from tests.driving import one_by_one, same
from tests.models import random_model, tokens
from tests.oracle import Oracle
from tests.oracle_policies import KeepAll
from tests.reading import CASES, TURNS, dense

PROMPT = tokens(34, seed=1)
STEPS = tokens(8, seed=2)
ALL = PROMPT + STEPS


def pattern(readable: Callable[[int, int], bool]) -> torch.Tensor:
    """bool [n, n] from (query, key), causal."""
    n = len(ALL)
    return torch.tensor([[k <= q and readable(q, k) for k in range(n)] for q in range(n)])


MASKS = {
    "window": (reads.Window(sink=2, window=6), lambda q, k: k < 2 or q - k < 6),
    "power": (
        reads.PowerAttention(size=4, sink=1, window=5),
        lambda q, k: k < 1 or q - k < 5 or (q // 4 - k // 4) in (1, 2, 4, 8),
    ),
    "fixed": (reads.Fixed(size=5), lambda q, k: q // 5 == k // 5 or k % 5 == 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_static_pattern_is_a_dense_mask(name):
    reading, readable = MASKS[name]
    mine = torch.cat(Oracle(random_model(), KeepAll(), reads.everywhere(reading)).run(PROMPT, STEPS))
    same(mine, dense(random_model(), ALL, pattern(readable)), name)


def test_random_tokens_are_as_many_as_asked_for_and_differ_between_heads():
    run = Oracle(random_model(), KeepAll(), reads.everywhere(reads.BigBird(block=0, n=5)))
    run.feed(PROMPT)
    seen = run.reader.seen
    for layer in range(run.layers):
        for head in range(run.heads):
            for place, sets in enumerate(seen[layer][head]):
                assert len(sets[0] - {place}) in (min(5, place + 1), min(5, place + 1) - 1)
    assert len({tuple(sorted(seen[i][h][-1][0])) for i in range(run.layers) for h in range(run.heads)}) == 6


EVERYTHING = {
    "quest": reads.Quest(page=4, budget=1000),
    "moba": reads.MoBA(size=4, n=1000),
    "infllm_v2": reads.InfLLMV2(n=1000, sink=3, window=5, kernel=4, stride=2, block=8),
    "seer": reads.Seer(size=4, tau=-1.0),
    "seer_r": reads.SeerR(size=4, budget=1000),
    "sample": reads.SampleAttention(mass=2, rows=1),
    "vertical": reads.Vertical(n=1000),
    "tidal": reads.Tidal(n=1000, pickers=(1,)),
    "power": reads.PowerAttention(window=1000),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_budget_as_large_as_the_context_is_dense_attention(name):
    mine = torch.cat(Oracle(random_model(), KeepAll(), reads.in_layers(1, EVERYTHING[name])).run(PROMPT, STEPS))
    same(mine, dense(random_model(), ALL, pattern(lambda q, k: True)), name)


@pytest.mark.parametrize("name", CASES)
def test_queries_read_themselves_and_nothing_later(name):
    run = CASES[name].oracle()
    run.run(PROMPT, STEPS[:3])
    for layer, heads in run.reader.seen.items():
        assert layer not in run.off
        for per_query in heads:
            for j, sets in enumerate(per_query):
                place = run.length - len(per_query) + j
                assert all(place in s and max(s) == place for s in sets)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("infllm_v2", "llmdrop")])
def test_every_sample_leaves_something_unread(name):
    """The library's blocks of infllm_v2 begin to compete after 2112 tokens: a slow test of its own has as many."""
    run, left = CASES[name].oracle(), []
    for turn in (tokens(CASES[name].prompt, seed=1), *([token] for token in STEPS)):
        run.feed(turn)
        last = [sets for heads in run.reader.seen.values() for queries in heads for sets in queries[-1]]
        left += [run.length - len(s) for s in last]
    assert any(left)


@pytest.mark.parametrize("name", ["quest", "moba", "infllm_v2, small", "seerattention_r", "tidal, five layers"])
def test_the_budget_is_what_a_step_reads(name):
    """Beside what is read anyway, exactly the number of units or tokens that the case's numbers name."""
    run = CASES[name].oracle()
    run.run(PROMPT, STEPS)
    place = run.length - 1
    size, most = {"quest": (4, 3), "moba": (4, 2), "infllm_v2, small": (8, 2), "seerattention_r": (4, 3)}.get(
        name, (1, 5)
    )
    layers = {"quest": [2], "tidal, five layers": [2, 4]}.get(name, range(run.layers))
    for layer in layers:
        for sets in (head[-1] for head in run.reader.seen[layer]):
            for s in sets:
                near = {place} if size == 1 else set(range(place // size * size, place + 1))
                if name.startswith("infllm"):
                    near |= {0, 1, 2} | set(range(place - 4, place + 1))
                far = s - near
                assert len({p // size for p in far}) in (most, most - (size == 1))


def test_the_bound_of_a_page_is_passed_by_none_of_its_keys():
    run = Oracle(random_model(), KeepAll(), reads.everywhere(reads.Quest(page=4, budget=4, triggers=("chunk",))))
    run.feed(PROMPT)
    row = run.rows[1][0]
    query, best = row.queries[0, 33], {}
    for u in range(8):
        keys = row.keys[4 * u : 4 * u + 4]
        best[u] = torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum().item()
        assert best[u] >= (keys @ query).max().item()
    won = max(best, key=best.get)
    assert run.reader.seen[1][0][33][0] == {32, 33} | set(range(4 * won, 4 * won + 4))


def test_a_step_without_a_firing_goes_on_with_what_the_newest_query_read():
    reading = reads.MoBA(size=4, n=3, triggers=("chunk",))
    run = Oracle(random_model(), KeepAll(), reads.everywhere(reading))
    run.feed(PROMPT)
    before = [[head[-1] for head in run.reader.seen[layer]] for layer in range(run.layers)]
    for step in STEPS:
        run.feed([step])
    later = set(range(len(PROMPT), run.length))
    for layer, heads in enumerate(before):
        for head, sets in enumerate(heads):
            assert run.reader.seen[layer][head][-1] == [s | later for s in sets]


def test_a_prefill_that_does_not_fire_reads_all_and_forgets_the_held_set():
    run = Oracle(random_model(), KeepAll(), reads.everywhere(reads.Quest(triggers=("step",))))
    for turn in [PROMPT, *one_by_one(STEPS)]:
        run.feed(turn)
    assert len(run.reader.seen[0][0][-1][0]) < run.length
    run.feed(tokens(5, seed=9))
    assert run.reader.seen[0][0][-1][0] == set(range(run.length))
    assert not run.reader.held


def test_attention_is_summed_after_narrowing_and_asked_again_before_it():
    run = Oracle(random_model(), rules.H2O(heavy=1, local=1), reads.everywhere(reads.Window(sink=1, window=3)))
    run.feed(PROMPT)
    row = run.rows[1][0]
    assert torch.count_nonzero(row.reads[0, 30]) == 4
    assert torch.count_nonzero(run.last_reads(row, 1)[0, 0]) == len(PROMPT)
    torch.testing.assert_close(row.acc[10], row.reads[:, 10:13, 10].sum(1).mean())


def test_the_cut_of_a_prompt_matters_to_no_query_that_chooses_alone():
    for name in ("moba", "infllm_v2, small", "seerattention", "bigbird, few"):
        case = CASES[name]
        whole = Oracle(case.model(), KeepAll(), case.reader())
        cut = Oracle(case.model(), KeepAll(chunk=7), case.reader())
        for turn in TURNS:
            same(cut.feed(turn), whole.feed(turn), name)
