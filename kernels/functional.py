"""A second meaning of formulas: masked tensor math of fixed shapes, which any tensor compiler can take.

Takes `plan.Expr` and one layer's rows as plain tensors in any order of entries; gives one value per entry. Guarantees:
nothing depends on data but values (no sort, no gather, no branch), so that it traces; equal to `evaluate` up to
rounding, which tests hold. What has no such form raises `NotFunctional` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from kvcompile.kernels.arithmetic import BINARY, NEG_INF, divide, pair, softmax, unary
from kvcompile.kernels.formulas import is_0_unread, open_sources
from kvcompile.kernels.plan import Expr, QuerySource, evidence_of, source_of, words_of

H, G, Q, E, D = range(5)  # E: entries, the axis i
_DIM = {"g": G, "q": Q, "i": E, "d": D}


class NotFunctional(Exception):
    """This has no form with fixed shapes; the message is a noun phrase that says what."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Queries q [heads, group, m, head_dim] at positions at int64 [m], -1 where a query is absent."""

    q: Tensor
    at: Tensor


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of some KV heads; a column is an entry, in any order.

    k, v [heads, n, head_dim]; pos int64 [heads, n]; there bool [heads, n], columns that hold an entry; state name ->
    float32 [heads, n]; scalars: int64 [] each; asking: whose queries formulas may ask for; cap: of logits, 0: none.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    there: Tensor
    scale: float
    cap: float = 0.0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    asking: Mapping[QuerySource, Asking] = field(default_factory=dict)


def seen(columns: Columns, asking: Asking) -> Tensor:
    """Which entries each query may read: bool [heads, m, n]."""
    earlier = columns.pos[:, None, :] <= asking.at[None, :, None]
    return columns.there[:, None, :] & earlier & (asking.at >= 0)[None, :, None]


def attention(columns: Columns, asking: Asking, kind: str = "attn") -> Tensor:
    """Probabilities of each query over the entries it may read, or its scaled logits: float32 [heads, group, m, n].

    What a query may not read has probability 0 and logit -inf.
    """
    logits = torch.einsum("hgqd,hnd->hgqn", asking.q.float(), columns.k.float()) * columns.scale
    if columns.cap:
        logits = columns.cap * torch.tanh(logits / columns.cap)
    may = seen(columns, asking)[:, None]
    logits = torch.where(may, logits, NEG_INF)
    if kind == "logit":
        return logits
    return torch.where(may, torch.softmax(logits, -1), 0.0)


def formula(expr: Expr, columns: Columns, candidates: Tensor, *, groups: bool = False, causal: bool = False) -> Tensor:
    """One float32 per entry, [heads, n], meaningless outside `candidates`; [heads, g, n] with `groups`, g left open.

    causal: as in `evaluate.score`. Raises NotFunctional.
    """
    value = _Formulas(columns, candidates, causal).value(expr)
    heads, n = columns.pos.shape
    flat = value.expand(heads, value.shape[G], value.shape[Q], n, 1)[:, :, 0, :, 0]
    return flat if groups else flat[:, 0]


def masked(fn: str, x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """A reduction over what `mask` says is there, the axis kept with size 1 (softmax: kept); of nothing it is 0."""
    mask, x = torch.broadcast_tensors(mask, x)
    if fn == "softmax":
        return softmax(torch.where(mask, x, NEG_INF), (dim,))
    if fn in ("min", "max"):
        fill = NEG_INF if fn == "max" else -NEG_INF
        filled = torch.where(mask, x, fill)
        out = torch.amax(filled, dim, keepdim=True) if fn == "max" else torch.amin(filled, dim, keepdim=True)
        return torch.where(mask.sum(dim, keepdim=True) > 0, out, 0.0)
    total = torch.where(mask, x, 0.0).sum(dim, keepdim=True)
    if fn == "sum":
        return total
    count = mask.sum(dim, keepdim=True).float()
    mean = divide(total, count)
    if fn == "mean":
        return mean
    spread = torch.where(mask, x - mean, 0.0)
    var = divide((spread * spread).sum(dim, keepdim=True), count - 1)
    return var if fn == "var" else var.sqrt()


class _Formulas:
    """Values with the five axes h g q i d, size 1 where absent."""

    def __init__(self, columns: Columns, candidates: Tensor, causal: bool) -> None:
        self.columns, self.candidates, self.causal = columns, candidates, causal
        self.memo: dict[Expr, Tensor] = {}

    def value(self, expr: Expr) -> Tensor:
        if expr not in self.memo:
            made = getattr(self, "_" + expr.op, None)
            if made is None:
                raise NotFunctional(_LACKING.get(expr.op, f"`{expr.op}` in a formula"))
            self.memo[expr] = made(expr)
        return self.memo[expr]

    # -- leaves ------------------------------------------------------------------------------------------------

    def _const(self, expr: Expr) -> Tensor:
        assert isinstance(expr.value, (Fraction, int, float))
        return torch.full((1, 1, 1, 1, 1), float(expr.value))

    def _scalar(self, expr: Expr) -> Tensor:
        if expr.value == "len":
            return self.columns.there.sum(1).float()[:, None, None, None, None]
        return self.columns.scalars[str(expr.value)].float().reshape(1, 1, 1, 1, 1)

    def _state(self, expr: Expr) -> Tensor:
        return _per_entry(self.columns.state[str(expr.value)])

    def _field(self, expr: Expr) -> Tensor:
        name, columns = str(expr.value), self.columns
        if name in ("k", "v"):
            return (columns.k if name == "k" else columns.v).float()[:, None, None]
        if name in ("pos", "age"):
            return _per_entry(columns.pos if name == "pos" else columns.scalars["now"] - columns.pos)
        if name == "count":  # no entry stands for more than one token where losers leave nothing behind
            return _per_entry(torch.ones_like(columns.pos))
        raise NotFunctional(f"the field `{name}`")

    def _queries(self, expr: Expr) -> Tensor:
        source = source_of(expr)
        assert source is not None
        return self.columns.asking[source].q.float()[:, :, :, None]

    def _evidence(self, expr: Expr) -> Tensor:
        kind, source = evidence_of(expr)
        return attention(self.columns, self.columns.asking[source], kind)[..., None]

    # -- reductions --------------------------------------------------------------------------------------------

    def _reduce(self, expr: Expr) -> Tensor:
        fn, axis = words_of(expr)
        (arg,) = expr.args
        x = self.value(arg)
        if axis == "i":
            there = self.columns.there[:, None, None, :, None]
            return masked(fn, x, there & self._readers(arg) if self.causal else there, E)
        if axis == "q":
            return masked(fn, x, self._present(arg), Q)
        if axis == "u":
            raise NotFunctional("a reduction over units")
        if axis == "h":  # over query heads: KV heads and their groups together
            if fn == "softmax":
                return softmax(x, (H, G))
            merged = x.flatten(H, G)[None].transpose(0, 1)  # [heads * g, 1, q, i, d]
            return masked(fn, merged, torch.ones_like(merged, dtype=torch.bool), H)
        return masked(fn, x, torch.ones_like(x, dtype=torch.bool), _DIM[axis])

    def _present(self, arg: Expr) -> Tensor:
        """Which queries a reduction over them has, bool with axes h q i."""
        there = torch.ones((1, 1, 1, 1, 1), dtype=torch.bool)
        for source in sorted(open_sources(arg), key=lambda s: (s.kind, s.width)):
            there = there & (self.columns.asking[source].at >= 0)[None, None, :, None, None]
        return there & self._readers(arg) if self.causal and not is_0_unread(arg) else there

    def _readers(self, arg: Expr) -> Tensor:
        """Which of a formula's queries could read which entry: bool with axes h q i."""
        sources = open_sources(arg) or set(self.columns.asking)
        at = self.columns.asking[min(sources, key=lambda s: s.kind)].at
        return (self.columns.pos[:, None, :] <= at[None, :, None])[:, None, :, :, None]

    def _pool(self, expr: Expr) -> Tensor:
        """Neighbours in the order of positions are those of near rank: ranks are counted, nothing is moved."""
        assert isinstance(expr.value, tuple)
        kind, width = str(expr.value[0]), int(expr.value[1])
        pos, candidates = self.columns.pos, self.candidates
        rank = (candidates[:, None, :] & (pos[:, None, :] < pos[:, :, None])).sum(2)
        near = candidates[:, None, :] & ((rank[:, None, :] - rank[:, :, None]).abs() <= width // 2)
        x = self.value(expr.args[0])
        x = x.expand(pos.shape[0], *x.shape[1:E], pos.shape[1], x.shape[D])
        table = near[:, None, None, :, None, :]  # h g q i d j
        around = x.transpose(E, D)[:, :, :, None]  # h g q 1 d j
        if kind == "max":
            return torch.amax(torch.where(table, around, NEG_INF), 5)
        return torch.where(table, around, 0.0).sum(5) / width

    # -- elementwise -------------------------------------------------------------------------------------------

    def _unary(self, expr: Expr) -> Tensor:
        x = self.value(expr.args[0])
        if expr.value == "norm":
            return (x * x).sum(D, keepdim=True).sqrt()
        return unary(str(expr.value), x, D)

    def _binary(self, expr: Expr) -> Tensor:
        a, b = (self.value(arg) for arg in expr.args)
        return BINARY[str(expr.value)](a, b)

    def _pair(self, expr: Expr) -> Tensor:
        a, b = (self.value(arg) for arg in expr.args)
        return pair(str(expr.value), a, b, D)


def _per_entry(values: Tensor) -> Tensor:
    """[heads, n] as a value."""
    return values.float()[:, None, None, :, None]


_LACKING = {
    "noise": "noise, which hashes its place",
    "learned": "a trained score, which needs its weights",
    "landmark": "landmarks of units",
    "sim": "likeness to a survivor",
    "ema": "a number that a row keeps between decisions",
    "share": "a share of a total",
}
