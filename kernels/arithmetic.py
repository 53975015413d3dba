"""The arithmetic of formulas: operations, reductions and poolings that know what absence and infinities mean.

Takes and gives float32 tensors of any shape. Guarantees: x / 0 is 0, a comparison with NaN is false, and what a
mask says is absent may hold anything, because it is replaced and never multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.plan import UnitPlan

NEG_INF = float("-inf")


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros((), dtype=a.dtype, device=a.device), a / b)


def holds(x: Tensor) -> Tensor:
    """Whether a condition holds, bool: it is neither 0 nor NaN."""
    return (x != 0) & ~x.isnan()


def masked(fn: str, x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """A reduction that sees only what `mask` says is there; softmax keeps the axis. Variance is the sample variance.

    Of nothing, every reduction is 0, and so is the variance of one value.
    """
    if fn == "softmax":
        return softmax(_or_else(mask, x, NEG_INF), (dim,))
    if fn in ("min", "max"):
        fill = float("inf") if fn == "min" else NEG_INF
        out = getattr(torch, "a" + fn)(_or_else(mask, x, fill), dim, keepdim=True)
        return torch.where(mask.any(dim, keepdim=True), out, 0.0)
    total = _or_else(mask, x, 0.0).sum(dim, keepdim=True)
    if fn == "sum":
        return total
    count = mask.sum(dim, keepdim=True).float()
    mean = divide(total, count)
    if fn == "mean":
        return mean
    var = divide((_or_else(mask, x - mean, 0.0) ** 2).sum(dim, keepdim=True), count - 1)
    return var if fn == "var" else var.sqrt()


def reduced(fn: str, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A reduction over axes whose every place is there; as `masked` otherwise."""
    if fn == "softmax":
        return softmax(x, dims)
    if fn in ("min", "max"):
        return getattr(torch, "a" + fn)(x, dims, keepdim=True)
    if fn in ("var", "std") and all(x.shape[dim] == 1 for dim in dims):
        return torch.zeros_like(x)
    return getattr(torch, fn)(x, dims, keepdim=True)


def softmax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Softmax over some axes together. NaN and -inf take no mass, +inf takes all; of such alone every value is 0."""
    x = x.nan_to_num(nan=NEG_INF, posinf=torch.finfo(x.dtype).max, neginf=NEG_INF)
    if len(dims) == 1:
        return torch.softmax(x, dims[0]).nan_to_num(0.0)
    mass = (x - x.amax(dims, keepdim=True)).exp().nan_to_num(0.0)
    return divide(mass, mass.sum(dims, keepdim=True))


def pooled(kind: str, width: int, x: Tensor) -> Tensor:
    """Centred pooling of x [..., n] over its last axis; `max` ignores absent neighbours, `avg` counts them as 0."""
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    return pool(x.reshape(-1, 1, x.shape[-1]), width, 1, width // 2).reshape(x.shape)


def unary(fn: str, x: Tensor, channels: int) -> Tensor:
    """neg exp log sqrt abs sigmoid of each value, or the norm over the axis of channels, which stays with size 1."""
    if fn == "norm":
        return torch.linalg.vector_norm(x, dim=channels, keepdim=True)
    return getattr(torch, fn)(x)


def pair(fn: str, a: Tensor, b: Tensor, channels: int) -> Tensor:
    """dot or cos over the axis of channels, which stays with size 1."""
    # Not (a * b).sum(): that would hold every product of a query's and an entry's channels at once.
    dot = torch.einsum("...d,...d->...", a.movedim(channels, -1), b.movedim(channels, -1)).unsqueeze(channels)
    if fn == "dot":
        return dot
    return divide(dot, unary("norm", a, channels) * unary("norm", b, channels))


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": divide,
    "max": torch.maximum,
    "min": torch.minimum,
    "<": lambda a, b: (a < b).float(),
    "<=": lambda a, b: (a <= b).float(),
    ">": lambda a, b: (a > b).float(),
    ">=": lambda a, b: (a >= b).float(),
    "==": lambda a, b: (a == b).float(),
    "!=": lambda a, b: ((a < b) | (a > b)).float(),  # of NaN every comparison is false, this one too
    "and": lambda a, b: (holds(a) & holds(b)).float(),
    "or": lambda a, b: (holds(a) | holds(b)).float(),
}


def _or_else(mask: Tensor, x: Tensor, fill: float) -> Tensor:
    """x where the mask says so, else `fill`; no copy in the usual case that everything is there."""
    if bool(mask.all()):
        return x.expand(torch.broadcast_shapes(x.shape, mask.shape))
    return torch.where(mask, x, fill)


def unit_columns(pos: Tensor, resident: Tensor, unit: UnitPlan) -> Tensor:
    """Column of each place of each unit, int64 [rows, units, size], -1 where no entry is."""
    rows, _ = pos.shape
    place = pos - unit.offset
    inside = resident & (place >= 0)
    units = int((place[inside].max() // unit.stride + 1).item()) if inside.any() else 1
    width = (units - 1) * unit.stride + max(unit.size, unit.stride)
    table = torch.full((rows, width + 1), -1, dtype=torch.int64, device=pos.device)
    columns = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
    table.scatter_(1, torch.where(inside, place, width), columns)
    return table[:, :-1].unfold(1, unit.size, unit.stride)[:, :units]
