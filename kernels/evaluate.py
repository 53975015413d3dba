"""The meaning of a formula: evaluates `plan.Expr` on the rows of one layer, in float32, with plain torch.

Every value has all six axes `h g q u i d` (size 1 where absent), so broadcasting and reductions need
no case analysis. This is the definition that every printed kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from kvcompile.kernels.arithmetic import BINARY, NEG_INF, divide, masked, pair, pooled, reduced, unary, unit_columns
from kvcompile.kernels.formulas import is_0_unread, open_sources, sources_of, ties_heads, ties_queries
from kvcompile.kernels.gates import gated
from kvcompile.kernels.learned import retained
from kvcompile.kernels.noise import gumbel
from kvcompile.kernels.plan import Expr, QuerySource, UnitPlan, evidence_of, source_of, words_of
from kvcompile.kernels.rotary import rotate
from kvcompile.kernels.rows import Queries, Rows, as_read_by, readable_by
from kvcompile.kernels.units import seen_until

H, G, Q, U, E, D = range(6)  # E: entries, the axis i
_DIM = {"h": H, "g": G, "q": Q, "u": U, "i": E, "d": D}
FORWARD = QuerySource("forward")
WIDE = 1 << 22  # values of one formula's node that are held at a time, where queries can be taken apart
NEAR = 1 << 18  # the same where rows can: what a core's cache holds, beyond which rows are faster one by one

Leaves = Mapping[tuple[str, object], Tensor]


def evidence(rows: Rows, source: QuerySource, kind: str) -> Tensor:
    """Attention of each query of `source` to each entry: [rows, group, q, n], float32.

    `attn` is the softmax over all that the query may read, `logit` the scaled logit; what a query may
    not read has attn 0 and logit -inf.
    """
    if kind == "attn" and source.kind == "forward" and rows.attn is not None:
        return rows.attn
    assert rows.queries is not None and rows.k is not None
    queries, rows = rows.queries[source], as_read_by(rows, source)
    logits = attention_logits(rows, queries.q, queries.pos)
    if rows.narrow is not None and source.kind in ("forward", "sample"):
        logits = logits.masked_fill(~rows.narrow(rows, queries), NEG_INF)
    return logits if kind == "logit" else attention_weights(rows, logits).nan_to_num(0.0)


def attention_logits(rows: Rows, q: Tensor, pos: Tensor) -> Tensor:
    """Logits as the softmax takes them, float32 [rows, group, q, n], -inf where a query may not read.

    q [rows, group, q, head_dim] at pos int64 [rows, q].
    """
    assert rows.k is not None
    logits = torch.einsum("hgqd,hnd->hgqn", q.float(), rows.k.float()) * rows.scale
    if rows.cap:
        logits = rows.cap * torch.tanh(logits / rows.cap)
    if rows.bias is not None:
        logits = logits + rows.bias[:, None, None, :]
    return logits.masked_fill(~readable_by(rows, pos)[:, None], NEG_INF)


def attention_weights(rows: Rows, logits: Tensor) -> Tensor:
    """The softmax over entries of logits [rows, group, q, n] and over the sinks, which take their part of it."""
    if rows.sink is None:
        return torch.softmax(logits, -1)
    sink = rows.sink[:, :, None, None].expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]


def score(
    expr: Expr,
    rows: Rows,
    candidates: Tensor,
    unit: UnitPlan | None = None,
    *,
    groups: bool = False,
    leaves: Leaves | None = None,
    among: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """One float32 per entry, [rows, n]; meaningless outside `candidates` (bool [rows, n]).

    groups: the axis g is left open, [rows, g, n] (g = 1 where the formula reads no query heads). leaves: values of
    leaves that rows do not hold, by (op, value): [rows] or [rows, n]. among: bool [rows, n], the entries that
    reductions over i run over; without it all that are resident. causal: for a query there are only the entries
    that it could read, and for an entry only the queries that could read it.
    """
    count = rows.pos.shape[0]
    if count > 1 and not ties_heads(expr) and _held(expr, rows) > NEAR:
        # The values of one KV head at a time are all that memory and cache have to hold.
        return torch.cat(
            [
                score(
                    expr, rows.one(r), candidates[r : r + 1], unit, groups=groups, leaves=_row_of(leaves, r),
                    among=None if among is None else among[r : r + 1], causal=causal,
                )
                for r in range(count)
            ]
        )  # fmt: skip
    return _Evaluator(rows, candidates, unit, leaves or {}, among, causal).entries(expr, groups)


def number(expr: Expr, rows: Rows, leaves: Leaves | None = None) -> Tensor:
    """One float32 per row, [rows]; the mean over query heads and queries where they are left over."""
    count = rows.pos.shape[0]
    if count > 1 and not ties_heads(expr) and _held(expr, rows) > NEAR:
        return torch.cat([number(expr, rows.one(r), _row_of(leaves, r)) for r in range(count)])
    return _Evaluator(rows, rows.resident, None, leaves or {}, None, False).number(expr)


def landmarks_of(rows: Rows, unit: UnitPlan, formulas: list[Expr]) -> Tensor:
    """What formulas say of each unit of rows in position order: float32 [rows, units, numbers], 0 where none has."""
    evaluator = _Evaluator(rows, rows.resident, unit, {}, None, False)
    units = evaluator.alive.shape[U]
    found = [evaluator._value(expr)[:, 0, 0, :, 0].expand(len(rows.pos), units, -1) for expr in formulas]
    return torch.cat(found, -1)


def _held(expr: Expr, rows: Rows) -> int:
    """How many values the widest of a formula's nodes has, one for each query head, query and entry."""
    asked = sources_of([expr])
    queries = [found.q for source, found in (rows.queries or {}).items() if source in asked]
    return rows.pos.numel() * max((q.shape[1] * q.shape[2] for q in queries), default=0)


def _row_of(leaves: Leaves | None, row: int) -> Leaves | None:
    return leaves if leaves is None else {key: value[row : row + 1] for key, value in leaves.items()}


class _Evaluator:
    def __init__(
        self, rows: Rows, candidates: Tensor, unit: UnitPlan | None, leaves: Leaves, among: Tensor | None, causal: bool
    ) -> None:
        self.rows, self.candidates, self.unit = rows, candidates, unit
        self.leaves, self.among, self.causal = leaves, among, causal
        self.columns = None if unit is None else unit_columns(rows.pos, rows.resident, unit)
        there = rows.resident if among is None else among
        self.alive = self._arrange(there[:, None, None, :, None])
        if self.columns is not None and unit is not None:
            self.alive = self.alive & (self.columns >= 0)[:, None, None, :, :, None]
            if rows.asking:
                last = unit.offset + torch.arange(self.columns.shape[1], device=rows.pos.device) * unit.stride
                seen = last + unit.size - 1 <= seen_until(rows)[:, None]
                self.alive = self.alive & seen[:, None, None, :, None, None]
        self.memo: dict[Expr, Tensor] = {}

    def entries(self, expr: Expr, groups: bool) -> Tensor:
        """A formula's value for each entry, see `score`."""
        value = self._value(expr)
        rows, count = self.rows.pos.shape
        open_ = value.shape[G]
        flat = self._by_entry(value.expand(rows, open_, 1, *value.shape[U:E], value.shape[E], 1))[:, :, 0, :, 0]
        flat = flat.expand(rows, open_, count)
        return flat if groups else flat.squeeze(1)

    def number(self, expr: Expr) -> Tensor:
        """A formula's value for each row, see `number`."""
        value = self._value(expr)
        if value.shape[Q] > 1 or open_sources(expr):
            value = masked("mean", value, self._present(expr), Q)
        value = value.mean(G, keepdim=True)
        return value.expand(len(self.rows.pos), 1, 1, 1, 1, 1).reshape(-1)

    def _value(self, expr: Expr) -> Tensor:
        if expr not in self.memo:
            given = self.leaves.get((expr.op, expr.value))
            if given is not None:
                self.memo[expr] = _per_row(given) if given.ndim == 1 else self._per_entry(given)
            else:
                self.memo[expr] = getattr(self, "_" + expr.op)(expr)
        return self.memo[expr]

    # -- entries in rows, entries in units ---------------------------------------------------------------------

    def _arrange(self, entries: Tensor) -> Tensor:
        """[rows, G, Q, n, D] as [rows, G, Q, U, I, D]: one unit that is the whole row, or the units of the policy."""
        if self.columns is None:
            return entries.unsqueeze(U)
        n, units, size = self.columns.shape
        index = self.columns.clamp(min=0).reshape(n, 1, 1, units * size, 1)
        index = index.expand(n, entries.shape[1], entries.shape[2], units * size, entries.shape[4])
        return entries.gather(3, index).unflatten(3, (units, size))

    def _by_entry(self, value: Tensor) -> Tensor:
        """Back from [rows, G, Q, U, I, D] to [rows, G, Q, n, D]; 0 for entries of no unit."""
        if self.columns is None:
            return value.squeeze(U)
        count = self.rows.pos.shape[1]
        rows, units, size = self.columns.shape
        value = value.expand(rows, *value.shape[1:U], units, size, value.shape[D]).flatten(U, E)
        columns = torch.where(self.columns < 0, count, self.columns).reshape(rows, 1, 1, -1, 1).expand_as(value)
        flat = torch.zeros(*value.shape[:U], count + 1, value.shape[-1], device=value.device)
        return flat.scatter(3, columns, value)[:, :, :, :count]

    def _per_entry(self, entries: Tensor) -> Tensor:
        """[rows, n] as a value."""
        return self._arrange(entries.float()[:, None, None, :, None])

    # -- leaves ------------------------------------------------------------------------------------------------

    def _const(self, expr: Expr) -> Tensor:
        value = expr.value
        assert isinstance(value, (Fraction, int, float))
        return torch.full((1, 1, 1, 1, 1, 1), float(value), device=self.rows.pos.device)

    def _scalar(self, expr: Expr) -> Tensor:
        rows = self.rows
        if expr.value == "len":
            return _per_row(rows.resident.sum(1))
        known = {"now": rows.now, "prompt": rows.prompt, "step": rows.step, "chunk": rows.chunk}
        value = known[str(expr.value)]
        assert value is not None
        return _per_row(value)

    def _state(self, expr: Expr) -> Tensor:
        return self._per_entry(self.rows.state[str(expr.value)])

    def _field(self, expr: Expr) -> Tensor:
        name, rows = str(expr.value).removeprefix("next."), self.rows
        if name in ("k", "v", "raw.k"):
            tensor = {"k": rows.k, "v": rows.v, "raw.k": self._stored_keys()}[name]
            assert tensor is not None
            value = self._arrange(tensor.float()[:, None, None])
        elif name == "count":
            value = self._per_entry(rows.state.get("@count", torch.ones_like(rows.pos)))
        else:
            value = self._per_entry(rows.pos if name == "pos" else rows.now[:, None] - rows.pos)
        if str(expr.value).startswith("next."):
            value = torch.cat([value[:, :, :, 1:], torch.zeros_like(value[:, :, :, :1])], U)
        return value

    def _stored_keys(self) -> Tensor | None:
        """Keys without rotation: as stored, or turned back by their original positions."""
        rows = self.rows
        if rows.compact or rows.k is None or rows.rope is None:
            return rows.raw
        return rotate(rows.k.float(), rows.pos.clamp(min=0), rows.rope, back=True)

    def _queries(self, expr: Expr) -> Tensor:
        rows = self.rows
        if rows.own is not None:
            return self._arrange(rows.own.float().unsqueeze(2))
        source = source_of(expr)
        assert rows.queries is not None and source is not None
        return rows.queries[source].q.float()[:, :, :, None, None, :]

    def _evidence(self, expr: Expr) -> Tensor:
        kind, source = evidence_of(expr)
        return self._arrange(evidence(self.rows, source, kind).unsqueeze(-1))

    def _noise(self, expr: Expr) -> Tensor:
        rows, source = self.rows, source_of(expr)
        assert isinstance(expr.value, tuple) and source is not None
        assert rows.queries is not None and rows.heads is not None
        queries = rows.queries[source]
        heads = rows.heads + rows.first
        values = gumbel(int(expr.value[0]), rows.layer, heads, queries.q.shape[1], queries.pos, rows.pos)
        return self._arrange(values.unsqueeze(-1))

    def _learned(self, expr: Expr) -> Tensor:
        assert self.rows.weights is not None
        if "u" in expr.axes:
            return self._gate(expr)
        inputs = [self._by_entry(self._value(arg))[:, :, 0] for arg in expr.args]
        across = self.rows.across
        if across is None:
            return self._per_entry(retained(self.rows.weights, str(expr.value), self.rows.layer, inputs))
        inputs = [across.joined(x, 0) for x in inputs]
        return self._per_entry(across.own(retained(self.rows.weights, str(expr.value), self.rows.layer, inputs)))

    def _gate(self, expr: Expr) -> Tensor:
        """A trained gate's logit for each unit, from the query that reads and the unit's landmarks."""
        assert self.rows.weights is not None and self.unit is not None and self.columns is not None
        marks = [self._value(arg) for arg in expr.args if arg.op == "landmark"]
        wide = [m.expand(*self.columns.shape[:1], 1, 1, self.columns.shape[1], 1, -1)[:, 0, 0, :, 0] for m in marks]
        found = gated(self.rows.weights, str(expr.value), self.rows, self.unit, wide)
        return found[:, :, None, :, None, None]

    def _regroup(self, expr: Expr) -> Tensor:
        """Scores of units as those of others: the largest of those that overlap with each."""
        assert self.unit is not None and self.columns is not None
        first, _ = words_of(expr)
        unit = next(u for u in self.rows.units if u.name == first)
        inner = _Evaluator(self.rows, self.candidates, unit, self.leaves, self.among, self.causal)
        there = inner.alive.any(E)[..., 0]
        value = inner._value(expr.args[0])[..., 0, 0]
        begins, starts = (
            torch.arange(x.shape[U], device=value.device) * u.stride + u.offset
            for x, u in ((there, unit), (self.alive, self.unit))
        )
        meets = (begins < starts[:, None] + self.unit.size) & (begins + unit.size > starts[:, None])
        value = value.expand(*value.shape[:U], len(begins)).unsqueeze(U)
        return masked("max", value, there.unsqueeze(U) & meets, U + 1).unsqueeze(-1)

    def _landmark(self, expr: Expr) -> Tensor:
        _, name = words_of(expr)
        assert self.unit is not None
        return self._value(dict(self.unit.landmarks)[name])

    # -- reductions --------------------------------------------------------------------------------------------

    def _mask(self, expr: Expr) -> Tensor:
        """Which entries a reduction over them sees."""
        mask = self.alive
        if any(n.op == "field" and str(n.value).startswith("next.") for n in expr.walk()):
            mask = torch.cat([mask[:, :, :, 1:], torch.zeros_like(mask[:, :, :, :1])], U)
        return mask & self._readers(expr) if self.causal else mask

    def _readers(self, expr: Expr) -> Tensor:
        """Which of a formula's queries could read which entry: bool, axes h q u i."""
        queries = self.rows.queries or {}
        sources = open_sources(expr) or set(queries)
        at = queries[min(sources, key=lambda s: s.kind)].pos
        return self._arrange(readable_by(self.rows, at)[:, None, :, :, None])

    def _present(self, expr: Expr) -> Tensor:
        """Which of the queries that a reduction over `q` closes there really are, per row: bool, axes h and q."""
        there = torch.ones((1, 1, 1, 1, 1, 1), dtype=torch.bool, device=self.rows.pos.device)
        if self.rows.queries is None or self.rows.own is not None:
            return there
        for source in open_sources(expr):
            there = there & (self.rows.queries[source].pos >= 0)[:, None, :, None, None, None]
        return there & self._readers(expr) if self.causal and not is_0_unread(expr) else there

    def _reduce(self, expr: Expr) -> Tensor:
        fn, axis = words_of(expr)
        arg = expr.args[0]
        if axis == "q":
            return self._over_queries(fn, arg)
        x = self._value(arg)
        if axis == "i":
            return masked(fn, x, self._mask(arg), E)
        if axis == "u" and x.shape[U] > 1:
            return masked(fn, x, self._mask(arg).any(E, keepdim=True), U)
        return self._over_heads(fn, arg) if axis == "h" else reduced(fn, x, (_DIM[axis],))

    def _over_heads(self, fn: str, arg: Expr) -> Tensor:
        """A reduction over all query heads of a layer, for each sequence its own."""
        x, across = self._value(arg), self.rows.across
        if across is not None and any(not n.args and n.op != "const" for n in arg.walk()):
            return across.over_heads(fn, x.expand(len(self.rows.pos), *x.shape[1:]), self.rows.sequences)
        if self.rows.sequences == 1 or x.shape[H] == 1:
            return reduced(fn, x, (H, G))
        heads = len(self.rows.pos) // self.rows.sequences
        found = reduced(fn, x.unflatten(H, (-1, heads)), (H + 1, G + 1))
        return found.expand(-1, heads, *found.shape[2:]).flatten(H, H + 1)

    def _over_queries(self, fn: str, arg: Expr) -> Tensor:
        """A reduction over queries; sums and means of many of them block by block."""
        sources, queries = open_sources(arg), self.rows.queries or {}
        width = max((queries[s].pos.shape[1] for s in sources if s in queries), default=1)
        per_query = _held(arg, self.rows) // width
        # Blocks follow from the size of these rows; those of other processes may have another.
        together = self.rows.across is not None and ties_heads(arg)
        if fn not in ("sum", "mean") or per_query * width <= WIDE or self.causal or ties_queries(arg) or together:
            return masked(fn, self._value(arg), self._present(arg), Q)
        size, total = max(1, WIDE // per_query), torch.zeros((), device=self.rows.pos.device)
        for at in range(0, width, size):
            block = slice(at, at + size)
            cut = {s: Queries(queries[s].q[:, :, block], queries[s].pos[:, block]) for s in sources}
            part = replace(self.rows, queries=queries | cut, attn=None)
            inner = _Evaluator(part, self.candidates, self.unit, self.leaves, self.among, self.causal)
            total = total + masked("sum", inner._value(arg), inner._present(arg), Q)
        return total if fn == "sum" else divide(total, self._present(arg).sum(Q, keepdim=True).float())

    def _pool(self, expr: Expr) -> Tensor:
        assert isinstance(expr.value, tuple)
        kind, width = str(expr.value[0]), int(expr.value[1])
        x, (rows, count) = self._value(expr.args[0]), self.rows.pos.shape
        x = x.expand(rows, *x.shape[1:E], self.alive.shape[E], x.shape[D])
        x = self._by_entry(x).expand(-1, -1, -1, count, -1).transpose(-1, -2)
        # Candidates move together, so that the holes between them close; past a row's last one nothing is there.
        there = self.candidates.sum(1)
        order = (~self.candidates).byte().argsort(dim=1, stable=True)[:, : int(there.max())]
        if not order.shape[1]:
            return self._arrange(x.transpose(-1, -2))
        inside = (torch.arange(order.shape[1], device=x.device) < there[:, None])[:, None, None, None]
        at = order[:, None, None, None].expand(*x.shape[:-1], -1)
        close = x.gather(-1, at)
        found = pooled(kind, width, close.masked_fill(~inside, float("-inf") if kind == "max" else 0.0))
        return self._arrange(x.scatter(-1, at, torch.where(inside, found, close)).transpose(-1, -2))

    # -- elementwise -------------------------------------------------------------------------------------------

    def _unary(self, expr: Expr) -> Tensor:
        return unary(str(expr.value), self._value(expr.args[0]), D)

    def _binary(self, expr: Expr) -> Tensor:
        a, b = (self._value(arg) for arg in expr.args)
        return BINARY[str(expr.value)](a, b)

    def _pair(self, expr: Expr) -> Tensor:
        a, b = (self._value(arg) for arg in expr.args)
        return pair(str(expr.value), a, b, D)


def _per_row(numbers: Tensor) -> Tensor:
    return numbers.float().reshape(-1, 1, 1, 1, 1, 1)
