"""Rows of entries laid out in pools of either layout, and read back as plain numbers. No code of the product's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import ClassPlan, Expr, Loser, ModelFacts, PolicyPlan, StatePlan, Trigger

PAGE = 4
COUNT = StatePlan("@count", Expr("const", (), 1), None)


def plan_of(
    losers: tuple[Loser, ...] = (), *, kv_heads: int = 2, group: int = 2, head_dim: int = 8, compact: bool = False,
    dtype: str = "float32", by_position: bool = False, ring: int = 0,
) -> PolicyPlan:  # fmt: skip
    """One layer, one class that is judged by the test itself; every entry has `@count`."""
    part = ClassPlan("some", (), (Trigger("step"),), ("@count",), by_position, losers)
    facts = ModelFacts(1, kv_heads * group, kv_heads, head_dim, dtype)
    return PolicyPlan(
        "test", "0" * 16, facts, (part,), ((0,) * kv_heads,), states=(COUNT,), page=PAGE, scalars=2, compact=compact,
        rotates=compact, query_window=ring,
    )  # fmt: skip


@dataclass(slots=True)
class Entry:
    """pos -1: without position; k, v [head_dim]; count: tokens that it stands for."""

    pos: int
    k: Tensor
    v: Tensor
    count: float = 1.0


def site_of(
    plan: PolicyPlan, rows: list[list[Entry]], *, paged: bool = False, room: int = 0, rope: Tensor | None = None
) -> Site:
    """Pools that hold these rows, row b * kv_heads + h for each sequence b; `room`: slots to spare in each row.

    Slots that hold nothing hold NaN. The clock says nothing yet.
    """
    kv_heads, width = plan.facts.kv_heads, plan.facts.head_dim
    batch = len(rows) // kv_heads
    dtype = getattr(torch, plan.facts.dtype)
    sizes = [-(-(len(row) + room) // PAGE) * PAGE for row in rows]
    slots = sum(sizes) + 3 * PAGE
    k, v = (torch.full((slots, width), float("nan"), dtype=dtype) for _ in "kv")
    pos, frozen = torch.full((slots,), -1, dtype=torch.int32), torch.full((slots,), 1, dtype=torch.uint8)
    state = torch.full((len(plan.states), slots), float("nan"))
    pages = torch.randperm(slots // PAGE, generator=torch.Generator().manual_seed(len(rows))).int()
    table = torch.zeros(len(rows), max(sizes) // PAGE, dtype=torch.int32) if paged else torch.zeros(len(rows), 2).long()
    taken = 0
    for r, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        if paged:
            held = -(-len(row) // PAGE)
            table[r, :held] = pages[taken : taken + held]
            at = [int(pages[taken + i // PAGE]) * PAGE + i % PAGE for i in range(len(row))]
            taken += held
        else:
            table[r] = torch.tensor([taken, size])
            at = list(range(taken, taken + len(row)))
            taken += size
        for slot, entry in zip(at, row, strict=True):
            k[slot], v[slot] = entry.k, entry.v
            pos[slot], frozen[slot], state[0, slot] = entry.pos, 0, entry.count
    left = pages[taken:].clone()
    return Site(
        layer=torch.zeros(1, dtype=torch.int64),
        k=k,
        v=v,
        pos=pos,
        frozen=frozen,
        state=state,
        length=torch.tensor([len(row) for row in rows], dtype=torch.int32),
        table=table,
        free=torch.cat([left, left.new_zeros(taken)]) if paged else torch.zeros(0, dtype=torch.int32),
        top=torch.tensor([len(left)], dtype=torch.int32) if paged else torch.tensor([taken]),
        ring=torch.zeros(batch, plan.facts.q_heads, plan.ring, width, dtype=dtype),
        clock=torch.zeros(batch, 6, dtype=torch.int64),
        counts=torch.zeros(1, 0, batch, dtype=torch.int64),
        fires=torch.ones(1, batch, dtype=torch.uint8),
        scalar=torch.full((plan.scalars, len(rows)), float("nan")),
        picked=torch.zeros(0, batch, kv_heads, 0, dtype=torch.int32),
        rope=torch.zeros(2, 0, width) if rope is None else rope,
        reach=torch.zeros(1, dtype=torch.int32),
        sink=torch.zeros(0, plan.facts.q_heads),
        marks=torch.zeros(0, batch, 0, 0),
        edges=torch.zeros(0, batch, 0, 0, 2, dtype=torch.int32),
        marked=torch.zeros(0, batch, 0, dtype=torch.int32),
        segment=torch.zeros(batch, 0, dtype=torch.int32),
        links=torch.zeros(batch, 0, 0, 0, dtype=torch.uint8),
    )


def entries(site: Site, row: int) -> list[Entry]:
    """A row's entries in the order in which they lie."""
    found = []
    for i in range(int(site.length[row])):
        slot = int(site.table[row, 0]) + i
        if site.paged:
            slot = int(site.table[row, i // PAGE]) * PAGE + i % PAGE
        count = float(site.state[0, slot])
        found.append(Entry(int(site.pos[slot]), site.k[slot].clone(), site.v[slot].clone(), count))
    return found


def turned(x: Tensor, place: int, base: float = 100.0) -> Tensor:
    """RoPE in float64 as RoFormer writes it, pair by pair: channels c and c + D/2 turned by place * base^(-2c/D)."""
    half = len(x) // 2
    pairs = torch.complex(x[:half].double(), x[half:].double())
    angle = place * base ** (-2 * torch.arange(half).double() / len(x))
    out = pairs * torch.polar(torch.ones(half).double(), angle)
    return torch.cat([out.real, out.imag])


def rope_table(places: int, width: int, base: float = 100.0) -> Tensor:
    """The same angles as `turned`, as the table that a site carries."""
    angle = torch.arange(places).double()[:, None] * base ** (-2 * torch.arange(width // 2).double() / width)
    return torch.stack([torch.cat([t, t], 1).float() for t in (angle.cos(), angle.sin())])
