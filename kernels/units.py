"""Entries of rows laid out by unit, for selections within units and selections of whole units.

Takes rows in position order and a unit; gives matrices [rows, units, size] and the way back. An entry without
position, and one before the first unit, is in none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels.arithmetic import unit_columns
from kvcompile.kernels.plan import Expr, Selection, UnitPlan, words_of
from kvcompile.kernels.rows import Rows


@dataclass(frozen=True)
class Units:
    """columns int64 [rows, units, size]: where each entry of a unit stands in its row, -1 where there is none."""

    columns: Tensor
    width: int

    @classmethod
    def of(cls, rows: Rows, unit: UnitPlan) -> Units:
        return cls(unit_columns(rows.pos, rows.resident, unit), rows.pos.shape[1])

    @property
    def count(self) -> int:
        return self.columns.shape[1]

    def spread(self, mask: Tensor) -> Tensor:
        """A mask over entries, bool [rows, n], by unit: bool [rows, units, size]."""
        if not self.width:
            return torch.zeros_like(self.columns, dtype=torch.bool)
        flat = mask.gather(1, self.columns.clamp(min=0).flatten(1)).view_as(self.columns)
        return flat & (self.columns >= 0)

    def values(self, values: Tensor) -> Tensor:
        """Scores [rows, n] or [rows, group, n] by unit: [rows, units, size], [rows, units, group, size].

        Anything where no entry is.
        """
        rows, units, size = self.columns.shape
        index = self.columns.clamp(min=0).flatten(1)
        if values.ndim == 2:
            return values.gather(1, index).view(rows, units, size)
        index = index[:, None].expand(-1, values.shape[1], -1)
        return values.gather(2, index).view(rows, -1, units, size).transpose(1, 2)

    def of_unit(self, values: Tensor) -> Tensor:
        """Scores that are the same for all entries of a unit, once per unit: [rows, units], [rows, group, units]."""
        first = (self.columns >= 0).int().argmax(2)
        index = self.columns.gather(2, first[:, :, None])[:, :, 0].clamp(min=0)
        if values.ndim == 2:
            return values.gather(1, index)
        return values.gather(2, index[:, None].expand(-1, values.shape[1], -1))

    def back(self, mask: Tensor) -> Tensor:
        """A mask by unit, bool [rows, units, size], over entries: bool [rows, n]."""
        out = torch.zeros(mask.shape[0], self.width + 1, dtype=torch.bool, device=mask.device)
        return out.scatter(1, torch.where(self.columns < 0, self.width, self.columns).flatten(1), mask.flatten(1))[
            :, :-1
        ]


def full(rows: Rows, unit: UnitPlan, needs_next: bool) -> Tensor:
    """Entries whose unit, and the next one where the score reads it, has been seen whole: bool [rows, n]."""
    which = (rows.pos - unit.offset).div(unit.size, rounding_mode="floor")
    last = unit.offset + (which + (2 if needs_next else 1)) * unit.size - 1
    return (which >= 0) & (last <= seen_until(rows)[:, None])


def seen_until(rows: Rows) -> Tensor:
    """The newest position by which a unit counts as full, int64 [rows]: for a query that reads, the one before it."""
    return rows.now - int(rows.asking)


def reads_next(term: Selection, unit: UnitPlan) -> bool:
    """Whether a unit can be judged only once the one after it is full."""
    formulas = [term.score, *(expr for _, expr in unit.landmarks)]
    return any(n.op == "field" and str(n.value).startswith("next.") for f in formulas for n in f.walk())


_PER_ENTRY = ("field", "state", "evidence", "noise", "learned", "sim")


def of_units(score: Expr) -> Expr:
    """The score of a unit: where a formula leaves the axis i open, the mean over the unit's entries."""
    return Expr("reduce", (score,), ("mean", "i")) if _leaves_entries(score) else score


def _leaves_entries(expr: Expr) -> bool:
    if expr.op in _PER_ENTRY:
        return True
    if expr.op == "reduce" and words_of(expr)[1] == "i" and words_of(expr)[0] != "softmax":
        return False
    return any(_leaves_entries(arg) for arg in expr.args)
