"""Rows of one layer's cache as padded matrices, and which queries read what of them.

Filled by `gather` for decisions and by `states` for new entries, read by formulas and by the kernels of a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kvcompile.kernels.expr import QuerySource
from kvcompile.kernels.ranks import Across
from kvcompile.kernels.terms import UnitPlan


@dataclass(frozen=True)
class Queries:
    """Queries q [rows, group, width, head_dim] at positions pos [rows, width] (int64; -1: absent)."""

    q: Tensor
    pos: Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of one layer as padded matrices; a column is an entry, in position order where a score needs it.

    pos int64 [rows, n], -1: no entry, or one without position (`fold mean`); resident bool: entries that may be kept;
    readable bool: what a query may see (peeked tokens are readable, never resident); frozen bool; state name ->
    float32 [rows, n]; k, v [rows, n, head_dim] where a score asks for them, k as queries read it; now, prompt, chunk,
    step int64 [rows]; layer, heads int64 [rows]: which KV head of which layer a row is. Under `positions compact`
    raw [rows, n, head_dim] are the keys as they are stored. bias float32 [rows, n] is added to every logit. rope
    float32 [2, positions, head_dim], cosine and sine. own [rows, group, n, head_dim]: on insert, each entry's query.
    sequences: how many there are, whose heads follow each other. Of the model's attention: cap, 0 or what logits are
    softened to; reach, 0 or how many of the newest tokens a query reads; sink float32 [rows, group], a logit without
    a value in each softmax. Of a model whose heads several processes hold: first, the model's index of KV head 0 here;
    across, how these rows meet the same layer's others, None where there are none. asking: as one query reads them, at
    `now`: a unit is full once the query comes after it. narrow: what this forward's queries read of what they could
    read, bool [rows, group or 1, q, n]; None: all. units: the policy's. index int64 [rows]: which of the rows that
    were gathered together each is.
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
    layer: int = 0
    heads: Tensor | None = None
    step: Tensor | None = None
    chunk: Tensor | None = None
    bias: Tensor | None = None
    rope: Tensor | None = None
    compact: bool = False
    raw: Tensor | None = None
    own: Tensor | None = None
    weights: Mapping[str, Tensor] | None = None
    sequences: int = 1
    cap: float = 0.0
    reach: int = 0
    sink: Tensor | None = None
    first: int = 0
    across: Across | None = None
    asking: bool = False
    narrow: Callable[[Rows, Queries], Tensor] | None = None
    units: tuple[UnitPlan, ...] = ()
    index: Tensor | None = None

    def one(self, row: int) -> Rows:
        """The same for a single row."""
        return self.some(slice(row, row + 1))

    def some(self, cut: slice | list[int]) -> Rows:
        """The same for some rows, of one sequence."""
        found = {name: getattr(self, name) for name in (*_BY_ROW, *_BY_ENTRY)}
        return replace(
            self,
            **{name: value[cut] for name, value in found.items() if value is not None},
            state={name: s[cut] for name, s in self.state.items()},
            sequences=1,
            queries=None
            if self.queries is None
            else {s: Queries(x.q[cut], x.pos[cut]) for s, x in self.queries.items()},
        )

    def until(self, column: int) -> Rows:
        """The same for the entries before a column; without probabilities, which are of more entries."""
        found = {name: getattr(self, name) for name in _BY_ENTRY}
        return replace(
            self,
            **{name: value[:, :column] for name, value in found.items() if value is not None},
            state={name: s[:, :column] for name, s in self.state.items()},
            attn=None,
        )


_BY_ROW = ("now", "prompt", "heads", "step", "chunk", "own", "attn", "sink", "index")
_BY_ENTRY = ("pos", "resident", "readable", "frozen", "k", "v", "raw", "bias")


def as_read_by(rows: Rows, source: QuerySource) -> Rows:
    """Rows as the queries of a source read them, now that a decision asks.

    Those of this forward read what they did read. Earlier ones are asked again, over what is in memory; what the newest
    query is too far from does not count, since a window may have dropped it or not, as pieces and steps came.
    """
    if not rows.reach or source.kind in ("forward", "sample"):
        return rows
    return replace(rows, readable=rows.readable & (rows.pos > (rows.now - rows.reach)[:, None]))


def readable_by(rows: Rows, pos: Tensor) -> Tensor:
    """Which entries queries at pos int64 [rows, q] may read: bool [rows, q, n]."""
    seen = rows.readable[:, None, :] & (rows.pos[:, None, :] <= pos[:, :, None])
    if rows.reach:
        seen = seen & (rows.pos[:, None, :] > pos[:, :, None] - rows.reach)
    return seen
