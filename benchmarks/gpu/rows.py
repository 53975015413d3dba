"""Rows of one layer or more on real pages, filled with noise on the device, and launches of our kernels over them.

Takes a policy, the length of every row and the model's shape; gives calls that the timers repeat, with what puts the
rows back between two of them. The pages of a row lie scattered, as after a while of decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from measuring import Bench
from torch import Tensor

from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.evict import EvictStep
from kvcompile.kernels.triton_backend.library import At, library
from kvcompile.passes import compile_policy
from kvcompile.sequences import Piece, Sequences

SMALL = ("length", "top", "pos", "frozen", "state")  # what a launch changes beside keys and values


def facts_of(bench: Bench, layers: int = 1) -> ModelFacts:
    """The attention of Llama-3.1-8B; in a dry run four query heads on two KV heads."""
    dtype = str(bench.dtype).removeprefix("torch.")
    return ModelFacts(layers, 4, 2, 64, dtype) if bench.dry else ModelFacts(layers, 32, 8, 128, dtype)


class Rows:
    """`batch` sequences whose rows hold `lengths` entries, [layer * batch * KV heads], as `layout.Site` orders them."""

    def __init__(self, bench: Bench, policy: str, lengths: list[int], batch: int, layers: int = 1, **params: Any):
        self.bench, self.batch, self.layers = bench, batch, layers
        self.facts = facts_of(bench, layers)
        self.plan: PolicyPlan = compile_policy(policy, self.facts, **params).plan
        page, width, device = self.plan.page, self.facts.head_dim, bench.device
        held = [-(-n // page) for n in lengths]
        spare = len(lengths)  # each may append
        pages = sum(held) + spare
        shuffled = torch.randperm(pages, device=device).int()
        self.k, self.v = bench.noise(pages * page, width), bench.noise(pages * page, width)
        self.pos = torch.zeros(pages * page, dtype=torch.int32, device=device)
        self.frozen = torch.zeros(pages * page, dtype=torch.uint8, device=device)
        self.state = torch.rand(len(self.plan.states), pages * page, device=device)
        self.table = torch.zeros(len(lengths), max(held) + 1, dtype=torch.int32, device=device)
        at, by_page = 0, self.pos.view(pages, page)
        places = torch.arange(max(held) * page, dtype=torch.int32, device=device).view(-1, page)
        for row, count in enumerate(held):
            mine = shuffled[at : at + count]
            self.table[row, :count] = mine
            by_page[mine.long()] = places[:count]
            at += count
        self.length = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.free = torch.cat([shuffled[at:], shuffled.new_zeros(at)])
        self.top = torch.tensor([spare], dtype=torch.int32, device=device)
        self.layer = torch.zeros(1, dtype=torch.int64, device=device)
        self.now = torch.full((batch,), max(lengths), dtype=torch.int64, device=device)
        self.active = torch.ones_like(self.now)
        self.lengths = lengths
        self._kept = {name: getattr(self, name).clone() for name in SMALL}

    def put_back(self, *names: str) -> None:
        """Make lengths and pages, or what is named, what they were."""
        for name in names or ("length", "top"):
            getattr(self, name).copy_(self._kept[name])

    @property
    def bytes(self) -> int:
        """Keys and values of all entries."""
        return sum(self.lengths) * self.facts.entry_bytes

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same entries side by side, [B, Hkv, longest, D] twice; zeros past a row's end."""
        page, width = self.plan.page, self.facts.head_dim
        longest = max(self.lengths)
        shape = (self.batch, self.facts.kv_heads, longest, width)
        found = []
        for pool in (self.k, self.v):
            side = pool.new_zeros(len(self.lengths), longest, width)
            pages = pool.view(-1, page, width)
            for row, count in enumerate(self.lengths):
                mine = self.table[row, : -(-count // page)].long()
                side[row, :count] = pages[mine].flatten(0, 1)[:count]
            found.append(side.view(shape))
        return found[0], found[1]

    def decode(self) -> tuple[DecodeStep, Tensor, Tensor, Tensor]:
        """The decode launch of the policy, and a step's q [B, Hq, D] and k, v [B, Hkv, D]."""
        rows = self.batch * self.facts.kv_heads
        at = At(self.bench.device, rows, self.table.shape[1] * self.plan.page)
        files = library(self.plan)
        step = DecodeStep.prepare(files.decode(at), 1, rows, at.tokens, at.device, files.target(at))
        q = self.bench.noise(self.batch, self.facts.q_heads, self.facts.head_dim)
        k, v = (self.bench.noise(self.batch, self.facts.kv_heads, self.facts.head_dim) for _ in range(2))
        return step, q, k, v

    def decode_once(self, step: DecodeStep, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's step: [B, 1, Hq, D]."""
        out, _ = step(q, k, v, self, self.now, self.active, self.layer, self.facts.head_dim**-0.5)
        return out

    def eviction(self, cls: int = 0) -> tuple[EvictStep, dict[str, Tensor]]:
        """The eviction launch of a class over all layers, and its numbers: counts, fires, now, prompt."""
        capacity = 1 << (self.table.shape[1] * self.plan.page - 1).bit_length()
        at = At(self.bench.device, len(self.lengths), capacity)
        step = EvictStep.prepare(library(self.plan).evict(cls, at), self.plan, cls, self.batch, capacity, at.device)
        sequences = Sequences(self.plan, self.batch)
        for each in sequences.each:
            each.seen = each.prompt = max(self.lengths) - 1
            each.prefilled = True
        pieces = [Piece(1, step=True)] * self.batch
        _, counts = sequences.numbers(pieces)
        fires = torch.tensor(sequences.fires(pieces, None)[cls], dtype=torch.uint8)
        numbers = {"counts": counts, "fires": fires, "now": self.now - 1, "prompt": self.now - 1}
        return step, {name: value.to(at.device) for name, value in numbers.items()}


def a_prompt(bench: Bench, policy: str, tokens: int, **params: Any) -> tuple[Rows, Tensor, Tensor]:
    """Rows of one sequence that hold nothing yet, and keys and values of its prompt, [1, Hkv, tokens, D] twice."""
    facts = facts_of(bench)
    rows = Rows(bench, policy, [1] * facts.kv_heads, 1, **params)
    rows.length.zero_()
    k, v = (bench.noise(1, tokens, facts.kv_heads, facts.head_dim).transpose(1, 2) for _ in range(2))
    return rows, k, v


def spread(mean: int, rows: int) -> list[int]:
    """Lengths from a tenth of the mean to 1.9 times it, evenly, in a shuffled order that is always the same."""
    lengths = [max(1, round(mean * (0.1 + 1.8 * (i + 0.5) / rows))) for i in range(rows)]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).tolist()
    return [lengths[i] for i in order]
