"""Score stages, select and pack on the interpreter, against the formulas written out."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels.choose import pack_spec, score_specs, select_spec, state_spec
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import Expr, PolicyPlan, Region, Selection, StatePlan
from kvcompile.kernels.triton_backend import prefill
from kvcompile.kernels.triton_backend.evict import sites
from kvcompile.kernels.triton_backend.pools import refuse_overrun
from tests.kernels.triton_interpreted.plans import (
    H2O,
    PREFILL_END,
    Pools,
    attn,
    binary,
    const,
    module,
    named,
    plan,
    reduce,
)  # fmt: skip

CPU = torch.device("cpu")
K = Expr("field", (), "k")


def pool(kind: str, width: int, x: Expr) -> Expr:
    return Expr("pool", (x,), (kind, width))


def bound(score: Expr, **facts: object) -> tuple[PolicyPlan, Selection]:
    term = Selection("top", score, 1)
    return plan((Region("recent", 0), term), triggers=(PREFILL_END,), layers=1, by_position=True, **facts), term  # type: ignore[arg-type]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(score: Expr, place: Path, q: torch.Tensor, k: torch.Tensor, pos: torch.Tensor, qpos: torch.Tensor,
        candidates: torch.Tensor) -> torch.Tensor:  # fmt: skip
    group = q.shape[1] // k.shape[1]
    p, term = bound(score, kv_heads=k.shape[1], group=group, head_dim=k.shape[3])
    stages = tuple((spec.template, module(p, spec, place)) for spec in score_specs(p, term))
    return prefill.score(stages, q, k, pos, qpos, candidates, 0.125)


def probabilities(q: torch.Tensor, k: torch.Tensor, pos: torch.Tensor, qpos: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G, W, N] of every query over what it may read; absent queries give zeros."""
    queries = q.double().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("bhgqd,bhnd->bhgqn", queries, k.double()) * 0.125
    sees = (pos[:, :, None, None] >= 0) & (pos[:, :, None, None] <= qpos[:, None, None, :, None])
    return logits.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num(0.0)


SUM_Q = reduce("sum", "q", attn("last", 8))
SQUARE = binary("*", attn("last", 8), attn("last", 8))


@pytest.mark.parametrize(
    ("formula", "written_out"),
    [
        (reduce("mean", "g", SUM_Q), lambda p: p.sum(3).mean(2)),
        (reduce("sum", "q", reduce("mean", "g", attn("peek", 8))), lambda p: p.sum(3).mean(2)),
        (reduce("max", "g", reduce("max", "q", attn("last", 8))), lambda p: p.amax((2, 3))),
        (reduce("sum", "g", binary("*", SUM_Q, SUM_Q)), lambda p: (p.sum(3) ** 2).sum(2)),
        (reduce("max", "g", reduce("sum", "q", SQUARE)), lambda p: (p**2).sum(3).amax(2)),
    ],
    ids=["snapkv", "heads first", "maxima", "square of sums", "sum of squares"],
)  # fmt: skip
def test_columns_of_a_window(tmp_path: Path, formula: Expr, written_out) -> None:  # type: ignore[no-untyped-def]
    q, k = draw(1, 2, 4, 8, 64), draw(2, 2, 2, 90, 64)
    pos = torch.arange(90, dtype=torch.int32).expand(2, 2, 90).clone()
    pos[0, 1, [4, 80]] = -1
    qpos = torch.arange(82, 90, dtype=torch.int32).expand(2, 8).clone()
    got = run(formula, tmp_path, q, k, pos, qpos, pos >= 0)
    want = written_out(probabilities(q, k, pos, qpos))
    assert (got.double() - want).abs().max() < 1e-5


def test_a_short_prompt_has_absent_queries_which_count_in_no_mean(tmp_path: Path) -> None:
    formula = reduce("mean", "g", reduce("mean", "q", attn("last", 8)))
    q, k = draw(3, 1, 2, 8, 64), draw(4, 1, 1, 5, 64)
    pos = torch.arange(5, dtype=torch.int32).reshape(1, 1, 5)
    qpos = torch.tensor([[-1, -1, -1, 0, 1, 2, 3, 4]], dtype=torch.int32)
    got = run(formula, tmp_path, q, k, pos, qpos, pos >= 0)
    want = probabilities(q, k, pos, qpos).sum(3).mean(2) / 5
    assert (got.double() - want).abs().max() < 1e-6


@pytest.mark.parametrize("group", [1, 4])
def test_columns_of_a_whole_prefill_with_the_lse_given(tmp_path: Path, group: int) -> None:
    p = plan((Selection("top", named("state", "acc"), 1),), (H2O,), layers=1, kv_heads=2, group=group)
    spec = state_spec(p, H2O)
    assert spec is not None
    n, past = 70, 20
    q, k = draw(5, 1, 2 * group, n, 64), draw(6, 1, 2, past + n, 64)
    pos = torch.arange(past + n, dtype=torch.int32).expand(1, 2, -1).contiguous()
    qpos = torch.arange(past, past + n, dtype=torch.int32).reshape(1, -1)
    logits = torch.einsum("bhgqd,bhnd->bhgqn", q.unflatten(1, (2, -1)), k) * 0.125
    logits = logits.masked_fill(pos[:, :, None, None] > qpos[:, None, None, :, None], float("-inf"))
    lse = logits.logsumexp(-1).flatten(1, 2)
    got = prefill.state_columns(module(p, spec, tmp_path), q, k, pos, qpos, lse, 0.125)
    assert (got.double() - probabilities(q, k, pos, qpos).sum(3).mean(2)).abs().max() < 1e-5


def test_a_sum_of_squares_over_a_whole_prefill(tmp_path: Path) -> None:
    grown = StatePlan("acc", const(0), reduce("max", "g", reduce("sum", "q", binary("*", attn(), attn()))))
    p = plan((Selection("top", named("state", "acc"), 1),), (grown,), layers=1, kv_heads=1, group=2)
    spec = state_spec(p, grown)
    assert spec is not None
    q, k = draw(7, 1, 2, 40, 64), draw(8, 1, 1, 40, 64)
    pos = torch.arange(40, dtype=torch.int32).reshape(1, 1, -1)
    p_n = probabilities(q, k, pos, pos[:, 0])
    lse = torch.einsum("bhqd,bnd->bhqn", q, k[:, 0]) * 0.125
    lse = lse.masked_fill(pos[:, 0][:, None, None] > pos[:, 0][:, None, :, None], float("-inf")).logsumexp(-1)
    got = prefill.state_columns(module(p, spec, tmp_path), q, k, pos, pos[:, 0].contiguous(), lse, 0.125)
    assert (got.double() - (p_n**2).sum(3).amax(2)).abs().max() < 1e-5


NORM = Expr("unary", (K,), "norm")
SPREAD = binary("/", reduce("std", "d", K), binary("+", reduce("max", "d", K), const(Fraction(1, 2))))


@pytest.mark.parametrize(
    ("formula", "written_out"),
    [
        (NORM, lambda k, pos: k.norm(dim=-1)),
        (SPREAD, lambda k, pos: k.std(-1) / (k.amax(-1) + 0.5)),
        (Expr("pair", (K, binary("*", K, K)), "cos"), lambda k, pos: torch.cosine_similarity(k, k * k, dim=-1)),
        (Expr("pair", (K, binary("-", K, const(1))), "dot"), lambda k, pos: (k * (k - 1)).sum(-1)),
        (reduce("mean", "d", Expr("unary", (K,), "sigmoid")), lambda k, pos: k.sigmoid().mean(-1)),
        (reduce("sum", "d", binary("max", K, const(0))), lambda k, pos: k.clamp(min=0).sum(-1)),
        (reduce("min", "d", Expr("unary", (K,), "abs")), lambda k, pos: k.abs().amin(-1)),
        (binary("*", NORM, binary("<", named("field", "pos"), const(20))), lambda k, pos: k.norm(dim=-1) * (pos < 20)),
    ],
    ids=["norm", "std", "cos", "dot", "sigmoid", "relu", "min", "where"],
)
def test_scores_from_keys_alone(tmp_path: Path, formula: Expr, written_out) -> None:  # type: ignore[no-untyped-def]
    k = draw(9, 1, 70, 2, 64).transpose(1, 2)
    pos = torch.arange(70, dtype=torch.int32).expand(1, 2, 70).contiguous()
    got = run(formula, tmp_path, k[:, :, :1].contiguous(), k, pos, pos[:, 0, :1].contiguous(), pos >= 0)
    assert torch.allclose(got.double(), written_out(k.double(), pos), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "width"), [("max", 7), ("avg", 5), ("max", 1)])
def test_pooling_closes_the_holes_between_candidates(tmp_path: Path, kind: str, width: int) -> None:
    formula = binary("+", pool(kind, width, reduce("mean", "g", SUM_Q)), const(1))
    q, k = draw(10, 2, 4, 8, 64), draw(11, 2, 2, 60, 64)
    pos = torch.arange(60, dtype=torch.int32).expand(2, 2, 60).contiguous()
    qpos = torch.arange(52, 60, dtype=torch.int32).expand(2, 8).contiguous()
    candidates = (draw(12, 2, 2, 60) > -0.3) & (pos < 52)
    candidates[1, 1] = False
    got = run(formula, tmp_path, q, k, pos, qpos, candidates)
    scores = probabilities(q, k, pos, qpos).sum(3).mean(2)
    for b in range(2):
        for h in range(2):
            places = candidates[b, h].nonzero().flatten().tolist()
            for c, place in enumerate(places):
                near = [float(scores[b, h, j]) for j in places[max(0, c - width // 2) : c + width // 2 + 1]]
                want = 1 + (max(near) if kind == "max" else sum(near) / width)
                assert abs(float(got[b, h, place]) - want) < 1e-5


def picked(scope: str, rank: str, floor: Fraction, scores, candidates, pos, n, groups):  # type: ignore[no-untyped-def]
    """Winners as a set of (sequence, head, column), by sorting."""
    sign = -1 if rank == "top" else 1
    won = set()
    for b in range(scores.shape[0]):
        for heads in groups:
            judged = scores[b, heads].mean(0, keepdim=True) if scope == "shared" else scores[b, heads]
            pool_, left = [], 0
            for j in range(judged.shape[0]):
                open_ = candidates[b, heads[j]].nonzero().flatten().tolist()
                ranked = sorted(
                    (
                        bool(judged[j, i].isnan()),
                        sign * float(judged[j, i].nan_to_num()),
                        int(pos[b, heads[j], i]),
                        j,
                        i,
                    )
                    for i in open_
                )
                sure = int(n * floor) if scope == "across" else 0
                won |= {(b, heads[j], i) for *_, i in ranked[:sure]}
                pool_ += ranked[sure:]
                left += n - len(ranked[:sure])
            for *_, j, i in sorted(pool_)[: max(left, 0)]:
                won |= {(b, h, i) for h in (heads if scope == "shared" else [heads[j]])}
    return won


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    scope=st.sampled_from(["head", "shared", "across"]),
    rank=st.sampled_from(["top", "bottom"]),
    n=st.integers(0, 40),
)
def test_select_takes_the_best_and_breaks_ties_by_age(tmp_path_factory, seed, scope, rank, n) -> None:  # type: ignore[no-untyped-def]
    floor = Fraction(1, 4) if scope == "across" else Fraction(0)
    term = Selection(rank, reduce("mean", "g", SUM_Q), 1, scope=scope, floor=floor)
    where = ((0, 0, 0),) if scope == "shared" else ((0, 1, 0),)
    p = plan((term,), triggers=(PREFILL_END,), layers=1, kv_heads=3, class_of=where)
    noise = torch.Generator().manual_seed(seed)
    width = random.Random(seed).choice([1, 30, 70])
    scores = (torch.randn(2, 3, width, generator=noise) * 3).round() / 3
    scores[torch.rand(2, 3, width, generator=noise) < 0.05] = float("nan")
    scores[torch.rand(2, 3, width, generator=noise) < 0.05] = float("-inf")
    scores[torch.rand(2, 3, width, generator=noise) < 0.1] *= -0.0
    candidates = torch.rand(2, 1 if scope == "shared" else 3, width, generator=noise) < 0.7
    candidates = candidates.expand(2, 3, width).contiguous()
    pos = (torch.arange(width, dtype=torch.int32) * 2).expand(2, 3, width).contiguous()
    where_ = sites(p, 0, scope != "head", CPU)[:, 1:].contiguous()
    chosen = prefill.winners(
        module(p, select_spec(p, 0, term), tmp_path_factory.mktemp("k")),
        scores,
        candidates,
        pos,
        torch.full((2, 3), n),
        where_,
    )
    groups = [[h for h in line if h >= 0] for line in where_.tolist()]
    want = picked(scope, rank, floor, scores, candidates, pos, n, groups)
    assert {tuple(x) for x in chosen.nonzero().tolist()} == want


def test_select_by_a_fraction_of_each_row(tmp_path: Path) -> None:
    term = Selection("top", reduce("mean", "g", SUM_Q), None, fraction=Fraction(3, 10))
    p = plan((term,), triggers=(PREFILL_END,), layers=1)
    scores = draw(13, 1, 2, 50)
    candidates = torch.ones(1, 2, 50, dtype=torch.bool)
    candidates[0, 1, 19:] = False
    pos = torch.arange(50, dtype=torch.int32).expand(1, 2, 50)
    heads = sites(p, 0, False, CPU)[:, 1:].contiguous()
    kernel = module(p, select_spec(p, 0, term), tmp_path)
    chosen = prefill.winners(kernel, scores, candidates, pos, torch.zeros(1, 2, dtype=torch.int64), heads)
    assert chosen.sum(2).tolist() == [[15, 5]]
    assert set(chosen[0, 0].nonzero().flatten().tolist()) == set(scores[0, 0].topk(15).indices.tolist())


@pytest.mark.parametrize("n", [1, 40, 1100])
def test_pack_appends_survivors_in_order(tmp_path: Path, n: int) -> None:
    p = plan((Region("recent", 0),), (H2O,), layers=2)
    pools = Pools(8, 40, 64)
    held = [0, 16, 5, 33]
    for row, count in enumerate(held):
        pools.fill(4 + row, list(range(count)))
    before = [pools.entries(row) for row in range(8)]
    k, v = draw(14, 2, n, 2, 64).transpose(1, 2), draw(15, 2, 2, n, 64)
    pos = torch.arange(100, 100 + n, dtype=torch.int32).expand(2, 2, n)
    frozen = (draw(16, 2, 2, n) > 0).to(torch.uint8)
    state = draw(17, 1, 2, 2, n)
    keep = draw(18, 2, 2, n) > 0.9
    keep[1, 0] = False
    prefill.append(module(p, pack_spec(p), tmp_path), pools, k, v, pos, frozen, state, keep, torch.tensor([1]))
    for row in range(4):
        assert pools.entries(row) == before[row]
        b, h = divmod(row, 2)
        new = []
        for i in keep[b, h].nonzero().flatten().tolist():
            key, value = k[b, h, i].numpy().tobytes(), v[b, h, i].numpy().tobytes()
            new.append((100 + i, int(frozen[b, h, i]), key, value, (float(state[0, b, h, i]),)))
        assert pools.entries(4 + row) == before[4 + row] + new
    pools.assert_pages_conserved()


def test_pack_into_too_small_a_pool_is_noticed(tmp_path: Path) -> None:
    p = plan((Region("recent", 0),), layers=1, kv_heads=1)
    pools = Pools(1, 2, 64, states=0)
    pools.fill(0, list(range(10)))
    before = pools.entries(0)
    k = draw(19, 1, 1, 60, 64)
    pos = torch.arange(60, dtype=torch.int32).reshape(1, 1, 60)
    flags = torch.ones(1, 1, 60, dtype=torch.uint8)
    kernel = module(p, pack_spec(p), tmp_path)
    prefill.append(kernel, pools, k, k, pos, flags, torch.zeros(0, 1, 1, 60), flags, torch.tensor([0]))
    assert pools.entries(0) == before
    with pytest.raises(KvCompileError, match="smaller than"):
        refuse_overrun(pools)
