"""Layers of ragged rows at random, for the CPU layout, and what a test reads back of them. No code of the product's."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(
    plan: PolicyPlan, lengths: list[int], now: int, *, layer: int = 0, seed: int = 0, aligned: bool = False,
    ties: bool = False, counts: tuple[int, ...] = (), room: int = 2, idle: tuple[int, ...] = (),
) -> Site:  # fmt: skip
    """One layer with rows of these lengths at positions below `now`, in no order; every sequence takes token `now`.

    Slots that hold nothing hold NaN; sink logits are drawn, if the model has any. aligned: rows of a sequence hold the
    same positions in the same order; ties: states repeat; idle: sequences without a token and without a decision.
    """
    facts, dtype = plan.facts, getattr(torch, plan.facts.dtype)
    dice = torch.Generator().manual_seed(seed * 31 + layer)
    slots = sum(lengths) + room * len(lengths)
    k, v = (torch.full((slots, facts.head_dim), float("nan"), dtype=dtype) for _ in "kv")
    pos, frozen = torch.full((slots,), 7, dtype=torch.int32), torch.ones(slots, dtype=torch.uint8)
    state = torch.full((len(plan.states), slots), float("nan"))
    table = torch.zeros(len(lengths), 2, dtype=torch.int64)
    batch, start, places = len(lengths) // facts.kv_heads, 0, torch.zeros(0)
    for row, n in enumerate(lengths):
        at = slice(start, start + n)
        k[at], v[at] = (torch.randn(n, facts.head_dim, generator=dice).to(dtype) for _ in "kv")
        if not (aligned and row % facts.kv_heads):
            places = torch.randperm(now, generator=dice)[:n]
            places = places.sort().values if plan.classes[0].by_position else places
        pos[at], frozen[at] = places.int(), (torch.rand(n, generator=dice) < 0.2).to(torch.uint8)
        values = torch.rand(len(plan.states), n, generator=dice)
        state[:, at] = (values * 4).round() / 4 if ties else values
        table[row, 0], table[row, 1] = start, n + room
        start += n + room
    clock = torch.zeros(batch, Clock.WIDTH, dtype=torch.int64)
    clock[:, Clock.NEW], clock[:, Clock.START], clock[:, Clock.PROMPT] = 1, now, now // 2
    fires = torch.ones(len(plan.classes), batch, dtype=torch.uint8)
    clock[list(idle), Clock.NEW], fires[:, list(idle)] = 0, 0
    numbers = torch.tensor(counts or [0] * len(plan.counts)).reshape(1, -1, 1).expand(facts.layers, -1, batch)
    return Site(
        layer=torch.tensor([layer]), k=k, v=v, pos=pos, frozen=frozen, state=state,
        length=torch.tensor(lengths, dtype=torch.int32), table=table, free=torch.zeros(0, dtype=torch.int32),
        top=torch.tensor([start]), ring=torch.zeros(batch, facts.q_heads, plan.ring, facts.head_dim, dtype=dtype),
        clock=clock, counts=numbers.contiguous(), fires=fires, scalar=torch.zeros(0, len(lengths)),
        picked=torch.zeros(0, batch, facts.kv_heads, 0, dtype=torch.int32), rope=torch.zeros(2, 0, facts.head_dim),
        reach=torch.tensor([facts.reach(i) for i in range(facts.layers)], dtype=torch.int32),
        sink=noise(seed, facts.layers if facts.sinks else 0, facts.q_heads) * 3, marks=torch.zeros(0, batch, 0, 0),
        edges=torch.zeros(0, batch, 0, 0, 2, dtype=torch.int32), marked=torch.zeros(0, batch, 0, dtype=torch.int32),
        segment=torch.zeros(batch, 0, dtype=torch.int32), links=torch.zeros(batch, 0, 0, 0, dtype=torch.uint8),
    )  # fmt: skip


def cloned(site: Site) -> Site:
    return Site(*(t.clone() for t in site))


def tokens(plan: PolicyPlan, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [batch, q_heads, 1, head_dim], k, v [batch, kv_heads, 1, head_dim], laid out as a model gives them."""
    facts, dtype = plan.facts, getattr(torch, plan.facts.dtype)
    heads = (facts.q_heads, facts.kv_heads, facts.kv_heads)
    q, k, v = (noise(seed + i, batch, 1, h, facts.head_dim).to(dtype) for i, h in enumerate(heads))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rows_of(site: Site) -> list[dict[int, tuple[Tensor, Tensor, int, Tensor]]]:
    """Of each row: position -> (key, value, frozen, states)."""
    found = []
    for row, n in enumerate(site.length.tolist()):
        at = range(start := int(site.table[row, 0]), start + n)
        found.append({int(site.pos[s]): (site.k[s], site.v[s], int(site.frozen[s]), site.state[:, s]) for s in at})
        assert len(found[-1]) == n, "a position came to stand in a row twice"
    return found


def same_rows(mine: Site, truth: Site, marks: bool = True) -> None:
    """The same entries in every row, in whatever order; keys and values bit by bit, states to rounding.

    marks: whether what has won before is marked alike, which matters where some rule asks for it.
    """
    assert mine.length.tolist() == truth.length.tolist()
    for a, b in zip(rows_of(mine), rows_of(truth), strict=True):
        assert a.keys() == b.keys()
        for pos, (k, v, frozen, state) in a.items():
            assert torch.equal(k, b[pos][0]) and torch.equal(v, b[pos][1])
            assert frozen == b[pos][2] or not marks
            torch.testing.assert_close(state, b[pos][3], rtol=1e-5, atol=1e-5, equal_nan=True)
