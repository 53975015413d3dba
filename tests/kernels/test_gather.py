"""Rows out of memory: keys and queries by place, entries without position, which queries a source has."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from kvcompile.extents import ExtentStore
from kvcompile.kernels.gather import Fresh, gather_queries, gather_rows, with_queries
from kvcompile.kernels.layout import write
from kvcompile.kernels.plan import (
    ClassPlan,
    Expr,
    Loser,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    Region,
    StatePlan,
    Trigger,
)
from kvcompile.pages import PagedStore
from tests.kernels.test_evaluate import draw, value
from tests.kernels.triton_interpreted.plans import binary, const, named


def facts_of(**changes: object) -> PolicyPlan:
    part = ClassPlan("all", (), ())
    return PolicyPlan("test", "0" * 16, ModelFacts(2, 4, 2, 4), (part,), ((0, 0),) * 2, **changes)  # type: ignore[arg-type]


def turn(x: torch.Tensor, place: int, back: bool = False) -> torch.Tensor:
    """One vector of 4 channels turned by a place: channel c with channel c + 2."""
    angle = place * torch.tensor([1.0, 0.1]) * (-1 if back else 1)
    a, b = x[:2], x[2:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def angles(places: int) -> torch.Tensor:
    angle = torch.arange(float(places))[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    return torch.stack([angle.cos(), angle.sin()])


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("paged", [True, False])
def test_keys_and_queries_are_read_by_place_and_scored_as_stored(paged: bool, compact: bool) -> None:
    plan = facts_of(compact=compact, rotates=True, query_window=4)
    store = (PagedStore if paged else ExtentStore)(plan, 1, torch.float32, torch.device("cpu"))
    store.rope, held = angles(32), [[0, 3, 9, 11], [1, 2, 4, 5, 7, 11]]
    if isinstance(store, PagedStore):
        store.upper[2:] = 8
        store.commit()
    else:
        store.reserve(1, [8, 8])
    site = store.site(1)
    site.clock[0, :3] = torch.tensor([1, 0, 11])
    site.ring.copy_(draw(*site.ring.shape, seed=7))
    keys = [draw(len(pos), 4, seed=h) for h, pos in enumerate(held)]
    for h, (pos, k) in enumerate(zip(held, keys, strict=True)):
        shuffled = torch.randperm(len(pos), generator=torch.Generator().manual_seed(h))
        at = torch.tensor(pos)[shuffled]
        write(
            site,
            [site.base(2) + h],
            [len(at)],
            k[shuffled],
            k[shuffled],
            at,
            torch.zeros_like(at),
            torch.zeros(0, len(pos)),
        )
    rows, _, _ = gather_rows(plan, site, [0], [0, 1], True, 1.0)
    rows = with_queries(plan, site, [0], [0, 1], rows, {QuerySource("last", 3), QuerySource("previous", 1)}, None)
    assert rows.layer == 1 and rows.heads is not None and rows.heads.tolist() == [0, 1]
    raw = Expr("reduce", (binary("*", named("field", "raw.k"), const(1)),), ("max", "d"))
    stored, whole = value(raw, rows), rows.queries
    assert rows.k is not None and whole is not None
    for h, (pos, k) in enumerate(zip(held, keys, strict=True)):
        first = rows.pos.shape[1] - len(pos)
        for i in range(len(pos)):
            assert torch.allclose(rows.k[h, first + i], turn(k[i], i) if compact else k[i], atol=1e-6)
            flat = k[i] if compact else turn(k[i], pos[i], back=True)
            assert float(stored[h, first + i]) == pytest.approx(float(flat.max()), abs=1e-5)
        ring = site.ring[0].unflatten(0, (2, 2))
        for source, wanted in ((QuerySource("last", 3), [9, 10, 11]), (QuerySource("previous", 1), [10])):
            assert whole[source].pos[h].tolist() == wanted
            for j, p in enumerate(wanted):
                place = sum(x < p for x in pos)
                for g in range(2):
                    q = ring[h, g, p % 4]
                    assert torch.allclose(whole[source].q[h, g, j], turn(q, place) if compact else q, atol=1e-6)


def test_an_entry_without_position_is_read_as_it_is_and_weighs_its_tokens() -> None:
    loser = Loser("fold", "mean")
    part = ClassPlan("all", (Region("sink", 0),), (Trigger("step"),), losers=(loser,))
    plan = replace(facts_of(states=(StatePlan("@count", const(1), None),), compact=True), classes=(part,))
    store = ExtentStore(plan, 1, torch.float32, torch.device("cpu"))
    store.rope = angles(8)
    store.reserve(0, [4, 4])
    site, k = store.site(0), draw(2, 3, 4, seed=3)
    site.clock[0, :3] = torch.tensor([1, 0, 6])
    for h in range(2):
        at = torch.tensor([4, -1, 6])
        write(site, [h], [len(at)], k[h], k[h], at, torch.zeros_like(at), torch.tensor([[1.0, 5.0, 1.0]]))
    rows, _, _ = gather_rows(plan, site, [0], [0, 1], True, 1.0)
    assert rows.pos.tolist() == [[-1, 4, 6]] * 2
    assert rows.k is not None and rows.bias is not None
    assert torch.allclose(rows.bias, torch.tensor([[5.0, 1.0, 1.0]] * 2).log())
    for h in range(2):
        assert torch.equal(rows.k[h, 0], k[h, 1])
        assert torch.allclose(rows.k[h, 1], k[h, 0], atol=1e-6)  # place 0
        assert torch.allclose(rows.k[h, 2], turn(k[h, 2], 1), atol=1e-6)


@pytest.mark.parametrize("part", [Fraction(1, 20), Fraction(2, 5), Fraction(1)])
def test_sampled_queries_are_spread_over_positions(part: Fraction) -> None:
    plan = facts_of(query_window=1)
    store = ExtentStore(plan, 1, torch.float32, torch.device("cpu"))
    site, q = store.site(0), draw(2, 2, 30, 4, seed=3)
    fresh = Fresh(q, q[:, 0], q[:, 0], torch.zeros(0, 2, 30), 30, 7)
    site.clock[0, :3] = torch.tensor([30, 0, 7])
    found = gather_queries(site, [0], [0, 1], 2, QuerySource("sample", 0, part), fresh)
    wanted = [t for t in range(7, 37) if t * part // 1 > (t - 1) * part // 1]
    assert found.pos.tolist() == [wanted, wanted]
    assert torch.equal(found.q, q[:, :, [t - 7 for t in wanted]])
    site.clock[0, :3] = torch.tensor([1, 0, 9])
    assert gather_queries(site, [0], [0], 2, QuerySource("sample", 0, Fraction(1, 20)), None).pos.tolist() == [[-1]]
