"""Properties: landmarks move with sequences, shrink with crops, grow with prompts and are counted as bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompile import moving
from kvcompile.extents import ExtentStore
from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.marks import dense_below, layout_of
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.passes import compile_policy
from kvcompile.sequences import Piece
from tests.kernels.cpp_reading import Counted
from tests.kernels.layer_run import Run, drawn, forwards
from tests.kernels.test_cpp_reads import EVICTED, FACTS, POLICIES

needs_compiler = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
STEP = [Piece(1, step=True)]


def step(run: Run, seed: int) -> Tensor:
    forward = STEP * run.store.batch
    return run.forward(forward, drawn(run.plan, forward, seed))


def both(plan: PolicyPlan, lengths: tuple[int, ...], steps: int = 2) -> list[Run]:
    """The plan on C++ and on the reference, after the same prompts and steps."""
    runs = [Run(plan, backend, len(lengths)) for backend in (Cpp(), ops.backend("reference"))]
    for run in runs:
        run.begin(lengths)
        for i, forward in enumerate(forwards(lengths, 20, steps)):
            run.forward(forward, drawn(plan, forward, i))
    return runs


def go_on(runs: list[Run], steps: int, seed: int) -> None:
    for i in range(steps):
        ours, truth = (step(run, seed + i) for run in runs)
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)


def shuffled(run: Run) -> None:
    moving.select(run.store, [1, 0, 1])
    run.sequences.select([1, 0, 1])


def joined(run: Run) -> None:
    """Both sequences apart, then together again in a store that another plan's caches know nothing of."""
    parts = []
    for b in range(2):
        part = ExtentStore(run.plan, 2, run.store.dtype, run.store.device)
        moving.join(part, [run.store])
        moving.select(part, [b])
        parts.append(part)
    store = ExtentStore(run.plan, 2, run.store.dtype, run.store.device)
    store.length = torch.zeros_like(store.length)
    moving.join(store, parts[::-1])
    store.clock, store.counts, store.fires = (getattr(run.store, n)[...] for n in ("clock", "counts", "fires"))
    run.store = store
    run.sequences.select([1, 0])


def cropped(run: Run) -> None:
    for b, seq in enumerate(run.sequences.each):
        seen = seq.seen - 5
        moving.cut(run.store, b, seen)
        run.sequences.crop(b, seen, None)


@needs_compiler
@pytest.mark.parametrize(
    ("text", "change"),
    [(text, change) for text in (POLICIES["quest"], EVICTED) for change in (shuffled, joined, cropped)][:5],
    ids=["all kept, shuffled", "all kept, joined", "all kept, cropped", "evicted, shuffled", "evicted, joined"],
)  # rows that have dropped entries cannot be cropped to before that
def test_reads_go_on_after_sequences_have_moved(text: str, change: Callable[[Run], None]) -> None:
    plan = compile_policy(text, FACTS).plan
    runs = both(plan, (39, 26), steps=8)
    for run in runs:
        change(run)
    go_on(runs, 9, 100)


@needs_compiler
def test_a_second_prompt_goes_on_with_the_landmarks_of_the_first() -> None:
    runs = both(compile_policy(POLICIES["moba"], FACTS).plan, (30, 17))
    for run in runs:
        run.begin((21, 33))
        for i, forward in enumerate(forwards((21, 33), 40, 3)):
            run.forward(forward, drawn(run.plan, forward, 50 + i))
    go_on(runs, 3, 200)


PROMPTS = """policy prompts():
    unit page(4) with lo = min[i] k, hi = max[i] k
{keep}    attend own page | top(2) pages by sum[d] max(q * lo, q * hi) per query_head
    at chunk
    attend {then}
    at step
"""
DROPPED = "    keep sink(2) | recent(20) | bottom(6) by norm(k) per head\n    at chunk, step\n"


@needs_compiler
@pytest.mark.parametrize("keep", ("", DROPPED), ids=("all kept", "evicted"))
@pytest.mark.parametrize("then", ("all", "sink(2) | recent(9)"))
def test_steps_that_choose_nothing_leave_landmarks_to_the_next_prompt(keep: str, then: str) -> None:
    runs = both(compile_policy(PROMPTS.format(keep=keep, then=then), FACTS).plan, (30, 17), steps=0)
    mine, known = runs[0], runs[0].store.marked.clone()
    mine.backend._reads = counted = Counted()  # type: ignore[attr-defined]
    go_on(runs, 9, 100)
    assert (counted.ran, counted.left) == ((0, 0) if then == "all" else (9, 0))  # all: plain decode
    assert bool((mine.store.marked <= known).all()) and layout_of(mine.plan).count
    for run in runs:
        run.begin((21, 33))
    for i, forward in enumerate(forwards((21, 33), 40, 2)):
        ours, truth = (run.forward(forward, drawn(run.plan, forward, 50 + i)) for run in runs)
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)
    assert counted.left == 0 and bool((mine.store.marked > known).any())


def test_landmarks_are_counted_in_bytes_and_grow_by_doubling() -> None:
    plan = compile_policy(POLICIES["quest"], replace(FACTS, layers=3, dtype="bfloat16")).plan
    store, layout = ExtentStore(plan, 2, torch.bfloat16, torch.device("cpu")), layout_of(plan)
    before = store.bytes_allocated()
    sizes = set()
    for tokens in range(1, 300, 7):
        store.cover(tokens)
        sizes.add(store.marks.shape[2])
        full = layout.kinds[0].unit.full(tokens)
        assert store.marks.shape[2] * layout.kinds[0].each >= full
        held = store.marks.nbytes + store.edges.nbytes
        assert store.bytes_allocated() - before == held == 2 * layout.nbytes(tokens) - store.marked.nbytes
    assert all(size & (size - 1) == 0 and size > 1 for size in sizes)
    # Two landmarks of 32 channels, two bytes each, for every four tokens of six heads and two sequences.
    assert store.marks.nbytes == 2 * 6 * max(sizes) * 2 * 32 * 2


def test_layers_and_heads_that_read_all_keep_no_landmarks() -> None:
    text = POLICIES["quest"].replace("    attend", "    layers 2..last: attend")
    plan = compile_policy(text, replace(FACTS, layers=4)).plan
    assert layout_of(plan).readers == ((-1, -1), (-1, -1), (0, 1), (2, 3))
    assert layout_of(compile_policy(POLICIES["static"], FACTS).plan).count == 0


def test_choosing_pays_only_from_some_length_on() -> None:
    facts = ModelFacts(1, 32, 8, 128, "bfloat16")
    text = POLICIES["quest"].replace("page=4, budget=12", "page=16, budget=1024")
    plan = compile_policy(text, facts).plan
    least = dense_below(plan, plan.reads[0], 1024 + 16)
    entry, marks = facts.entry_bytes, 2 * 128 * 2 / 16
    assert (least + 1) * entry > (least + 1) * marks + 4 * 1040 * entry >= (least - 1) * entry - marks
    alone = compile_policy(text.replace("query_head", "head").replace("by s", "by mean[g] s"), facts).plan
    assert dense_below(alone, alone.reads[0], 1040) * 4 <= least + 4
