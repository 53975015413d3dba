"""What the host knows of each sequence: how far it is, where its prompt ended, what fires next.

Everything here follows from token counts alone, so nothing is read back from a device; but for shares that follow
from a prompt's entries, which are handed in when its forward is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompile.kernels.counts import all_numbers, asked_of
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Trigger
from kvcompile.kernels.units import reads_next


@dataclass(frozen=True)
class Piece:
    """One forward's share of one sequence: real tokens, peeked tokens, whether its prompt ends here, or a step."""

    new: int
    peek: int = 0
    ends: bool = False
    step: bool = False


@dataclass
class Progress:
    """One sequence. `seen` is its logical length; `judged` counts units per (class, unit) that had their turn; `since`
    the entries per class that came in since it last decided, or ever; `shares` the parts of measured shares, by layer.
    """

    seen: int = 0
    prompt: int = 0
    steps: int = 0
    prefilled: bool = False
    judged: dict[tuple[int, str], int] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    shares: dict[int, tuple[int, ...]] = field(default_factory=dict)


class Sequences:
    """The sequences of one cache, and the numbers that each forward hands to the operators."""

    def __init__(self, plan: PolicyPlan, batch: int) -> None:
        self.plan = plan
        self.each = [Progress() for _ in range(batch)]
        owner = torch.tensor(plan.class_of)
        rows = [c if cls.rows_of is None else cls.rows_of for c, cls in enumerate(plan.classes)]
        self._rows = [owner == c for c in rows]  # bool [layers, kv_heads]
        self._bits = [_bits(cls) for cls in plan.classes]
        self._asked = asked_of(plan)
        self._latest: tuple[object, list[tuple[int, ...]]] = None, []

    def begin_prefill(self, new: list[int]) -> None:
        """A prefill of so many tokens per sequence starts; `prompt` is from now on what it will be."""
        for seq, n in zip(self.each, new, strict=True):
            if n:
                seq.prompt, seq.steps, seq.prefilled = seq.seen + n, 0, False

    def numbers(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """Clock int64 [batch, Clock.WIDTH] and counts int64 [layers, counts + shares, batch] of the forward to come."""
        clock, per_sequence = [], []  # a line of clock: in the order of layout.Clock
        for seq, piece in zip(self.each, pieces, strict=True):
            step = seq.steps + piece.step
            clock.append((piece.new, piece.peek, seq.seen, seq.prompt, step, int(piece.ends)))
            scalars = {"prompt": seq.prompt, "now": max(seq.seen + piece.new - 1, 0), "chunk": piece.new, "step": step}
            per_sequence.append(self._numbers({name: scalars[name] for name in self._asked}, seq.shares))
        counts = torch.tensor(per_sequence, dtype=torch.int64)
        shape = (self.plan.facts.layers, len(self.plan.counts) + len(self.plan.shares), len(pieces))
        counts = counts.permute(2, 1, 0).contiguous() if counts.numel() else counts.new_zeros(shape)
        return torch.tensor(clock, dtype=torch.int64), counts

    def _numbers(self, scalars: dict[str, int], measured: dict[int, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The counts of every layer and its parts of shares; most policies ask for the same ones step after step."""
        key = tuple(scalars.values()), tuple(measured.items())
        if key != self._latest[0]:
            self._latest = key, all_numbers(self.plan, scalars, measured)
        return self._latest[1]

    def measure(self, parts: Tensor, pieces: list[Piece]) -> None:
        """Take over shares that followed from the prompts that end with these pieces, int64 [shares, layers, batch]."""
        found = parts.tolist()
        measured = [index for index, share in enumerate(self.plan.shares) if share.measured]
        for b, (seq, piece) in enumerate(zip(self.each, pieces, strict=True)):
            if piece.ends:
                seq.shares = {index: tuple(layer[b] for layer in found[index]) for index in measured}

    def fires(self, pieces: list[Piece], lengths: Tensor | None) -> Tensor:
        """Which class decides in which sequence and by which triggers, uint8 [classes, batch] as in `layout.Site`.

        `lengths` int32 [layers, batch, kv_heads] before the forward is asked for only by `full(n)`.
        """
        out = torch.zeros(len(self.plan.classes), len(pieces), dtype=torch.uint8)
        for c, cls in enumerate(self.plan.classes):
            if cls.keeps_all:
                continue
            for b, piece in enumerate(pieces):
                if not piece.new:
                    continue
                longest = 0 if lengths is None else int(lengths[:, b][self._rows[c]].max()) + piece.new
                fired = [bit for bit, t in self._bits[c] if self._fires(c, t, b, piece, longest)]
                out[c, b] = sum(set(fired))
        return out

    def _fires(self, c: int, trigger: Trigger, b: int, piece: Piece, longest: int) -> bool:
        seq = self.each[b]
        match trigger.kind:
            case "prefill.end":
                return piece.ends
            case "chunk":
                return not piece.step
            case "step":
                return piece.step
            case "every":
                return piece.step and (seq.steps + 1) % (trigger.n or 1) == 0
            case "full":
                return longest >= (trigger.n or 0)
            case "filled" if trigger.unit is None:
                return seq.since.get(c, 0) + piece.new >= (trigger.n or 0)
            case "filled":
                full = self._full_units(trigger.unit or "", seq.seen + piece.new)
                return full - seq.judged.get((c, trigger.unit or ""), 0) >= (trigger.n or 1)
            case "when":
                return True
        raise NotImplementedError(trigger.kind)

    def _full_units(self, name: str, seen: int) -> int:
        unit = self.plan.unit(name)
        return max(0, (seen - unit.offset) // unit.size)

    def advance(self, pieces: list[Piece], fires: Tensor) -> None:
        """The forward is done: lengths, steps and what has been judged move on."""
        for b, (seq, piece) in enumerate(zip(self.each, pieces, strict=True)):
            seq.seen += piece.new
            seq.steps += piece.step
            seq.prefilled |= piece.ends
            for c, cls in enumerate(self.plan.classes):
                fired = bool(fires[c, b])
                seq.since[c] = 0 if fired else seq.since.get(c, 0) + piece.new
                if fired:
                    self._judge(seq, c, cls)

    def _judge(self, seq: Progress, c: int, cls: ClassPlan) -> None:
        for trigger in cls.triggers:
            if trigger.unit is not None:
                # A unit whose score reads the following one has had no turn before that one is full.
                unit = self.plan.unit(trigger.unit)
                ahead = any(trigger.unit in (t.unit, t.whole) and reads_next(t, unit) for t in cls.selections)
                full = self._full_units(trigger.unit, seq.seen)
                seq.judged[c, trigger.unit] = max(0, full - ahead)


def _bits(cls: ClassPlan) -> list[tuple[int, Trigger]]:
    """The bit of `Site.fires` that says of each trigger that it has fired; those without a condition share one."""
    found, bit = [], 1
    for trigger in cls.triggers:
        bit <<= trigger.cond is not None
        found.append((1 if trigger.cond is None else bit, trigger))
    if bit > 128:
        raise KvCompileError(f"{cls.name} has more than seven triggers with a condition")
    return found
