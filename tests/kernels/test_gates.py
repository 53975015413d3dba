"""Trained block gates: what they say of units equals a plain loop over the published definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvcompile.kernels.expr import Expr
from kvcompile.kernels.gates import FORWARD, OWN, gated, inputs_of
from kvcompile.kernels.rotary import rotate
from kvcompile.kernels.rows import Queries, Rows
from kvcompile.kernels.terms import UnitPlan

KV_HEADS, GROUP, D, WIDTH, SIZE, OFFSET, MARKS = 2, 3, 8, 6, 4, 2, 2
UNIT = UnitPlan("block", SIZE, OFFSET)
KINDS = [("joined", False), ("joined", True), ("apart", False), ("apart", True), ("bare", True), ("shared k", False)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights_of(kind: str, pooled: bool = False, raw: bool = False, *, norm: bool = True) -> dict[str, Tensor]:
    """One layer's gate (layer 1) under the key `live`."""
    width = D if kind == "bare" else WIDTH
    q_heads = KV_HEADS * GROUP
    found = {
        "layers.1.k": numbers(KV_HEADS if kind in ("joined", "shared k") else q_heads, MARKS * D, width, seed=1),
        "rope": torch.tensor([1.0, 0.3, 0.05, 0.02])[: width // 2],
    }
    if kind == "joined":
        found["layers.1.q"] = numbers(KV_HEADS, GROUP * D, width, seed=2)
    elif kind != "bare":
        found["layers.1.q"] = numbers(q_heads, D, width, seed=2)
    if norm:
        found |= {"layers.1.q_norm": numbers(width, seed=3), "layers.1.k_norm": numbers(width, seed=4)}
    found |= {word: torch.zeros(()) for word, on in (("pooled", pooled), ("raw", raw)) if on}
    return {f"live:{name}": tensor for name, tensor in found.items()}


def table(places: int = 64) -> Tensor:
    angle = torch.arange(places)[:, None] * (0.5 ** torch.arange(D // 2))
    return torch.stack([angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)])


def rows_of(own: list[int], forward: list[list[int]], q: Tensor, asked: Tensor, **changes: object) -> Rows:
    """Rows that are two KV heads of one sequence, then of another; own: the position of each one's query."""
    n = len(own)
    queries = {
        OWN: Queries(q, torch.tensor(own)[:, None]),
        FORWARD: Queries(asked, torch.tensor(forward)),
    }
    there = torch.ones(n, 1, dtype=torch.bool)
    return Rows(
        torch.zeros(n, 1, dtype=torch.int64), there, there, there, torch.tensor(own), torch.zeros(n, dtype=torch.int64),
        {}, queries=queries, layer=1, heads=torch.arange(n) % KV_HEADS, rope=table(), asking=True, **changes,
    )  # fmt: skip


def turned(x: list[float], place: int, rope: Tensor) -> list[float]:
    half, out = len(x) // 2, [0.0] * len(x)
    for c in range(half):
        a = place * float(rope[c])
        out[c] = x[c] * math.cos(a) - x[c + half] * math.sin(a)
        out[c + half] = x[c + half] * math.cos(a) + x[c] * math.sin(a)
    return out


def normed(x: list[float], weight: Tensor | None) -> list[float]:
    if weight is None:
        return x
    size = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
    return [v / size * float(w) for v, w in zip(x, weight, strict=True)]


def by_hand(weights: dict[str, Tensor], kind: str, query: list[Tensor], place: int, marks: Tensor, head: int) -> list:
    """Logits of one row, [group or 1][units], from its group's queries, already pooled and unrotated."""
    part = {name.removeprefix("live:layers.1."): w for name, w in weights.items()}
    rope, out = weights["live:rope"], []
    for g in range(1 if kind == "joined" else GROUP):
        each = head * GROUP + g
        if kind == "joined":
            q = (torch.cat(query) @ part["q"][head]).tolist()
        else:
            q = query[g].tolist() if kind == "bare" else (query[g] @ part["q"][each]).tolist()
        q = turned(normed(q, part.get("q_norm")), place, rope)
        line = []
        for u in range(len(marks)):
            k = (marks[u] @ part["k"][head if kind in ("joined", "shared k") else each]).tolist()
            k = turned(normed(k, part.get("k_norm")), OFFSET + u * SIZE, rope)
            line.append(sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)))
        out.append(line)
    return out


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("kind", "pooled"), KINDS)
def test_logits_are_those_of_a_plain_loop(kind: str, pooled: bool, raw: bool) -> None:
    own, forward = [13, 13, 9, 9], [[8, 9, 10, 11, 12, 13, 14, -1]] * 2 + [[6, 7, 8, 9, 10, -1, -1, -1]] * 2
    q, asked, marks = numbers(4, GROUP, 1, D), numbers(4, GROUP, 8, D, seed=5), numbers(4, 3, MARKS * D, seed=6)
    weights = weights_of(kind, pooled, raw, norm=kind != "shared k")
    found = gated(weights, "live", rows_of(own, forward, q, asked), UNIT, marks.chunk(MARKS, -1))
    assert found.shape == (4, 1 if kind == "joined" else GROUP, 3)
    for row, at in enumerate(own):
        which = (at - OFFSET) // SIZE
        if pooled:
            same = [j for j, p in enumerate(forward[row]) if p >= 0 and (p - OFFSET) // SIZE == which]
            vectors = [(asked[row, :, j], forward[row][j]) for j in same]
        else:
            vectors = [(q[row, :, 0], at)]
        plain = [rotate(v, torch.tensor([p]), table(), back=True) if raw else v for v, p in vectors]
        mean = torch.stack(plain).mean(0)
        place = OFFSET + which * SIZE if pooled else at
        expected = by_hand(weights, kind, list(mean), place, marks[row], row % KV_HEADS)
        assert torch.allclose(found[row], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_gate_that_pools_sees_only_what_the_forward_has_of_the_unit() -> None:
    """So its choice depends on how a prompt was cut inside of a unit, and on nothing outside of it."""
    weights, marks = weights_of("apart", True), numbers(2, 3, MARKS * D, seed=6).chunk(MARKS, -1)
    q, asked = numbers(2, GROUP, 1, D), numbers(2, GROUP, 8, D, seed=5)

    def found(forward: list[int]) -> Tensor:
        return gated(weights, "live", rows_of([12, 12], [forward] * 2, q, asked), UNIT, marks)

    whole = found([6, 7, 8, 9, 10, 11, 12, 13])
    assert torch.allclose(whole, found([-1, 2, 3, 9, 10, 11, 12, 13]))
    assert not torch.allclose(whole, found([6, 7, 8, 9, -1, 11, 12, 13]))


def test_heads_of_another_process_use_their_own_maps() -> None:
    weights = weights_of("joined")
    q, asked, marks = numbers(2, GROUP, 1, D), numbers(2, GROUP, 1, D), numbers(2, 3, MARKS * D).chunk(MARKS, -1)
    both = gated(weights, "live", rows_of([9, 9], [[9]] * 2, q, asked), UNIT, marks)
    second = rows_of([9], [[9]], q[1:], asked[1:], first=1)
    assert torch.allclose(gated(weights, "live", second, UNIT, [m[1:] for m in marks]), both[1:])


def landmark(name: str) -> Expr:
    return Expr("landmark", (), ("block", name), "ud")


def pooled_keys(fn: str, field: str) -> Expr:
    return Expr("reduce", (Expr("field", (), field, "id"),), (fn, "i"), "ud")


def test_landmarks_are_told_in_the_order_of_the_score() -> None:
    unit = UnitPlan("block", 4, 0, (("lo", pooled_keys("min", "raw.k")), ("hi", pooled_keys("max", "raw.k"))))
    score = Expr("learned", (Expr("queries", (), OWN, "gqd"), landmark("hi"), landmark("lo")), "live", "gu")
    assert inputs_of(score, unit) == (("max", "min"), True)


@pytest.mark.parametrize(
    ("formulas", "reason"),
    [
        ({"a": pooled_keys("std", "k")}, "`a` is no min, max or mean"),
        ({"a": pooled_keys("mean", "v")}, "`a` is no min, max or mean"),
        ({"a": Expr("unary", (pooled_keys("mean", "k"),), "neg", "ud")}, "`a` is no min, max or mean"),
        ({"a": pooled_keys("mean", "k"), "b": pooled_keys("max", "raw.k")}, "of k and of raw.k"),
        ({}, "reads no landmark"),
    ],
)
def test_landmarks_that_no_gate_is_trained_on_are_refused(formulas: dict[str, Expr], reason: str) -> None:
    unit = UnitPlan("block", 4, 0, tuple(formulas.items()))
    with pytest.raises(ValueError, match=reason):
        inputs_of(Expr("learned", tuple(landmark(name) for name in formulas), "live", "gu"), unit)
