"""Pages that several rows of a `PagedStore` hold: who holds what, on the host, and a copy for a row that will write.

Takes what `moving.select` has laid out; gives pages of one's own before a row decides. Guarantees: nothing is read back
from the device, because shared pages never change hands in a forward: their rows only append behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Shared:
    """table: int32 [rows, pages], the shared pages of each row at their places, -1 elsewhere; holders: int32 [pages]
    of the pool, how many rows hold each page; saved: pages that the pool need not have because rows share theirs."""

    def __init__(self, table: Tensor, holders: Tensor) -> None:
        self.table, self.holders = table, holders
        self.saved = int((holders - 1).clamp(min=0).sum())

    @classmethod
    def none(cls, rows: int) -> Shared:
        return cls(torch.zeros(rows, 0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))

    @classmethod
    def among(cls, table: Tensor, held: Tensor, pages: int) -> Shared:
        """Of rows with these pages, int32 [rows, width], where `held`, bool of that shape, in a pool of so many."""
        holders = torch.bincount(table[held].long(), minlength=max(1, pages))  # none where all rows are empty
        twice = held & (holders[table.long()] > 1)
        if not bool(twice.any()):
            return cls.none(len(table))
        width = int(twice.any(0).nonzero().max()) + 1
        return cls(torch.where(twice, table, -1)[:, :width].int(), holders.int())

    def copy(self) -> Shared:
        return Shared(self.table.clone(), self.holders.clone())

    def leave(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, bool [rows], share no longer. Gives what they have to copy: row, place in it and page, int64 [n] each.

        The last holder of a page keeps it as it is.
        """
        row, place = (rows[:, None] & (self.table >= 0)).nonzero(as_tuple=True)
        page = self.table[row, place].long()
        order = torch.argsort(page, stable=True)
        row, place, page = row[order], place[order], page[order]
        first = torch.ones_like(page, dtype=torch.bool)
        first[1:] = page[1:] != page[:-1]
        # Where all holders leave at once, one of them has no need to.
        leaving = torch.bincount(page, minlength=len(self.holders))
        stays = first & (leaving[page] == self.holders[page])
        self.table[row, place] = -1
        self.holders -= torch.bincount(page[~stays], minlength=len(self.holders)).int()
        self.saved -= int((~stays).sum())
        return row[~stays], place[~stays], page[~stays]
