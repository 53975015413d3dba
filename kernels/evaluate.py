"""The meaning of a formula: evaluates `plan.Expr` on the rows of one layer, in float32, with plain torch.

Every value has all six axes `h g q u i d` (size 1 where absent), so broadcasting and reductions need
no case analysis. This is the definition that every printed kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.plan import Expr, QuerySource, UnitPlan, evidence_of, words_of

H, G, Q, U, E, D = range(6)  # E: entries, the axis i
_DIM = {"h": H, "g": G, "q": Q, "u": U, "i": E, "d": D}
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Queries:
    """Queries q [rows, group, width, head_dim] at positions pos [rows, width] (int64; -1: absent)."""

    q: Tensor
    pos: Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of one layer as padded matrices; a column is an entry, in position order where a score needs it.

    pos int64 [rows, n]; resident bool: entries that may be kept; readable bool: what a query may see (peeked
    tokens are readable, never resident); frozen bool; state name -> float32 [rows, n]; k, v [rows, n, head_dim]
    where a score asks for them; now, prompt int64 [rows].
    """

    pos: Tensor
    resident: Tensor
    readable: Tensor
    frozen: Tensor
    now: Tensor
    prompt: Tensor
    state: dict[str, Tensor]
    scale: float = 1.0
    k: Tensor | None = None
    v: Tensor | None = None
    queries: dict[QuerySource, Queries] | None = None
    attn: Tensor | None = None  # probabilities of this forward's queries, [rows, group, q, n], where known already

    def one(self, row: int) -> Rows:
        """The same for a single row."""
        cut = slice(row, row + 1)
        return replace(
            self,
            **{name: getattr(self, name)[cut] for name in ("pos", "resident", "readable", "frozen", "now", "prompt")},
            state={name: s[cut] for name, s in self.state.items()},
            k=None if self.k is None else self.k[cut],
            v=None if self.v is None else self.v[cut],
            queries=None
            if self.queries is None
            else {s: Queries(x.q[cut], x.pos[cut]) for s, x in self.queries.items()},
            attn=None if self.attn is None else self.attn[cut],
        )


def evidence(rows: Rows, source: QuerySource, kind: str) -> Tensor:
    """Attention of each query of `source` to each entry: [rows, group, q, n], float32.

    `attn` is the softmax over all that the query may read, `logit` the scaled logit; what a query may
    not read has attn 0 and logit -inf.
    """
    if kind == "attn" and source.kind == "forward" and rows.attn is not None:
        return rows.attn
    assert rows.queries is not None and rows.k is not None
    queries = rows.queries[source]
    logits = torch.einsum("hgqd,hnd->hgqn", queries.q.float(), rows.k.float()) * rows.scale
    seen = rows.readable[:, None, None, :] & (rows.pos[:, None, None, :] <= queries.pos[:, None, :, None])
    logits = logits.masked_fill(~seen, NEG_INF)
    if kind == "logit":
        return logits
    return torch.softmax(logits, -1).nan_to_num(0.0)


def score(expr: Expr, rows: Rows, candidates: Tensor, unit: UnitPlan | None = None) -> Tensor:
    """One float32 per entry, [rows, n]; meaningless outside `candidates` (bool [rows, n]).

    Rows are taken one at a time where attention is asked for and no axis `h` ties them: the
    probabilities of one KV head at a time are all that memory has to hold.
    """
    nodes = expr.walk()
    tied = any(n.op == "reduce" and words_of(n)[1] == "h" for n in nodes)
    if not tied and any(n.op == "evidence" for n in nodes) and rows.pos.shape[0] > 1:
        return torch.cat([score(expr, rows.one(r), candidates[r : r + 1], unit) for r in range(rows.pos.shape[0])])
    return _Evaluator(rows, candidates, unit)(expr)


class _Evaluator:
    def __init__(self, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> None:
        self.rows = rows
        self.candidates = candidates
        self.unit = unit
        self.columns = None if unit is None else unit_columns(rows.pos, rows.resident, unit)
        self.alive = self._arrange(rows.resident[:, None, None, :, None]).bool()
        self.memo: dict[Expr, Tensor] = {}

    def __call__(self, expr: Expr) -> Tensor:
        value = self._value(expr)
        n, count = self.rows.pos.shape
        if self.columns is None:
            return value.expand(n, 1, 1, 1, count, 1).reshape(n, count)
        flat = torch.zeros(n, count + 1, device=value.device)
        columns = torch.where(self.columns < 0, count, self.columns)
        units, size = columns.shape[1:]
        value = value.expand(n, 1, 1, units, size, 1).reshape(n, units * size)
        return flat.scatter(1, columns.reshape(n, -1), value)[:, :count]

    def _value(self, expr: Expr) -> Tensor:
        if expr not in self.memo:
            self.memo[expr] = getattr(self, "_" + expr.op)(expr)
        return self.memo[expr]

    def _arrange(self, entries: Tensor) -> Tensor:
        """[rows, G, Q, n, D] as [rows, G, Q, U, I, D]: one unit that is the whole row, or the units of the policy."""
        if self.columns is None:
            return entries.unsqueeze(U)
        n, units, size = self.columns.shape
        index = self.columns.clamp(min=0).reshape(n, 1, 1, units * size, 1)
        index = index.expand(n, entries.shape[1], entries.shape[2], units * size, entries.shape[4])
        return entries.gather(3, index).unflatten(3, (units, size))

    def _const(self, expr: Expr) -> Tensor:
        value = expr.value
        assert isinstance(value, (Fraction, int, float))
        return torch.full((1, 1, 1, 1, 1, 1), float(value), device=self.rows.pos.device)

    def _scalar(self, expr: Expr) -> Tensor:
        known = {"now": self.rows.now, "prompt": self.rows.prompt, "len": self.rows.resident.sum(1)}
        return known[str(expr.value)].float().reshape(-1, 1, 1, 1, 1, 1)

    def _state(self, expr: Expr) -> Tensor:
        return self._arrange(self.rows.state[str(expr.value)][:, None, None, :, None])

    def _field(self, expr: Expr) -> Tensor:
        name = str(expr.value).removeprefix("next.")
        rows = self.rows
        if name in ("k", "v"):
            tensor = rows.k if name == "k" else rows.v
            assert tensor is not None
            value = self._arrange(tensor.float()[:, None, None])
        else:
            entry = rows.pos if name == "pos" else rows.now[:, None] - rows.pos
            value = self._arrange(entry.float()[:, None, None, :, None])
        if str(expr.value).startswith("next."):
            value = torch.cat([value[:, :, :, 1:], torch.zeros_like(value[:, :, :, :1])], U)
        return value

    def _landmark(self, expr: Expr) -> Tensor:
        _, name = words_of(expr)
        assert self.unit is not None
        return self._value(dict(self.unit.landmarks)[name])

    def _evidence(self, expr: Expr) -> Tensor:
        kind, source = evidence_of(expr)
        return self._arrange(evidence(self.rows, source, kind).unsqueeze(-1))

    def _mask(self, expr: Expr) -> Tensor:
        if not any(n.op == "field" and str(n.value).startswith("next.") for n in expr.walk()):
            return self.alive
        return torch.cat([self.alive[:, :, :, 1:], torch.zeros_like(self.alive[:, :, :, :1])], U)

    def _reduce(self, expr: Expr) -> Tensor:
        fn, axis = words_of(expr)
        x = self._value(expr.args[0])
        if axis == "i":
            return _masked(fn, x, self._mask(expr.args[0]), E)
        if axis == "q":
            return _masked(fn, x, self._present(expr.args[0]), Q)
        dims = (H, G) if axis == "h" else (_DIM[axis],)
        if fn == "softmax":
            return torch.softmax(x, dims[0])
        if fn in ("min", "max"):
            return getattr(torch, "a" + fn)(x, dims, keepdim=True)
        return getattr(torch, fn)(x, dims, keepdim=True)

    def _present(self, expr: Expr) -> Tensor:
        """Which of the queries that a reduction over `q` closes there really are, per row: bool, axes h and q."""
        source = _source_of_open_queries(expr)
        if source is None or self.rows.queries is None:
            return torch.ones((1, 1, 1, 1, 1, 1), dtype=torch.bool, device=self.rows.pos.device)
        return (self.rows.queries[source].pos >= 0)[:, None, :, None, None, None]

    def _pool(self, expr: Expr) -> Tensor:
        assert isinstance(expr.value, tuple)
        kind, width = str(expr.value[0]), int(expr.value[1])
        x = self._value(expr.args[0])
        rows = len(self.candidates)
        x = x.expand(rows, *x.shape[1:]).clone()
        for r in range(rows):
            order = self.candidates[r].nonzero().flatten()
            if not len(order):
                continue
            flat = x[r, ..., order, :].movedim(-2, -1).reshape(-1, 1, len(order))
            pooled = (
                F.max_pool1d(flat, width, 1, width // 2) if kind == "max" else F.avg_pool1d(flat, width, 1, width // 2)
            )
            shape = x[r, ..., order, :].movedim(-2, -1).shape
            x[r, ..., order, :] = pooled.reshape(shape).movedim(-1, -2)
        return x

    def _unary(self, expr: Expr) -> Tensor:
        x = self._value(expr.args[0])
        if expr.value == "norm":
            return torch.linalg.vector_norm(x, dim=D, keepdim=True)
        return getattr(torch, str(expr.value))(x)

    def _binary(self, expr: Expr) -> Tensor:
        a, b = (self._value(arg) for arg in expr.args)
        return _BINARY[str(expr.value)](a, b)

    def _pair(self, expr: Expr) -> Tensor:
        a, b = (self._value(arg) for arg in expr.args)
        dot = (a * b).sum(D, keepdim=True)
        if expr.value == "dot":
            return dot
        norms = torch.linalg.vector_norm(a, dim=D, keepdim=True) * torch.linalg.vector_norm(b, dim=D, keepdim=True)
        return _divide(dot, norms)


def unit_columns(pos: Tensor, resident: Tensor, unit: UnitPlan) -> Tensor:
    """Column of each place of each unit, int64 [rows, units, size], -1 where no entry is."""
    rows, _ = pos.shape
    place = pos - unit.offset
    inside = resident & (place >= 0)
    units = int((place[inside].max() // unit.size + 1).item()) if inside.any() else 1
    table = torch.full((rows, units * unit.size + 1), -1, dtype=torch.int64, device=pos.device)
    columns = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
    table.scatter_(1, torch.where(inside, place, units * unit.size), columns)
    return table[:, :-1].reshape(rows, units, unit.size)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, torch.zeros((), dtype=a.dtype, device=a.device), a / b)


def _source_of_open_queries(expr: Expr) -> QuerySource | None:
    """Whose queries the axis `q` of a formula is: that of its evidence which no reduction inside has closed."""
    if expr.op == "evidence":
        return evidence_of(expr)[1]
    if expr.op == "reduce" and words_of(expr)[1] == "q" and words_of(expr)[0] != "softmax":
        return None
    return next((found for arg in expr.args if (found := _source_of_open_queries(arg)) is not None), None)


def _masked(fn: str, x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """A reduction that sees only what `mask` says is there; softmax keeps the axis. Variance is the sample variance.

    What is not there may hold anything, infinities and NaN too, so it is replaced and never multiplied by 0.
    """
    if fn == "softmax":
        return torch.softmax(_or_else(mask, x, NEG_INF), dim).nan_to_num(0.0)
    if fn in ("min", "max"):
        fill = float("inf") if fn == "min" else NEG_INF
        out = getattr(torch, "a" + fn)(_or_else(mask, x, fill), dim, keepdim=True)
        return torch.where(mask.any(dim, keepdim=True), out, 0.0)
    total = _or_else(mask, x, 0.0).sum(dim, keepdim=True)
    if fn == "sum":
        return total
    count = mask.sum(dim, keepdim=True).float()
    mean = _divide(total, count)
    if fn == "mean":
        return mean
    var = _divide((_or_else(mask, x - mean, 0.0) ** 2).sum(dim, keepdim=True), count - 1)
    return var if fn == "var" else var.sqrt()


def _or_else(mask: Tensor, x: Tensor, fill: float) -> Tensor:
    """x where the mask says so, else `fill`; no copy in the usual case that everything is there."""
    if bool(mask.all()):
        return x.expand(torch.broadcast_shapes(x.shape, mask.shape))
    return torch.where(mask, x, fill)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": _divide,
    "max": torch.maximum,
    "min": torch.minimum,
    "<": lambda a, b: (a < b).float(),
    "<=": lambda a, b: (a <= b).float(),
    ">": lambda a, b: (a > b).float(),
    ">=": lambda a, b: (a >= b).float(),
    "==": lambda a, b: (a == b).float(),
    "!=": lambda a, b: (a != b).float(),
    "and": lambda a, b: ((a != 0) & (b != 0)).float(),
    "or": lambda a, b: ((a != 0) | (b != 0)).float(),
}
