"""Plans written by hand, and pools whose rows a test can read: no kernel and no reference code in here."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from kvcompile.kernels.headers import header_for
from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    Region,
    Selection,
    StatePlan,
    Trigger,
)
from kvcompile.kernels.render import load, render, write
from kvcompile.kernels.spec import KernelSpec

PAGE = 16


def no_interpreter() -> str:
    """Why Triton's interpreter cannot run here; empty where it can.

    Triton 3.6 turns arrays of one element into numbers in a way that numpy 2.4 has ceased to allow.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    versions = [tuple(int(x) for x in metadata.version(name).split(".")[:2]) for name in ("triton", "numpy")]
    return "the interpreter of triton 3.6 needs numpy < 2.4" if versions[0] < (3, 7) and versions[1] >= (2, 4) else ""


STEP, PREFILL_END = Trigger("step"), Trigger("prefill.end")


def const(x: float | Fraction) -> Expr:
    return Expr("const", (), Fraction(x))


def reduce(fn: str, axis: str, x: Expr) -> Expr:
    return Expr("reduce", (x,), (fn, axis))


def binary(op: str, a: Expr, b: Expr) -> Expr:
    return Expr("binary", (a, b), op)


def attn(kind: str = "forward", width: int = 0, what: str = "attn") -> Expr:
    return Expr("evidence", (), (what, QuerySource(kind, width)), "gqi")  # type: ignore[arg-type]


def named(op: str, name: str) -> Expr:
    return Expr(op, (), name)


ACC = named("state", "acc")
H2O = StatePlan("acc", const(0), reduce("mean", "g", reduce("sum", "q", attn())))
COUNTS = (Count("local", const(8)), Count("heavy", const(12)))


def plan(
    keep: tuple[Region | Selection, ...],
    states: tuple[StatePlan, ...] = (),
    *,
    triggers: tuple[Trigger, ...] = (STEP,),
    layers: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    dtype: str = "float32",
    by_position: bool = False,
    class_of: tuple[tuple[int, ...], ...] | None = None,
    page: int = PAGE,
) -> PolicyPlan:
    """One class `some` that keeps what is asked; heads of class 1 keep all."""
    some = ClassPlan("some", keep, triggers, tuple(s.name for s in states), by_position)
    rest = ClassPlan("rest", (Region("all"),), ())
    facts = ModelFacts(layers, kv_heads * group, kv_heads, head_dim, dtype)
    where = class_of or ((0,) * kv_heads,) * layers
    return PolicyPlan("test", "0" * 16, facts, (some, rest), where, COUNTS, states=states, page=page)


def varied(p: PolicyPlan, cap: float = 0.0, sinks: bool = False, windows: tuple[int, ...] = ()) -> PolicyPlan:
    """The same plan for a model whose attention has these variants."""
    return replace(p, facts=replace(p.facts, softcap=cap, sinks=sinks, windows=windows))


def sliding(p: PolicyPlan, windows: tuple[int, ...]) -> PolicyPlan:
    """The plan for a model whose layers have these windows, none of them 0; its class gets the trigger for it."""
    first, *rest = p.classes
    slides = replace(first, triggers=(*first.triggers, Trigger("slide", 1)))
    return varied(replace(p, classes=(slides, *rest)), windows=windows)


def module(p: PolicyPlan, spec: KernelSpec, place: Path) -> ModuleType:
    """The kernel of a spec, rendered, written and imported."""
    return load(write(render(spec, header_for(p, spec)), place / f"{spec.name}_{spec.digest()}.py"))


@dataclass
class Pools:
    """Paged pools filled at random, with the tensors' names as launchers want them."""

    rows: int
    pages: int
    head_dim: int
    states: int = 1
    dtype: torch.dtype = torch.float32
    spare: int = 8
    seed: int = 0
    page: int = PAGE
    noise: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        n_pages = self.rows * self.pages // 2 + self.spare
        slots = n_pages * self.page
        self.noise = torch.Generator().manual_seed(self.seed)
        self.k = torch.full((slots, self.head_dim), 7.0, dtype=self.dtype)
        self.v = torch.full((slots, self.head_dim), 7.0, dtype=self.dtype)
        self.pos = torch.full((slots,), -1, dtype=torch.int32)
        self.frozen = torch.full((slots,), 1, dtype=torch.uint8)
        self.state = torch.full((self.states, slots), 7.0)
        self.table = torch.full((self.rows, self.pages), 1 << 30, dtype=torch.int32)  # never to be followed
        self.length = torch.zeros(self.rows, dtype=torch.int32)
        self.free = torch.randperm(n_pages, generator=self.noise).int()
        self.top = torch.tensor([n_pages], dtype=torch.int32)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.noise).to(self.dtype)

    def fill(self, row: int, positions: list[int], frozen: list[int] | None = None, ties: bool = False) -> None:
        """Give a row entries at these positions, in this order."""
        count = len(positions)
        for place in range(-(-count // self.page)):
            self.top -= 1
            self.table[row, place] = self.free[int(self.top)]
        self.length[row] = count
        at = self.slots(row)
        self.k[at], self.v[at] = self.randn(count, self.head_dim), self.randn(count, self.head_dim)
        self.pos[at] = torch.tensor(positions, dtype=torch.int32)
        self.frozen[at] = torch.tensor(frozen or [0] * count, dtype=torch.uint8)
        values = torch.rand(self.states, count, generator=self.noise)
        self.state[:, at] = (values * 4).round() / 4 if ties else values

    def slots(self, row: int) -> torch.Tensor:
        i = torch.arange(int(self.length[row]))
        return self.table[row, i // self.page].long() * self.page + i % self.page

    def entries(self, row: int) -> list[tuple[int, int, bytes, bytes, tuple[float, ...]]]:
        """(position, frozen, key, value, states) of each entry, in the row's order."""
        return [
            (
                int(self.pos[s]),
                int(self.frozen[s]),
                self.k[s].numpy().tobytes(),
                self.v[s].numpy().tobytes(),
                tuple(self.state[:, s].tolist()),
            )
            for s in self.slots(row).tolist()
        ]

    def assert_pages_conserved(self) -> None:
        """Each page is free or held by one row, once."""
        held = self.free[: int(self.top)].tolist()
        for row in range(self.rows):
            held += self.table[row, : -(-int(self.length[row]) // self.page)].tolist()
        assert sorted(held) == list(range(len(self.free)))


def shuffled(n: int, seed: int) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order
