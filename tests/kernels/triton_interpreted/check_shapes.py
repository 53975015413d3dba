"""Columns, keys, pool, pack and evict over drawn shapes on the interpreter, against plain torch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels.choose import evict_spec, pack_spec, score_specs, state_spec
from kvcompile.kernels.plan import Expr, Region, Selection
from kvcompile.kernels.triton_backend import prefill
from kvcompile.kernels.triton_backend.evict import EvictStep
from tests.driving import examples
from tests.kernels.triton_interpreted.plans import (
    ACC,
    H2O,
    PREFILL_END,
    Pools,
    attn,
    binary,
    const,
    module,
    plan,
    reduce,
    shuffled,
    varied,
)  # fmt: skip

SIZES = st.sampled_from([8, 16, 24, 40, 64, 80, 96, 112, 128, 200, 256])
PAGES = st.sampled_from([16, 32, 64])
SEEDS = st.integers(0, 999)
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}
K = Expr("field", (), "k")
COSINE = Expr("pair", (K, binary("+", K, const(1))), "cos")
FORMULAS = {
    "norm": (Expr("unary", (K,), "norm"), lambda k: k.norm(dim=-1)),
    "std": (reduce("std", "d", K), lambda k: k.std(-1)),
    "max": (reduce("max", "d", binary("-", K, const(9))), lambda k: k.amax(-1) - 9),
    "mean": (reduce("mean", "d", Expr("unary", (K,), "sigmoid")), lambda k: k.sigmoid().mean(-1)),
    "cos": (COSINE, lambda k: torch.cosine_similarity(k, k + 1, dim=-1)),
}


def drawn(seed: int, dtype: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def attention(q, k, pos, qpos, scale, cap, sink, reach):  # type: ignore[no-untyped-def]
    """Probabilities [B, Hkv, G, W, N] and log-sum-exp [B, Hq, W] in float64; a query that is absent sees nothing."""
    heads = k.shape[1]
    logits = torch.einsum("bhgqd,bhnd->bhgqn", q.double().unflatten(1, (heads, -1)), k.double()) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    at, asked = pos[:, :, None, None], qpos[:, None, None, :, None]
    sees = (at >= 0) & (at <= asked) & ((at > asked - reach) | (reach == 0))
    logits = logits.masked_fill(~sees, float("-inf"))
    if sink is not None:
        more = sink.double().view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, more], -1)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().nan_to_num(0.0)[..., : k.shape[2]], lse.flatten(1, 2)


def columns(data: st.DataObject, place) -> None:  # type: ignore[no-untyped-def]
    batch, heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    size, seed = data.draw(SIZES), data.draw(SEEDS)
    n = data.draw(st.one_of(st.sampled_from([1, 31, 32, 33, 64, 65]), st.integers(1, 100)))
    whole, window = data.draw(st.booleans()), data.draw(st.integers(1, 40))
    asked = n if whole else min(window, n)
    dtype = data.draw(st.sampled_from(["float32", "float32", "float16"]))
    cap, sinks = data.draw(st.sampled_from([0.0, 0.0, 3.0])), data.draw(st.booleans())
    reach = data.draw(st.sampled_from([0, 0, 1, 7, 40]))
    facts = {"kv_heads": heads, "group": group, "head_dim": size, "dtype": dtype, "layers": 1}
    variants = {"cap": cap, "sinks": sinks, "windows": (reach,) if reach else ()}
    sink = drawn(seed + 2, "float32", heads * group) if sinks else None
    more = {"cap": cap or None, "sink": sink, "reach": reach or None}
    more = {name: value for name, value in more.items() if value is not None}
    q, k = drawn(seed, dtype, batch, heads * group, asked, size), drawn(seed + 1, dtype, batch, heads, n, size)
    pos = torch.arange(n, dtype=torch.int32).expand(batch, heads, n).clone()
    pos[torch.rand(pos.shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = -1
    qpos = torch.arange(n - asked, n, dtype=torch.int32).expand(batch, asked).clone()
    qpos[-1, : random.Random(seed).randrange(asked)] = -1
    p_n, lse = attention(q, k, pos, qpos, size**-0.5, cap, sink, reach)
    if whole:
        p = varied(plan((Selection("top", ACC, 1),), (H2O,), **facts), **variants)  # type: ignore[arg-type]
        spec = state_spec(p, H2O)
        assert spec is not None
        got = prefill.state_columns(module(p, spec, place), q, k, pos, qpos, lse.float(), size**-0.5, **more)
    else:
        term = Selection("top", reduce("mean", "g", reduce("sum", "q", attn("last", window))), 1)
        p = varied(plan((term,), triggers=(PREFILL_END,), **facts), **variants)  # type: ignore[arg-type]
        stages = tuple((spec.template, module(p, spec, place)) for spec in score_specs(p, term))
        got = prefill.score(stages, q, k, pos, qpos, pos >= 0, size**-0.5, **more)
    want = p_n.sum(3).mean(2)
    error = ((got.double() - want).abs() / want.clamp(min=1)).max()  # a column may sum to as many as there are queries
    assert error < TOLERANCE[dtype]


def keys(data: st.DataObject, place) -> None:  # type: ignore[no-untyped-def]
    batch, heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 140))
    size, (formula, written) = data.draw(SIZES), FORMULAS[data.draw(st.sampled_from(sorted(FORMULAS)))]
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    term = Selection("top", formula, 1)
    p = plan((term,), triggers=(PREFILL_END,), layers=1, kv_heads=heads, head_dim=size, dtype=dtype)
    k = drawn(data.draw(SEEDS), dtype, batch, n, heads, size).transpose(1, 2)
    pos = torch.arange(n, dtype=torch.int32).expand(batch, heads, n).contiguous()
    (spec,) = score_specs(p, term)
    got = module(p, spec, place).launch(k, pos)
    assert torch.allclose(got.double(), written(k.double()), rtol=TOLERANCE["float32"], atol=TOLERANCE["float32"])


def pooled(data: st.DataObject, place) -> None:  # type: ignore[no-untyped-def]
    kind, width = data.draw(st.sampled_from(["max", "avg"])), data.draw(st.sampled_from([1, 3, 5, 7, 13]))
    rows, n, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 600)), data.draw(SEEDS)
    term = Selection("top", Expr("pool", (reduce("mean", "g", reduce("sum", "q", attn("last", 8))),), (kind, width)), 1)
    p = plan((term,), triggers=(PREFILL_END,), layers=1, by_position=True)
    score, open_ = drawn(seed, "float32", rows, n), drawn(seed + 1, "float32", rows, n) > -0.5
    pos = torch.arange(n, dtype=torch.int32).expand(rows, n).contiguous()
    got = module(p, score_specs(p, term)[1], place).launch(score, pos, open_)
    for r in range(rows):
        if not open_[r].any():
            assert not got[r].any()
            continue
        row = score[r, open_[r]].double()
        halo = torch.nn.functional.pad(row, (width // 2, width // 2), value=float("-inf") if kind == "max" else 0.0)
        near = halo.unfold(0, width, 1)[: len(row)]
        want = near.amax(1) if kind == "max" else near.sum(1) / width
        assert torch.allclose(got[r, open_[r]].double(), want, atol=1e-5) and not got[r, ~open_[r]].any()


def pack(data: st.DataObject, place) -> None:  # type: ignore[no-untyped-def]
    batch, heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    page, size, seed = data.draw(PAGES), data.draw(SIZES), data.draw(SEEDS)
    rows, part = batch * heads, data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    p = plan((Region("recent", 0),), (H2O,), layers=1, kv_heads=heads, head_dim=size, page=page)
    pools = Pools(rows, (n + 70) // page + 1, size, seed=seed, page=page, spare=rows * ((n + 70) // page + 1))
    for row in range(rows):
        pools.fill(row, list(range(random.Random(seed + row).choice([0, 1, page - 1, page, 66]))))
    before = [pools.entries(row) for row in range(rows)]
    k = drawn(seed, "float32", batch, n, heads, size).transpose(1, 2)
    v = drawn(seed + 1, "float32", batch, heads, n, size)
    pos = torch.arange(100, 100 + n, dtype=torch.int32).expand(batch, heads, n)
    frozen = (drawn(seed + 2, "float32", batch, heads, n) > 0).to(torch.uint8)
    state = drawn(seed, "float32", 1, batch, heads, n)
    keep = torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(seed)) < part
    prefill.append(module(p, pack_spec(p), place), pools, k, v, pos, frozen, state, keep, torch.tensor([0]))
    for row in range(rows):
        b, h = divmod(row, heads)
        new = []
        for i in keep[b, h].nonzero().flatten().tolist():
            key, value = k[b, h, i].numpy().tobytes(), v[b, h, i].numpy().tobytes()
            new.append((100 + i, int(frozen[b, h, i]), key, value, (float(state[0, b, h, i]),)))
        assert pools.entries(row) == before[row] + new
    pools.assert_pages_conserved()


def evict(data: st.DataObject, place) -> None:  # type: ignore[no-untyped-def]
    batch, heads, page = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(PAGES)
    size, seed, ordered = data.draw(SIZES), data.draw(SEEDS), data.draw(st.booleans())
    recent, heavy = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 60))
    dice = random.Random(seed)
    keep = (Region("recent", 0), Selection("top", ACC, 1))
    p = plan(keep, (H2O,), layers=1, kv_heads=heads, head_dim=size, page=page, by_position=ordered)
    rows, pages = batch * heads, 140 // page + 1
    pools = Pools(rows, pages, size, seed=seed, page=page, spare=rows * pages)
    for row in range(rows):
        count = dice.choice([0, 1, page - 1, page, page + 1, 2 * page, dice.randrange(140)])
        pools.fill(row, list(range(count)) if ordered else shuffled(count, seed + row), ties=True)
    before = [pools.entries(row) for row in range(rows)]
    fires = torch.tensor([dice.choice([0, 1, 1]) for _ in range(batch)], dtype=torch.uint8)
    step = EvictStep.prepare(module(p, evict_spec(p, 0), place), p, 0, batch, pages * page, torch.device("cpu"))
    counts = torch.tensor([recent, heavy])[None, :, None].expand(1, 2, batch).contiguous()
    step(pools, counts, fires, torch.full((batch,), 139), torch.full((batch,), 10), None)
    for row in range(rows):
        got, was = pools.entries(row), before[row]
        if not fires[row // heads]:
            assert got == was
            continue
        open_ = sorted((-e[4][0], e[0]) for e in was if e[0] <= 139 - recent)[:heavy]
        want = sorted(e for e in was if e[0] > 139 - recent or (-e[4][0], e[0]) in open_)
        assert (got if ordered else sorted(got)) == want
    pools.assert_pages_conserved()


SUITES = {"columns": columns, "keys": keys, "pool": pooled, "pack": pack, "evict": evict}


@pytest.mark.parametrize("template", SUITES)
def test_any_shape(tmp_path_factory, template: str) -> None:  # type: ignore[no-untyped-def]
    @examples(12)
    @given(data=st.data())
    def drawn_shapes(data: st.DataObject) -> None:
        SUITES[template](data, tmp_path_factory.mktemp("k"))

    drawn_shapes()


@pytest.mark.slow
@pytest.mark.parametrize("template", SUITES)
def test_many_shapes(tmp_path_factory, template: str) -> None:  # type: ignore[no-untyped-def]
    @examples(100)
    @given(data=st.data())
    def drawn_shapes(data: st.DataObject) -> None:
        SUITES[template](data, tmp_path_factory.mktemp("k"))

    drawn_shapes()
