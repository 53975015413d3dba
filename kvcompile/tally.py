"""What forwards read, counted for every KV head: the sums behind footprint and peak, on the store's device.

Takes the lengths of rows before each forward; gives whole numbers. Guarantees: the same sums however the forwards came;
steps in a row that only add entries are counted by their number and summed when somebody asks, as a step's own time is
short.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.kernels.plan import PolicyPlan
from kvcompile.store import to_device

SUMS = ("area", "widest", "widest_sum")


class Tally:
    """area int64 [layers, batch, kv_heads], of n P over all forwards of n tokens on P entries; widest, likewise, the
    most that P + n came to; widest_sum int64 [batch], the same of all heads together. Ask `settle` before you read, or
    read `settled`."""

    def __init__(self, plan: PolicyPlan, batch: int, device: torch.device) -> None:
        facts = plan.facts
        self.area = torch.zeros(facts.layers, batch, facts.kv_heads, dtype=torch.int64, device=device)
        self.widest = torch.zeros_like(self.area)
        self.widest_sum = torch.zeros(batch, dtype=torch.int64, device=device)
        # Layers that are off read nothing of a forward either.
        live = [[[int(layer not in plan.off)]] for layer in range(facts.layers)]
        self.reads = torch.tensor(live, device=device)  # int64 [layers, 1, 1]
        # Lengths before the first of the steps that are not summed yet, and how many those are: one name for both, as
        # another thread may ask for figures at any time.
        self._pending: tuple[Tensor, int] | None = None

    def before(self, counts: Sequence[int], lengths: Tensor, grows: bool) -> None:
        """A forward of so many tokens of each sequence runs on rows of these lengths, int32 [layers, batch, kv_heads].

        grows: it is a step that adds one entry to every row of a live layer and takes none away.
        """
        if grows and self._pending is not None:
            first, steps = self._pending
            self._pending = first, steps + 1
            return
        self.settle()
        held = lengths.long()  # a copy, of the sums' own dtype: operators of two dtypes take twice as long
        if grows:
            self._pending = held, 1
            return
        n = counts[0] if len(set(counts)) == 1 else to_device(torch.tensor(counts)[:, None], held.device)
        self.area += held * n
        self._reach(held + self.reads * n)

    def settle(self) -> None:
        """Sum up the steps that were only counted. Call it, too, when rows change outside a forward."""
        if self._pending is None:
            return
        for held, now in zip((self.area, self.widest, self.widest_sum), self.settled(), strict=True):
            held.copy_(now)  # in place: under somebody's inference mode a new one could not be added to later
        self._pending = None

    def settled(self) -> tuple[Tensor, Tensor, Tensor]:
        """area, widest and widest_sum with all steps summed up; nothing changes."""
        if (pending := self._pending) is None:
            return self.area, self.widest, self.widest_sum
        first, steps = pending
        now = first + self.reads * steps
        area = self.area + steps * first + self.reads * (steps * (steps - 1) // 2)
        return area, torch.maximum(self.widest, now), torch.maximum(self.widest_sum, now.sum((0, 2)))

    def _reach(self, now: Tensor) -> None:
        # A row that gets nothing stands at no more than its latest forward did.
        torch.maximum(self.widest, now, out=self.widest)
        torch.maximum(self.widest_sum, now.sum((0, 2)), out=self.widest_sum)

    def select(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what `sequences[i]` was."""
        self.settle()
        index = torch.tensor(sequences, device=self.area.device)
        self.area, self.widest = (t.index_select(1, index) for t in (self.area, self.widest))
        self.widest_sum = self.widest_sum[index]

    def take_over(self, tallies: Sequence[Tally]) -> None:
        """The sums of all these, whose sequences this one now holds, in order."""
        for tally in tallies:
            tally.settle()
        self._pending = None
        self.area, self.widest = (torch.cat([getattr(t, name) for t in tallies], 1) for name in ("area", "widest"))
        self.widest_sum = torch.cat([t.widest_sum for t in tallies])
