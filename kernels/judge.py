"""What a decision needs beside its scores: where rows stand, their numbers, who decides, and how it is carried out."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kvcompile.kernels.compete import Place
from kvcompile.kernels.counts import count_value, scalars_of
from kvcompile.kernels.evaluate import number
from kvcompile.kernels.gather import Fresh, apply, gather_rows
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.losers import settle
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Term, Trigger
from kvcompile.kernels.ranks import across
from kvcompile.kernels.rows import Rows

UNCONDITIONED = 1  # bit of Site.fires: a trigger without a condition has fired
SLIDES = 128  # bit of Site.fires: entries may have left a sliding window


def gather_in_place(
    plan: PolicyPlan,
    site: Site,
    sequences: list[int],
    heads: list[int],
    keys: bool,
    scale: float,
    fresh: Fresh | None,
) -> tuple[Rows, Tensor, Tensor]:
    """`gather_rows` where a piece's real tokens are in the pools already, and its peeked ones can still be read."""
    if fresh is None or fresh.real == fresh.k.shape[1]:
        return gather_rows(plan, site, sequences, heads, keys, scale)
    n = fresh.real
    peeked = Fresh(fresh.q[:, :, n:], fresh.k[:, n:], fresh.v[:, n:], fresh.state[:, :, :0], 0, fresh.start + n)
    return gather_rows(plan, site, sequences, heads, keys, scale, peeked)


def carry_out(plan: PolicyPlan, part: ClassPlan, site: Site, index: Tensor, keep: Tensor, won: Tensor) -> None:
    """Loser actions, marks of winners and drops, in rows whose entries are all in the pools.

    index int64 [rows]; keep, won bool [rows, n], in entry order, false past a row's entries.
    """
    if part.only_picks:
        return
    if part.moves:
        keep = settle(plan, part, site, index, keep)
    apply(site, index, keep, won & keep, part)


def met(plan: PolicyPlan, cls: int, site: Site, rows: Rows) -> Rows:
    """Rows of a class as formulas over heads need them: with the way to those that other processes hold."""
    return rows if plan.shard is None else replace(rows, across=across(plan, cls, int(site.layer)))


def place_of(
    cls: int, site: Site, sequences: list[int], heads: list[int], judged: Tensor | None, first: int = 0
) -> Place:
    """Where the rows of these heads stand, sequence by sequence; first: the model's index of KV head 0 here."""
    count = len(sequences) * len(heads)
    of = tuple(b for b in sequences for _ in heads)
    return Place(cls, (int(site.layer),) * count, tuple(heads) * len(sequences), of, site.picked, judged, first)


def numbers_of(
    plan: PolicyPlan, part: ClassPlan, site: Site, sequences: list[int], heads: list[int], rows: Rows
) -> Tensor:
    """The policy's counts for each row, int64 [counts, rows]; those that read `len` exactly, row by row."""
    return numbers_of_terms(plan, part.keep, site, sequences, heads, rows)


def numbers_of_terms(
    plan: PolicyPlan, terms: tuple[Term, ...], site: Site, sequences: list[int], heads: list[int], rows: Rows
) -> Tensor:
    """As `numbers_of`, for what some terms count."""
    layer, count = int(site.layer), len(plan.counts)
    numbers = site.counts[layer][:, sequences].repeat_interleave(len(heads), 1)
    by_row = [i for i in {t.count for t in terms} if i is not None and "len" in scalars_of(plan.counts[i])]
    if not by_row:
        return numbers
    parts, lengths = numbers[count:].T.tolist(), rows.resident.sum(1).tolist()
    for row, length in enumerate(lengths):
        scalars = scalars_of_clock(site, sequences[row // len(heads)]) | {"len": length}
        for i in by_row:
            numbers[i, row] = count_value(plan.counts[i], scalars, parts[row])
    return numbers


def scalars_of_clock(site: Site, b: int) -> dict[str, int]:
    """The numbers of a sequence that counts may read, in the forward that is running."""
    clock = site.clock[b].tolist()
    return {
        "prompt": clock[Clock.PROMPT],
        "now": clock[Clock.START] + clock[Clock.NEW] - 1,
        "chunk": clock[Clock.NEW],
        "step": clock[Clock.STEP],
    }


def judging(part: ClassPlan, cls: int, site: Site, sequences: list[int], heads: int, rows: Rows) -> Tensor | None:
    """Which rows decide, bool [rows]: some trigger fired without a condition, or with one that holds; None: all do.

    Rows in which only a sliding window moved on (`SLIDES`) decide nothing: they keep all that is still resident.
    """
    if all(t.cond is None for t in part.triggers) and not part.slides:
        return None
    return fired(part.triggers, site.fires[cls, sequences].repeat_interleave(heads).long(), rows)


def fired(triggers: tuple[Trigger, ...], bits: Tensor, rows: Rows) -> Tensor:
    """Where a trigger has fired without a condition, or with one that holds: bool [rows]; bits as in `Site.fires`."""
    judged = (bits & UNCONDITIONED) != 0
    for bit, cond in enumerate([t.cond for t in triggers if t.cond is not None], 1):
        if bool((bits >> bit & 1).any()):
            value = number(cond, rows)
            judged = judged | ((bits >> bit & 1 != 0) & (value != 0) & ~value.isnan())
    return judged
