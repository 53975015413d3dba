"""Decode attention on the interpreter, against attention written out in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompile.kernels.choose import decode_spec
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan, Region, Selection, StatePlan
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.pools import refuse_overrun
from tests.kernels.triton_interpreted.plans import (
    ACC,
    H2O,
    PAGE,
    PREFILL_END,
    STEP,
    Pools,
    attn,
    binary,
    const,
    module,
    named,
    plan,
    reduce,
    shuffled,
)  # fmt: skip

H2O_KEEP = (Region("recent", 0), Selection("top", ACC, 1))
TOVA_KEEP = (Selection("top", reduce("mean", "h", reduce("sum", "q", attn("last", 1))), 1, scope="shared"),)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def expected(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output [G, D], log-sum-exp [G], probabilities [G, n] of queries q [G, D]."""
    logits = q.double() @ keys.double().T / q.shape[-1] ** 0.5
    return logits.softmax(1) @ values.double(), logits.logsumexp(1), logits.softmax(1)


def step(p: PolicyPlan, place: Path, batch: int, capacity: int, logits: str = "fp32") -> DecodeStep:
    made = module(p, decode_spec(p, logits), place)
    return DecodeStep.prepare(made, p.facts.layers, batch * p.facts.kv_heads, capacity, torch.device("cpu"))


def tokens(p: PolicyPlan, pools: Pools, batch: int) -> tuple[torch.Tensor, ...]:
    """Queries, and keys and values of strided layouts as a model makes them."""
    heads, size = p.facts.kv_heads, p.facts.head_dim
    q = pools.randn(batch, p.facts.q_heads, size)
    k = pools.randn(batch, 1, heads, size).transpose(1, 2)[:, :, 0]
    v = pools.randn(batch, heads, 3, size)[:, :, 1]
    return q, k, v


@pytest.mark.parametrize(
    ("group", "size", "dtype"),
    [(1, 64, torch.float32), (2, 128, torch.float32), (4, 64, torch.float16), (4, 64, torch.float32)],
)
def test_ragged_rows_match_attention_written_out(tmp_path: Path, group: int, size: int, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    p = plan(H2O_KEEP, (H2O,), group=group, head_dim=size, dtype=name)
    batch, heads, layer = 2, 2, 1
    pools = Pools(8, 16, size, dtype=dtype)
    lengths = [37, 160, 16, 0, 129, 1, 15, 48]
    for row, count in enumerate(lengths):
        pools.fill(row, shuffled(count, row))
    before = [pools.entries(row) for row in range(8)]
    keys = [pools.k[pools.slots(row)] for row in range(8)]
    values = [pools.v[pools.slots(row)] for row in range(8)]
    states = [pools.state[0, pools.slots(row)] for row in range(8)]
    q, k, v = tokens(p, pools, batch)
    launch = step(p, tmp_path, batch, 16 * PAGE)
    launch.scratch["target"] = 5  # work units are shared out over few programs and split the long rows
    out, lse = launch.module.launch(
        q, k, v, torch.tensor([200, 300]), torch.tensor([1, 1]), pools.k, pools.v, pools.pos, pools.frozen, pools.state,
        pools.table, pools.length, pools.free, pools.top, torch.tensor([layer]), size**-0.5, scratch=launch.scratch,
        min_chunk=32,
    )  # fmt: skip
    assert out.shape == (batch, 1, 2 * group, size) and out.dtype == dtype
    for row in range(4):
        assert pools.entries(row) == before[row], "rows of another layer were touched"
    for row in range(4, 8):
        b, h = divmod(row - 4, heads)
        mine = slice(h * group, (h + 1) * group)
        all_k, all_v = torch.cat([keys[row], k[b, h][None]]), torch.cat([values[row], v[b, h][None]])
        want, want_lse, p_n = expected(q[b, mine], all_k, all_v)
        assert (out[b, 0, mine].double() - want).abs().max() < TOLERANCE[dtype]
        assert (lse[b, mine].double() - want_lse).abs().max() < TOLERANCE[dtype]
        got = pools.entries(row)
        assert [e[:4] for e in got[:-1]] == [e[:4] for e in before[row]]
        assert got[-1][:2] == ([200, 300][b], 0)
        assert got[-1][2] == k[b, h].numpy().tobytes() and got[-1][3] == v[b, h].numpy().tobytes()
        want_state = torch.cat([states[row].double(), torch.zeros(1)]) + p_n.mean(0)
        assert (pools.state[0, pools.slots(row)].double() - want_state).abs().max() < TOLERANCE[dtype]
    pools.assert_pages_conserved()


@pytest.mark.parametrize(
    ("lengths", "programs", "units"),
    [
        ([448] * 4, 7, [1, 1, 1, 1]),  # in stretches of 256 there would be eight
        ([600, 300, 100, 20], 5, [2, 1, 1, 1]),
        ([600, 600, 600, 1], 3, [1, 1, 1, 1]),  # more rows than programs: in rounds whatever the stretch
        ([640, 1, 1, 1], 13, [10, 1, 1, 1]),  # as many as there are: each program has one
    ],
)
def test_no_unit_is_left_for_a_second_round(
    tmp_path: Path, lengths: list[int], programs: int, units: list[int]
) -> None:
    p = plan(H2O_KEEP, (H2O,), layers=1, group=1)
    pools = Pools(4, 64, 64)
    for row, count in enumerate(lengths):
        pools.fill(row, list(range(count)))
    q, k, v = tokens(p, pools, 2)
    made = module(p, decode_spec(p), tmp_path)
    launch = DecodeStep.prepare(made, 1, 4, 64 * PAGE, torch.device("cpu"), programs)
    launch.module.launch(
        q, k, v, torch.tensor([700, 700]), torch.tensor([1, 1]), pools.k, pools.v, pools.pos, pools.frozen,
        pools.state, pools.table, pools.length, pools.free, pools.top, torch.tensor([0]), 0.125, scratch=launch.scratch,
        min_chunk=64,
    )  # fmt: skip
    assert launch.scratch["plan"][1, :4].tolist() == units


def test_inactive_sequences_are_left_alone(tmp_path: Path) -> None:
    p = plan(H2O_KEEP, (H2O,), layers=1)
    pools = Pools(4, 8, 64)
    for row, count in enumerate((20, 16, 32, 5)):
        pools.fill(row, shuffled(count, row))
    before = [pools.entries(row) for row in range(4)]
    q, k, v = tokens(p, pools, 2)
    out, lse = step(p, tmp_path, 2, 128)(
        q, k, v, pools, torch.tensor([50, 60]), torch.tensor([0, 1]), torch.tensor([0]), 0.125
    )
    assert [pools.entries(row) for row in (0, 1)] == before[:2]
    assert [len(pools.entries(row)) for row in (2, 3)] == [33, 6]
    assert not out[0].any() and bool((lse[0] == float("-inf")).all())
    assert bool(out[1].any()) and bool(out.isfinite().all())


def test_steps_take_pages_and_keep_counting(tmp_path: Path) -> None:
    p = plan(H2O_KEEP, (H2O,), layers=1, kv_heads=1, group=2)
    pools = Pools(2, 8, 64)
    pools.fill(0, list(range(14)))
    launch = step(p, tmp_path, 2, 128)
    keys = [list(pools.k[pools.slots(0)]), []]
    values = [list(pools.v[pools.slots(0)]), []]
    acc = [pools.state[0, pools.slots(0)].double(), torch.zeros(0).double()]
    free = int(pools.top)
    for t in range(12):
        q, k, v = tokens(p, pools, 2)
        now = torch.tensor([14 + t, t])
        out, _ = launch(q, k, v, pools, now, torch.tensor([1, 1]), torch.tensor([0]), 0.125)
        for b in range(2):
            keys[b].append(k[b, 0])
            values[b].append(v[b, 0])
            want, _, p_n = expected(q[b], torch.stack(keys[b]), torch.stack(values[b]))
            acc[b] = torch.cat([acc[b], torch.zeros(1)]) + p_n.mean(0)
            assert (out[b, 0].double() - want).abs().max() < 1e-5
    for b in range(2):
        assert (pools.state[0, pools.slots(b)].double() - acc[b]).abs().max() < 1e-5
    assert pools.pos[pools.slots(0)].tolist() == list(range(26)) and pools.pos[pools.slots(1)].tolist() == list(
        range(12)
    )
    assert free - int(pools.top) == 1 + 1
    pools.assert_pages_conserved()


@pytest.mark.parametrize("logits", ["fp32", "fp16"])
def test_a_step_score_is_left_for_the_eviction(tmp_path: Path, logits: str) -> None:
    p = plan(TOVA_KEEP, layers=2, group=4)
    pools = Pools(4, 8, 64, states=0)
    for row in range(4):
        pools.fill(row, shuffled(40, row))
    q, k, v = tokens(p, pools, 1)
    launch = step(p, tmp_path, 1, 128, logits)
    assert launch.score is not None
    launch(q, k, v, pools, torch.tensor([40]), torch.tensor([1]), torch.tensor([1]), 0.125)
    assert not launch.score[:2].any()
    for row in (2, 3):
        at = pools.slots(row)
        _, _, p_n = expected(q[0, (row - 2) * 4 : (row - 1) * 4], pools.k[at], pools.v[at])
        error = (launch.score[row, :41].double() - p_n.mean(0)).abs().max()
        assert error < (1e-6 if logits == "fp32" else 2e-3)


def test_a_score_of_a_state_and_of_evidence_reads_what_this_step_made_of_the_state(tmp_path: Path) -> None:
    newest = reduce("mean", "q", attn("last", 1))
    both = reduce("mean", "g", binary("-", ACC, binary("*", named("scalar", "len"), newest)))
    p = replace(plan((Region("recent", 0), Selection("top", both, 1)), (H2O,), layers=1), query_window=1)
    pools = Pools(2, 8, 64)
    pools.fill(0, shuffled(37, 1))
    pools.fill(1, shuffled(16, 2))
    before = [pools.state[0, pools.slots(row)].double() for row in range(2)]
    q, k, v = tokens(p, pools, 1)
    launch = step(p, tmp_path, 1, 128)
    assert launch.score is not None
    launch(q, k, v, pools, torch.tensor([50]), torch.tensor([1]), torch.tensor([0]), 0.125)
    for row in range(2):
        at = pools.slots(row)
        _, _, p_n = expected(q[0, row * 2 : (row + 1) * 2], pools.k[at], pools.v[at])
        state = torch.cat([before[row], torch.zeros(1)]) + p_n.mean(0)
        assert (pools.state[0, at].double() - state).abs().max() < 1e-5
        assert (launch.score[row, : len(at)].double() - (state - len(at) * p_n.mean(0))).abs().max() < 1e-4


def test_states_may_start_at_now_and_grow_by_any_formula(tmp_path: Path) -> None:
    seen = StatePlan("seen", named("scalar", "now"), None)
    hits = StatePlan(
        "hits", const(2), binary(">", reduce("max", "g", attn()), binary("/", const(1), named("scalar", "len")))
    )
    p = plan((Region("recent", 0), Selection("top", named("state", "hits"), 1)), (seen, hits), layers=1, kv_heads=1)
    pools = Pools(1, 8, 64, states=2)
    pools.fill(0, list(range(30)))
    old = pools.state[:, pools.slots(0)]
    q, k, v = tokens(p, pools, 1)
    step(p, tmp_path, 1, 128)(q, k, v, pools, torch.tensor([99]), torch.tensor([1]), torch.tensor([0]), 0.125)
    at = pools.slots(0)
    _, _, p_n = expected(q[0], pools.k[at], pools.v[at])
    assert pools.state[0, at].tolist() == [*old[0].tolist(), 99.0]
    want = torch.cat([old[1], torch.tensor([2.0])]) + (p_n.amax(0) > 1 / 31).float()
    assert torch.equal(pools.state[1, at], want)


def test_too_small_a_pool_is_noticed_and_harms_no_row(tmp_path: Path) -> None:
    p = plan((Region("sink", 0), Region("recent", 1)), layers=1, kv_heads=2)
    pools = Pools(2, 8, 64, states=0)
    pools.fill(0, list(range(16)))
    pools.fill(1, list(range(32)))
    pools.top.fill_(1)  # one page for two rows whose last page is full
    before = pools.entries(1)
    q, k, v = tokens(p, pools, 1)
    out, _ = step(p, tmp_path, 1, 128)(q, k, v, pools, torch.tensor([40]), torch.tensor([1]), torch.tensor([0]), 0.125)
    assert [len(pools.entries(row)) for row in (0, 1)] == [17, 32]
    assert pools.entries(1) == before
    at = pools.slots(1)
    want, _, _ = expected(q[0, 2:], torch.cat([pools.k[at], k[0, 1:]]), torch.cat([pools.v[at], v[0, 1:]]))
    assert (out[0, 0, 2:].double() - want).abs().max() < 1e-5
    with pytest.raises(KvCompileError, match="smaller than"):
        refuse_overrun(pools)


class Fake:
    """torch with a CUDA device that is none, and tells what a file's `bench` asks of it."""

    cuda = SimpleNamespace(
        is_available=lambda: True, synchronize=lambda: None, get_device_name=lambda: "none",
        Event=lambda enable_timing: SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 1.0),
    )  # fmt: skip

    def empty(self, *shape: int, device: object = None, **options: Any) -> torch.Tensor:
        return torch.empty(*(1,) if device == "cuda" else shape, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_every_launch_that_a_file_times_finds_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(p := plan(H2O_KEEP, (H2O,)), decode_spec(p), tmp_path)
    inputs, launch, seen = made.example("cpu", torch.float32, small=True), made.launch, []
    found = (inputs["length"].clone(), inputs["top"].clone(), inputs["state"].clone())

    def watched(**given: Any) -> Any:
        seen.append(all(torch.equal(given[n], was) for n, was in zip(("length", "top", "state"), found, strict=True)))
        return launch(**given)

    monkeypatch.setattr(made, "torch", Fake())
    monkeypatch.setattr(made, "example", lambda *_, **__: inputs)
    monkeypatch.setattr(made, "launch", watched)
    assert made.bench() == 0
    assert len(seen) > 10 and all(seen)


def test_prefill_only_policies_keep_no_logits(tmp_path: Path) -> None:
    p = plan(H2O_KEEP, (), triggers=(PREFILL_END,))
    assert decode_spec(p).fact("logits") == "none"
    assert decode_spec(plan(H2O_KEEP, (H2O,), triggers=(PREFILL_END, STEP))).fact("logits") == "fp32"
    assert step(p, tmp_path, 1, 128).score is None
