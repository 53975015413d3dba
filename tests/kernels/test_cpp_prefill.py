"""Generated C++ attention of a piece against a plain softmax under explicit masks, on the same rounded inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.kernels import cpu
from kvcompile.kernels.cpp_backend import piece, prefill
from kvcompile.kernels.cpp_backend.build import NoCompiler, compiler
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Clock
from tests.kernels.rows import Entry, plan_of, site_of

try:
    compiler()
except NoCompiler as error:
    pytest.skip(f"needs a C++ compiler: {error}", allow_module_level=True)

quick = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CLOSE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# group, head_dim, dtype: every dtype, group and width, in as few kernels as hold them
SHAPES = [(1, 16, "float32"), (4, 128, "float32"), (3, 80, "bfloat16"), (16, 96, "float16"), (8, 256, "bfloat16")]


def noise(seed: int, *shape: int, dtype: str = "float32") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def inputs(seed: int, batch: int, kv_heads: int, n: int, shape: tuple[int, int, str]) -> tuple[Tensor, Tensor, Tensor]:
    """As a model hands them over: [B, n, heads, D], seen as [B, heads, n, D]."""
    group, size, dtype = shape
    heads = (kv_heads * group, kv_heads, kv_heads)
    return tuple(noise(seed + i, batch, n, h, size, dtype=dtype).transpose(1, 2) for i, h in enumerate(heads))  # type: ignore[return-value]


def softmax_over(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, scale: float, cap: float = 0.0, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence: q [Hq, n, D], k, v [Hkv, N, D], live [Hkv, n, N]. Returns [n, Hq, D] and the LSE [Hq, n]."""
    group = q.shape[0] // k.shape[0]
    keys, values = (t.float().repeat_interleave(group, 0) for t in (k, v))
    logits = q.float() @ keys.transpose(1, 2) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~live.repeat_interleave(group, 0), float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink[:, None, None].expand(-1, logits.shape[1], 1)], 2)
    return (logits.softmax(-1)[:, :, : keys.shape[1]] @ values).transpose(0, 1), logits.logsumexp(-1)


def reads(at: Tensor, p: Tensor, first: int, window: int, reach: int = 0) -> Tensor:
    """Which entries at `at` [N] the queries at `p` [n] read."""
    live = at[None] <= p[:, None]
    if window:
        live &= (at[None] < first) | (at[None] > p[:, None] - window)
    if reach:
        live &= at[None] > p[:, None] - reach
    return live


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@quick
@given(
    n=st.integers(1, 40) | st.integers(250, 600), batch=st.integers(1, 2), threads=st.sampled_from([1, 2]),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60) | st.just(270)), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_each_head_reads_its_first_entries_and_its_window(shape, n, batch, threads, spans, seed):
    q, k, v = inputs(seed, batch, len(spans), n, shape)
    sink, window = torch.tensor(spans, dtype=torch.int32).unbind(1)
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = prefill.attend(q, k, v, sink, window, 0.3)
    finally:
        torch.set_num_threads(was)
    p = torch.arange(n)
    live = torch.stack([reads(p, p, *span) for span in spans])
    truth = torch.stack([softmax_over(q[b], k[b], v[b], live, 0.3)[0] for b in range(batch)])
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.float(), truth, rtol=CLOSE[shape[2]], atol=CLOSE[shape[2]])


@quick
@given(
    n=st.integers(1, 300), held=st.integers(0, 300), cap=st.sampled_from([0.5, 30.0]),
    reach=st.sampled_from([0, 1, 7, 280]),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=2, max_size=2), seed=st.integers(0, 99),
)  # fmt: skip
@example(n=5, held=300, cap=30.0, reach=280, spans=[(0, 0), (3, 0)], seed=1)  # only the reach ends what is read
def test_softcap_sinks_and_a_sliding_window(n, held, cap, reach, spans, seed):
    plan = plan_of(head_dim=32, group=3)
    q, k, v = inputs(seed, 1, 2, n, (3, 32, "float32"))
    sink = noise(seed, 6)
    at = torch.randperm(2 * held, generator=torch.Generator().manual_seed(seed))[:held]
    old = [[Entry(int(p), *noise(seed + int(p) + h, 2, 32)) for p in at] for h in range(2)]
    site = site_of(plan, old)
    site.clock[0, Clock.NEW], site.clock[0, Clock.START] = n, 2 * held
    library = prefill.standalone(3, 32, "float32", frozenset({"softcap", "sinks", "sliding"}))
    first, window = torch.tensor(spans, dtype=torch.int32).unbind(1)
    lse = torch.zeros(1, 6, n)
    out = prefill.read(
        library, q, k, v, 0.7, site=site, first=first.contiguous(), window=window.contiguous(), sink=sink, cap=cap,
        reach=reach, lse=lse,
    )  # fmt: skip
    p = 2 * held + torch.arange(n)
    live = torch.stack([reads(torch.cat([at, p]), p, *span, reach) for span in spans])
    keys, values = (
        torch.cat([torch.stack([getattr(e, name) for row in old for e in row]).view(2, held, 32), t[0]], 1)
        if held
        else t[0]
        for name, t in (("k", k), ("v", v))
    )
    truth, norm = softmax_over(q[0], keys, values, live, 0.7, cap, sink)
    torch.testing.assert_close(out[0], truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0], norm, rtol=1e-5, atol=1e-5)


@quick
@given(
    lengths=st.lists(st.integers(0, 30) | st.integers(250, 300), min_size=4, max_size=4),
    new=st.tuples(st.integers(0, 70), st.integers(0, 70)), peek=st.sampled_from([0, 3]), seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_a_piece_reads_ragged_rows_in_any_order_and_its_own_earlier_tokens(lengths, new, peek, seed, dtype):
    plan = plan_of(head_dim=16, group=2, dtype=dtype, ring=3)
    columns = max(new) + peek
    if not columns:
        return
    order = torch.Generator().manual_seed(seed)
    old = [
        [
            Entry(int(p), *noise(seed + int(p) + r, 2, 16, dtype=dtype))
            for p in torch.randperm(2 * n, generator=order)[:n]
        ]
        for r, n in enumerate(lengths)
    ]
    q, k, v = inputs(seed, 2, 2, columns, (2, 16, dtype))
    sites = [site_of(plan, old), site_of(plan, old)]
    for b in range(2):
        for site in sites:
            site.clock[b, :3] = torch.tensor([new[b], peek if new[b] else 0, 2 * max(lengths)])
    out = piece.attend_prefill(plan, sites[0], q, k, v, 0.4)
    assert out is not None
    cpu.attend_prefill(plan, sites[1], q, k, v, 0.4)
    assert torch.equal(sites[0].ring, sites[1].ring)  # the newest queries are kept
    for b in range(2):
        n = new[b] + (peek if new[b] else 0)
        assert not out[b, : columns - n].any()  # padding
        for h in range(2):
            row = old[2 * b + h]
            own = slice(columns - n, columns)
            keys, values = (
                torch.cat([*(getattr(e, name)[None] for e in row), t[b, h, own]])[None]
                for name, t in (("k", k), ("v", v))
            )
            live = torch.ones(n, len(row) + n, dtype=torch.bool).tril(len(row))
            truth, _ = softmax_over(q[b, 2 * h : 2 * h + 2, own], keys, values, live[None], 0.4)
            torch.testing.assert_close(
                out[b, own, 2 * h : 2 * h + 2].float(), truth, rtol=CLOSE[dtype], atol=CLOSE[dtype]
            )


def test_reads_that_are_more_than_attention_are_left_to_the_definition():
    q, k, v = inputs(0, 1, 2, 4, (2, 16, "float32"))
    for plan in (plan_of(head_dim=16, compact=True), plan_of(head_dim=16, dtype="bfloat16")):
        site = site_of(plan, [[], []])
        site.clock[0, Clock.NEW] = 4
        assert piece.attend_prefill(plan, site, q, k, v, 1.0) is None


def test_numbers_of_heads_that_do_not_fit_are_refused():
    q, k, v = inputs(0, 1, 2, 4, (2, 16, "float32"))
    with pytest.raises(KvCompileError, match="one sink and one window for each KV head"):
        prefill.attend(q, k, v, torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 1.0)


def test_tensors_that_do_not_fit_each_other_are_refused():
    """The kernel sees addresses alone: it would read past the end."""
    q, k, v = inputs(0, 1, 2, 4, (2, 16, "float32"))
    all_of_it = torch.zeros(2, dtype=torch.int32)
    for some in ((q, k[:, :, :3], v), (q, k, v[..., :8]), (q, k.bfloat16(), v), (q.double(), k.double(), v.double())):
        with pytest.raises(KvCompileError, match=r"k and v have to be \[1, 2, 4, 16\]"):
            prefill.attend(*some, all_of_it, all_of_it, 1.0)
    with pytest.raises(KvCompileError, match=r"\.cpu\(\)"):
        prefill.attend(*(t.to("meta") for t in (q, k, v)), all_of_it, all_of_it, 1.0)
