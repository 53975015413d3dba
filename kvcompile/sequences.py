"""What the host knows of each sequence: how far it is, where its prompt ended, what fires next.

Everything here follows from token counts alone, so nothing is read back from a device; but for shares that follow
from a prompt's entries, which are handed in when its forward is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvcompile.kernels.counts import all_numbers, asked_of
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.formulas import sources_of
from kvcompile.kernels.gather import query_sources
from kvcompile.kernels.judge import SLIDES
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, QuerySource, ReadPlan, ReadRule, Region, Trigger, formulas_of
from kvcompile.kernels.ranks import longest
from kvcompile.kernels.spans import all_without
from kvcompile.kernels.states import follow_reads
from kvcompile.kernels.units import reads_next
from kvcompile.spans import Spans


@dataclass(frozen=True)
class Piece:
    """One forward's share of one sequence: real tokens, peeked tokens, whether its prompt ends here, or a step.

    A step of several tokens is a draft: each of them is a step of its own, and none decides anything.
    """

    new: int
    peek: int = 0
    ends: bool = False
    step: bool = False


@dataclass
class Progress:
    """One sequence. `seen` is its logical length; `judged` counts units per (class, unit) that had their turn; `since`
    the entries per class that came in since it last decided, or ever; `shares` the parts of measured shares, by layer;
    `decided` how many tokens the latest decision knew, of what is kept or of a set that later forwards go on with;
    `lost` below which position queries may be missing in the ring; `spans` what was said of its prompt's stretches and
    positions.
    """

    seen: int = 0
    prompt: int = 0
    steps: int = 0
    prefilled: bool = False
    judged: dict[tuple[int, str], int] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    shares: dict[int, tuple[int, ...]] = field(default_factory=dict)
    decided: int = 0
    lost: int = 0
    spans: Spans | None = None

    def copy(self) -> Progress:
        return replace(self, judged=dict(self.judged), since=dict(self.since), shares=dict(self.shares))


class Sequences:
    """The sequences of one cache, and the numbers that each forward hands to the operators."""

    def __init__(self, plan: PolicyPlan, batch: int) -> None:
        self.plan = plan
        self.each = [Progress() for _ in range(batch)]
        owner = torch.tensor(plan.class_of)
        rows = [c if cls.rows_of is None else cls.rows_of for c, cls in enumerate(plan.classes)]
        self._rows = [owner == c for c in rows]  # bool [layers, kv_heads]
        self._bits = [_bits(cls.name, cls.triggers) for cls in plan.classes]
        self._read_bits = [[_bits(read.name, rule.triggers) for rule in read.rules] for read in plan.reads]
        self._lasting = [_lasts(plan, read, rule) for read in plan.reads for rule in read.rules]
        self._holds = any(read.holds for read in plan.reads)
        self._newest = [max((_newest(s) for s in query_sources(cls)), default=0) for cls in plan.classes]
        self._idle = not plan.evicts_in_step and not plan.reads  # in steps, which most policies do nothing in
        self._asked = asked_of(plan)
        self._latest: tuple[object, list[tuple[int, ...]]] = None, []
        self._counted: tuple[list[list[tuple[int, ...]]], Tensor] | None = None  # the latest counts, and as a tensor

    def begin_prefill(self, new: list[int]) -> None:
        """A prefill of so many tokens per sequence starts; `prompt` is from now on what it will be."""
        for seq, n in zip(self.each, new, strict=True):
            if n:
                seq.prompt, seq.steps, seq.prefilled = seq.seen + n, 0, False

    def numbers(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """Clock int64 [batch, Clock.WIDTH] and counts int64 [layers, counts + shares, batch] of the forward to come."""
        clock, per_sequence = [], []  # a line of clock: in the order of layout.Clock
        for seq, piece in zip(self.each, pieces, strict=True):
            step = seq.steps + piece.new * piece.step
            clock.append((piece.new, piece.peek, seq.seen, seq.prompt, step, int(piece.ends)))
            scalars = {"prompt": seq.prompt, "now": max(seq.seen + piece.new - 1, 0), "chunk": piece.new, "step": step}
            per_sequence.append(self._numbers({name: scalars[name] for name in self._asked}, seq.shares))
        if self._counted is None or self._counted[0] != per_sequence:
            counts = torch.tensor(per_sequence, dtype=torch.int64)
            shape = (self.plan.facts.layers, len(self.plan.counts) + len(self.plan.shares), len(pieces))
            counts = counts.permute(2, 1, 0).contiguous() if counts.numel() else counts.new_zeros(shape)
            self._counted = per_sequence, counts
        return torch.tensor(clock, dtype=torch.int64), self._counted[1]

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

    def fires(self, pieces: list[Piece], lengths: Tensor | None) -> list[list[int]]:
        """Which class decides in which sequence and by which triggers, [classes + rules][batch], as in `Site.fires`.

        `lengths` int32 [layers, batch, kv_heads] before the forward is asked for only by `full(n)`.
        """
        out = [[0] * len(pieces) for _ in self.plan.classes]
        if self._idle and all(piece.step for piece in pieces):
            return out
        held = None if lengths is None else longest(self.plan, lengths, self._rows)
        for c, cls in enumerate(self.plan.classes):
            if cls.keeps_all:
                continue
            for b, piece in enumerate(pieces):
                if not piece.new:
                    continue
                most = 0 if held is None else held[c][b] + piece.new
                fired = [bit for bit, t in self._bits[c] if self._fires(c, t, b, piece, most)]
                out[c][b] = sum(set(fired))
                seq = self.each[b]
                if set(fired) - {SLIDES} and seq.lost > max(0, seq.seen + piece.new - self._newest[c]):
                    raise KvCompileError(_missing(cls.name, b, seq, self._newest[c]))
        return out + self._rules(pieces)

    def _rules(self, pieces: list[Piece]) -> list[list[int]]:
        """Which rule of `plan.reads` fires in which sequence, line by line; a draft's tokens are steps."""
        lines = []
        for read, of_rules in zip(self.plan.reads, self._read_bits, strict=True):
            for rule, bits in zip(read.rules, of_rules, strict=True):
                if not rule.triggers:
                    lines.append([int(self._may_narrow(rule, b, piece)) for b, piece in enumerate(pieces)])
                    continue
                width = max((_newest(s) for s in sources_of(formulas_of(rule))), default=0)
                line = []
                for b, piece in enumerate(pieces):
                    plain = replace(piece, new=min(piece.new, 1)) if piece.step else piece
                    fired = {bit for bit, t in bits if piece.new and self._fires(-1, t, b, plain, 0)}
                    line.append(sum(fired))
                    seq = self.each[b]
                    if fired and seq.lost > max(0, seq.seen + piece.new - width):
                        raise KvCompileError(_missing(read.name, b, seq, width))
                lines.append(line)
        return lines

    def _may_narrow(self, rule: ReadRule, b: int, piece: Piece) -> bool:
        """Of a rule without triggers, which is for every forward: whether some token may read less than all."""
        seq = self.each[b]
        stop = 0 if seq.spans is None else seq.spans.stop
        return bool(piece.new) and not (all_without(rule) and seq.seen >= stop)

    def _fires(self, c: int, trigger: Trigger, b: int, piece: Piece, longest: int) -> bool:
        seq = self.each[b]
        if piece.step and piece.new > 1:
            return False
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
            case "slide":  # what the window has left is masked in any case, so a step may let some of it wait
                far = seq.seen + piece.new >= self.plan.class_reach(c)
                return far and (not piece.step or (seq.steps + 1) % (trigger.n or 1) == 0)
        raise NotImplementedError(trigger.kind)

    def _full_units(self, name: str, seen: int) -> int:
        unit = self.plan.unit(name)
        return max(0, (seen - unit.offset) // unit.size)

    def advance(self, pieces: list[Piece], fired: list[list[int]]) -> None:
        """The forward is done, in which this was firing: lengths, steps and what has been judged move on."""
        for b, (seq, piece) in enumerate(zip(self.each, pieces, strict=True)):
            seq.seen += piece.new
            seq.steps += piece.new * piece.step
            seq.prefilled |= piece.ends
            for c, cls in enumerate(self.plan.classes):
                decided = bool(fired[c][b] & ~SLIDES)
                seq.since[c] = 0 if decided else seq.since.get(c, 0) + piece.new
                if fired[c][b]:
                    seq.decided = seq.prompt if piece.peek else seq.seen
                if decided:
                    self._judge(seq, c, cls)
            if self._chosen(fired[len(self.plan.classes) :], b, piece):
                seq.decided = seq.seen

    def _chosen(self, fired: list[list[int]], b: int, piece: Piece) -> bool:
        """Whether sets have changed that later forwards go on with: chosen anew, or given up by a prompt."""
        if not piece.new:
            return False
        anew = any(line[b] for line, lasts in zip(fired, self._lasting, strict=True) if lasts)
        return anew or (self._holds and not piece.step and self.each[b].decided > 0)

    def select(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what `sequences[i]` was."""
        self.each = [self.each[b].copy() for b in sequences]

    def fixed(self, b: int, seen: int) -> str:
        """Why a sequence cannot go back to its first `seen` tokens; empty where it can."""
        seq = self.each[b]
        if seen >= seq.seen:
            return ""
        if follow_reads(self.plan):
            return f"the states of {self.plan.name} have grown by what each token has read, also by those to be removed"
        if seen < seq.decided:
            what = "read" if all(cls.keeps_all for cls in self.plan.classes) else "keep"
            return f"{self.plan.name} has decided what to {what} when {seq.decided} tokens were known"
        return ""

    def crop(self, b: int, seen: int, since: int | None) -> None:
        """A sequence goes back to its first `seen` tokens; see `fixed`.

        since: the ring of newest queries has been put back to what it was at this length, None: it has not.
        """
        seq = self.each[b]
        gone = seq.seen - seen
        if gone <= 0:
            return
        overwritten = min(seen, seq.seen - self.plan.ring) if self.plan.ring else 0
        seq.lost = max(min(seq.lost, seen), overwritten if since is None or overwritten > since else 0)
        seq.since = {c: max(0, n - gone) for c, n in seq.since.items()}
        if seen >= seq.prompt:
            seq.steps -= gone
        else:
            seq.prompt, seq.steps, seq.prefilled = seen, 0, seen > 0
        seq.seen = seen

    def _judge(self, seq: Progress, c: int, cls: ClassPlan) -> None:
        for trigger in cls.triggers:
            if trigger.unit is not None:
                # A unit whose score reads the following one has had no turn before that one is full.
                unit = self.plan.unit(trigger.unit)
                ahead = any(trigger.unit in (t.unit, t.whole) and reads_next(t, unit) for t in cls.selections)
                full = self._full_units(trigger.unit, seq.seen)
                seq.judged[c, trigger.unit] = max(0, full - ahead)


# Of triggers, those that fire wherever another does.
_WITH = {
    "step": {"step"},
    "every": {"step", "every"},
    "chunk": {"chunk"},
    "prefill.end": {"chunk", "prefill.end"},
}


def _lasts(plan: PolicyPlan, read: ReadPlan, rule: ReadRule) -> bool:
    """Whether a forward may go on with what a rule has chosen in an earlier one."""
    if rule.pick is None:
        return read.holds
    readers = [r for other in plan.reads for r in other.rules if _asks_for(r, rule.pick)]
    return not all(_fires_with(rule, trigger) for r in readers for trigger in r.triggers or _ALWAYS)


_ALWAYS = (Trigger("chunk"), Trigger("step"))


def _asks_for(rule: ReadRule, pick: int) -> bool:
    return any(isinstance(term, Region) and term.pick == pick for term in rule.terms)


def _fires_with(rule: ReadRule, trigger: Trigger) -> bool:
    """Whether a rule fires in every forward in which a trigger may."""
    if trigger.kind == "when":
        return all(_fires_with(rule, other) for other in _ALWAYS)
    sure = [t for t in rule.triggers if t.cond is None and t.kind in _WITH[trigger.kind]]
    return any(t.kind != "every" or t.n == trigger.n for t in sure)


def _newest(source: QuerySource) -> int:
    """How many of the newest queries a formula can ask the ring for."""
    return {"last": source.width, "peek": source.width, "previous": 2}.get(source.kind, 1)


def _missing(name: str, b: int, seq: Progress, width: int) -> str:
    return (
        f"{name} is to decide by the newest {width} queries of sequence {b}, and crop() has taken some back that "
        f"had replaced those before position {seq.lost}: feed at least {seq.lost + width - seq.seen} tokens at once, "
        "or run the conversation again without a cache"
    )


def _bits(name: str, triggers: tuple[Trigger, ...]) -> list[tuple[int, Trigger]]:
    """The bit of `Site.fires` that says of each trigger that it has fired; those without a condition share one."""
    found, bit = [], 1
    for trigger in triggers:
        bit <<= trigger.cond is not None
        found.append((SLIDES if trigger.kind == "slide" else 1 if trigger.cond is None else bit, trigger))
    if bit >= SLIDES:
        raise KvCompileError(f"{name} has more than six triggers with a condition")
    return found
