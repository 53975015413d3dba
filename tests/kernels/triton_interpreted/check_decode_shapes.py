"""Decode attention over drawn shapes and variants on the interpreter, against plain torch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels.choose import decode_spec
from kvcompile.kernels.plan import Region, Selection
from kvcompile.kernels.triton_backend.attend import variant
from kvcompile.kernels.triton_backend.decode import DecodeStep
from tests.driving import examples
from tests.kernels.triton_interpreted.plans import ACC, H2O, Pools, attn, module, plan, reduce, shuffled, varied

KEEP = (Region("recent", 0), Selection("top", ACC, 1))
SIZES = (16, 24, 40, 64, 80, 96, 112, 128, 200, 256)
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


@dataclass(frozen=True)
class Case:
    """lengths: entries of each row. cap, sinks: 0 or False where the kernel has no such variant.

    reach: the window of layer 1, which reads; layers 0 and 2 have others. None: no layer has one.
    """

    batch: int
    kv_heads: int
    group: int
    size: int
    page: int
    lengths: tuple[int, ...]
    active: tuple[int, ...]
    dtype: str = "float32"
    cap: float = 0.0
    sinks: bool = False
    reach: int | None = None
    seed: int = 0


@st.composite
def cases(draw) -> Case:  # type: ignore[no-untyped-def]
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    page = draw(st.sampled_from([16, 32, 64]))
    edges = st.sampled_from([0, 1, page - 1, page, page + 1, 2 * page])
    rows = st.lists(st.one_of(edges, st.integers(0, 140)), min_size=batch * kv_heads, max_size=batch * kv_heads)
    return Case(
        batch, kv_heads, draw(st.integers(1, 16)), draw(st.sampled_from(SIZES)), page, tuple(draw(rows)),
        tuple(draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=batch, max_size=batch))),
        draw(st.sampled_from(["float32", "float32", "float16"])), draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        draw(st.booleans()), draw(st.sampled_from([None, None, 0, 1, 9, 50])), draw(st.integers(0, 999)),
    )  # fmt: skip


def wanted(case: Case, q, keys, values, places, now, sink):  # type: ignore[no-untyped-def]
    """Output [G, D], log-sum-exp [G] and probabilities [G, n] of one row's queries [G, D], in float64."""
    logits = q.double() @ keys.double().T * case.size**-0.5
    if case.cap:
        logits = case.cap * torch.tanh(logits / case.cap)
    if case.reach:
        logits = logits.masked_fill(places <= now - case.reach, float("-inf"))
    if case.sinks:
        logits = torch.cat([logits, sink.double()[:, None]], 1)
    p = logits.softmax(1)[:, : len(keys)]
    return p @ values.double(), logits.logsumexp(1), p


def check(case: Case, place: Path) -> None:
    p = plan(
        KEEP, (H2O,), layers=3, kv_heads=case.kv_heads, group=case.group, head_dim=case.size, dtype=case.dtype,
        page=case.page,
    )  # fmt: skip
    p = varied(p, case.cap, case.sinks, () if case.reach is None else (3, case.reach, 70))
    rows, pages = case.batch * case.kv_heads, -(-max(case.lengths) // case.page) + 1
    dtype = getattr(torch, case.dtype)
    pools = Pools(3 * rows, pages, case.size, dtype=dtype, seed=case.seed, page=case.page, spare=rows * pages)
    for row, count in enumerate(case.lengths):
        pools.fill(rows + row, shuffled(count, row))
        pools.fill(2 * rows * (row % 2) + row, [5, 3])  # of the layers around it
    before = [pools.entries(row) for row in range(3 * rows)]
    slots = [pools.slots(rows + row) for row in range(rows)]
    held = [[x[at] for x in (pools.k, pools.v, pools.pos, pools.state[0])] for at in slots]
    q, k, v = (pools.randn(case.batch, heads, case.size) for heads in (p.facts.q_heads, case.kv_heads, case.kv_heads))
    sinks, now = torch.randn(3, p.facts.q_heads, generator=pools.noise), torch.tensor([150, 145, 160])[: case.batch]
    model = SimpleNamespace(sink=sinks, reach=torch.tensor(p.facts.windows, dtype=torch.int32))
    launch = DecodeStep.prepare(module(p, decode_spec(p), place), 3, rows, pages * case.page, torch.device("cpu"))
    out, lse = launch(
        q, k, v, pools, now, torch.tensor(case.active), torch.tensor([1]), case.size**-0.5, **variant(p, model)
    )  # fmt: skip
    bound = TOLERANCE[case.dtype]
    for row in range(rows):
        b, h = divmod(row, case.kv_heads)
        mine = slice(h * case.group, (h + 1) * case.group)
        if not case.active[b]:
            assert pools.entries(rows + row) == before[rows + row] and not out[b].any()
            continue
        keys, values, places, state = held[row]
        keys, values = torch.cat([keys, k[b, h][None]]), torch.cat([values, v[b, h][None]])
        places = torch.cat([places, now[b : b + 1].int()])
        want, want_lse, probability = wanted(case, q[b, mine], keys, values, places, now[b], sinks[1, mine])
        assert (out[b, 0, mine].double() - want).abs().max() < bound
        assert (lse[b, mine].double() - want_lse).abs().max() < bound
        at = pools.slots(rows + row)
        for pool, held_now in ((pools.k, keys), (pools.v, values), (pools.pos, places)):
            assert torch.equal(pool[at], held_now)
        grown = torch.cat([state.double(), torch.zeros(1)]) + probability.mean(0)
        assert (pools.state[0, at].double() - grown).abs().max() < bound
    around = [*range(rows), *range(2 * rows, 3 * rows)]
    assert [pools.entries(row) for row in around] == [before[row] for row in around]
    pools.assert_pages_conserved()


@examples(24)
@given(case=cases())
def test_any_shape_and_variant(tmp_path_factory, case: Case) -> None:  # type: ignore[no-untyped-def]
    check(case, tmp_path_factory.mktemp("k"))


@pytest.mark.slow
@examples(150)
@given(case=cases())
def test_many_shapes_and_variants(tmp_path_factory, case: Case) -> None:  # type: ignore[no-untyped-def]
    check(case, tmp_path_factory.mktemp("k"))


@pytest.mark.parametrize("size", [8, 96, 112])
def test_head_sizes_that_are_no_power_of_two(tmp_path: Path, size: int) -> None:
    check(Case(1, 2, 5, size, 16, (37, 16), (1,), cap=3.0, sinks=True, reach=20), tmp_path)


def test_programs_that_take_several_rows_within_a_window(tmp_path: Path) -> None:
    check(Case(3, 4, 2, 16, 16, tuple(range(0, 96, 8)), (1, 1, 1), reach=30), tmp_path)


@pytest.mark.parametrize("reach", [1, 40, 1000])
def test_a_reach_that_nothing_or_all_is_within(tmp_path: Path, reach: int) -> None:
    check(Case(1, 1, 2, 32, 16, (90,), (1,), reach=reach), tmp_path)


@pytest.mark.parametrize("largest", [7.9, 15.9, 31.9])
def test_probabilities_from_fp16_logits_keep_their_bound(tmp_path: Path, largest: float) -> None:
    """Base-2 logits below 32 lie at most 2^-7 from an fp16 number: a probability moves by less than 0.55 %."""
    term = Selection("top", reduce("mean", "g", reduce("sum", "q", attn("last", 1))), 1)
    p = plan((term,), kv_heads=1, layers=1, group=1)
    pools = Pools(1, 20, 64, states=0, spare=30)
    pools.fill(0, list(range(300)))
    q, k, v = (pools.randn(1, 1, 64) for _ in range(3))
    logits = (torch.cat([pools.k[pools.slots(0)], k[0]]).double() @ q[0, 0].double()) / 8 * 1.4426950408889634
    q *= largest / logits.abs().max()
    launch = DecodeStep.prepare(module(p, decode_spec(p, "fp16"), tmp_path), 1, 1, 320, torch.device("cpu"))
    assert launch.scratch["logits"].dtype == torch.float16 and launch.score is not None
    launch(q, k, v, pools, torch.tensor([300]), torch.tensor([1]), torch.tensor([0]), 0.125)
    want = (pools.k[pools.slots(0)].double() @ q[0, 0].double() / 8).softmax(0)
    worst = float((launch.score[0, :301].double() / want - 1).abs().max())
    bound = 2.0 ** (largest.__ceil__() / 2**12) - 1  # half a step of fp16 just below a power of two
    assert bound / 20 < worst < bound * 1.001 and bound < 0.0055
