"""Our side of the attention benchmarks: one layer's rows of given lengths, filled, and the op that reads them.

Takes a policy, lengths of the KV heads and their entries; gives calls of the `kvc` operators on real pools, as the
model's forward makes them. A row's last entry is what each call appends, so calls can be repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.extents import ExtentStore
from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.build import NoCompiler, compiler
from kvcompile.kernels.layout import Site, write
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy
from kvcompile.sequences import Piece, Sequences

STEP = Piece(1, step=True)


def kernels(backend: str) -> str:
    """What runs our part: the compiler of generated C++, or why it is something else."""
    if backend != "cpu":
        return f"the {backend} backend"
    try:
        return f"C++ built by {compiler().version}"
    except NoCompiler as error:
        return f"packed SDPA ({error})"


class Rows:
    """One sequence in one layer. `keys` and `values`: one tensor [n, head_dim] for each KV head, n at least 2."""

    def __init__(
        self, policy: str, keys: list[Tensor], values: list[Tensor], group: int, backend: str = "cpu", **params: Any
    ) -> None:
        dtype, width = keys[0].dtype, keys[0].shape[1]
        facts = ModelFacts(1, group * len(keys), len(keys), width, str(dtype).removeprefix("torch."))
        plan = compile_policy(policy, facts, **params).plan
        chosen = ops.backend(backend)
        chosen.prepare(plan)
        self.key = ops.register(ops.Program(plan, chosen))
        self.scale = width**-0.5
        self.store = ExtentStore(plan, 1, dtype, torch.device("cpu"))
        counts = [k.shape[0] - 1 for k in keys]
        self.store.reserve(0, [n + 1 for n in counts])
        self.store.cover(max(counts) + 1)
        self._fill([k[:-1] for k in keys], [v[:-1] for v in values])
        self.newest = [torch.stack([t[-1] for t in side])[None, :, None] for side in (keys, values)]
        self._set_clock(max(counts))
        self.lengths, self.table = self.store.length.clone(), self.store.table.clone()
        self._kept: Site | None = None

    def step(self, q: Tensor) -> Tensor:
        """Append the newest entry of each row and read all of them: q [1, q_heads, 1, D] to [1, 1, q_heads, D]."""
        return torch.ops.kvc.attend_step_v1(q, *self.newest, list(self.site), self.scale, self.key)

    def shorten(self) -> None:
        """Take back what a step appended."""
        self.store.length.copy_(self.lengths)

    def evict(self) -> None:
        """The evictions of a step."""
        torch.ops.kvc.evict_step_v1(list(self.site), 1, self.scale, self.key)

    def left(self) -> Tensor:
        """Positions that the rows hold, sorted, one row after the other."""
        return torch.cat(self.store.positions(0, 0))

    def keep(self) -> None:
        """Remember the rows as they are, for `put_back`."""
        self._kept = Site(*[t.clone() for t in self.site])

    def put_back(self) -> None:
        """Make the rows what they were when `keep` was called."""
        assert self._kept is not None
        for now, then in zip(self.site, self._kept, strict=True):
            now.copy_(then)

    @property
    def site(self) -> Site:
        return self.store.site(0)

    @property
    def entry_bytes(self) -> int:
        """Keys and values of all entries that a step reads."""
        return (int(self.lengths.sum()) + self.lengths.numel()) * self.store.plan.facts.entry_bytes

    def _fill(self, keys: list[Tensor], values: list[Tensor]) -> None:
        counts = [k.shape[0] for k in keys]
        pos = torch.cat([torch.arange(n) for n in counts])
        states = torch.rand(len(self.store.plan.states), len(pos), generator=torch.Generator().manual_seed(2))
        rows = list(range(len(keys)))
        write(self.site, rows, counts, torch.cat(keys), torch.cat(values), pos, torch.zeros_like(pos), states)

    def _set_clock(self, seen: int) -> None:
        """The numbers of a first step after a prompt of so many tokens."""
        sequences = Sequences(self.store.plan, 1)
        progress = sequences.each[0]
        progress.seen = progress.prompt = seen
        progress.prefilled = True
        clock, counts = sequences.numbers([STEP])
        self.store.clock.copy_(clock)
        self.store.counts.copy_(counts)
        self.store.fires.copy_(torch.tensor(sequences.fires([STEP], self.store.lengths())))
