"""Decisions that need all layers: layers that compete, and shares that follow from what the layers' entries score.

While the layers run, `note_scores` leaves each entry's scores in hidden states of the pools (`@score:C:I` of
selection I of class C, `@share:S` of share S). After the last layer `evict_span` divides shares and decides.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.compete import Place
from kvcompile.kernels.counts import all_numbers, leaders_of_share, share_total, spread
from kvcompile.kernels.evaluate import number, score
from kvcompile.kernels.formulas import reads_keys, sources_of
from kvcompile.kernels.gather import Fresh, gather_rows, with_queries
from kvcompile.kernels.judge import carry_out, gather_in_place, judging, met, numbers_of, place_of, scalars_of_clock
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, UnitPlan
from kvcompile.kernels.ranks import everyone, gathered
from kvcompile.kernels.reads import with_reads
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.select import Plainly, keep_mask, region_mask
from kvcompile.kernels.shares import by_cover, by_softmax
from kvcompile.kernels.units import full, of_units, reads_next


def competes(part: ClassPlan) -> bool:
    """Whether layers compete in some selection of a class."""
    return any(term.layers == "across" for term in part.selections)


def waits(plan: PolicyPlan, step: bool) -> tuple[int, ...]:
    """The classes that are decided after the last layer, in order: in a step only those whose layers compete."""
    classes = range(len(plan.classes))
    return tuple(cls for cls in classes if plan.spans(cls) and (not step or competes(plan.classes[cls])))


def measured_shares(plan: PolicyPlan, cls: int) -> tuple[int, ...]:
    """Shares of a class that follow from entries."""
    return tuple(share for share in plan.shares_of(cls) if plan.shares[share].measured)


def note_scores(plan: PolicyPlan, cls: int, site: Site, b: int, scale: float, fresh: Fresh | None) -> None:
    """Leave the scores of one layer's rows of a class in their hidden states; the rows hold all entries already.

    Selections if the class fires in sequence b, measured shares if its prompt ends here. fresh: the piece's tokens,
    None after a step.
    """
    part, heads = plan.classes[cls], list(plan.heads(int(site.layer), cls))
    ends = fresh is not None and bool(site.clock[b, Clock.ENDS])
    shares = measured_shares(plan, cls) if ends else ()
    terms = part.selections if bool(site.fires[cls, b]) else ()
    if not heads or not (shares or terms):
        return
    formulas = [term.score for term in terms] + [s for i in shares if (s := plan.shares[i].score) is not None]
    formulas += [e for unit in plan.units for _, e in unit.landmarks]
    rows, order, index = gather_in_place(plan, site, [b], heads, reads_keys(formulas), scale, fresh)
    if any(source.kind in ("forward", "sample") for source in sources_of(formulas)):
        rows = with_reads(plan, site, [b], heads, rows, fresh)
    rows = met(plan, cls, site, with_queries(plan, site, [b], heads, rows, sources_of(formulas), fresh))
    for i, term in enumerate(terms):
        _note(plan, site, f"@score:{cls}:{i}", index, order, _score(plan, part, site, b, rows, term, set(shares)))
    for i in shares:
        formula = plan.shares[i].score
        assert formula is not None
        if plan.shares[i].by == "softmax":
            values = number(formula, rows)[:, None].expand(rows.pos.shape)
        else:
            values = score(formula, rows, rows.resident & (rows.pos >= 0))
        _note(plan, site, f"@share:{i}", index, order, values)


def _score(
    plan: PolicyPlan, part: ClassPlan, site: Site, b: int, rows: Rows, term: Selection, unknown: set[int]
) -> Tensor:
    """One score per entry, float32 [rows, n]. Candidates: no region's, as far as regions do not read `unknown` shares.

    ValueError where a score has one value per query head, for which there is no room.
    """
    if term.scope == "query_head":
        raise ValueError("a class that waits for all layers cannot select per query head")
    heads = rows.heads.tolist() if rows.heads is not None else []
    numbers = numbers_of(plan, part, site, [b], heads, rows)
    place = place_of(0, site, [b], heads, None, plan.first_head)
    candidates = rows.resident & (rows.pos >= 0)
    for region in part.keep:
        if isinstance(region, Region) and not unknown & _shares_in(plan, region.count):
            candidates &= ~region_mask(plan, region, rows, numbers, place)
    name = term.unit or term.whole
    unit = plan.unit(name) if name else None
    if unit is not None:
        candidates &= full(rows, unit, needs_next=reads_next(term, unit))
    if term.observed and bool(site.clock[b, Clock.ENDS]):
        candidates &= rows.pos <= (rows.now - term.observed)[:, None]
    formula = of_units(term.score) if term.whole else term.score
    return score(formula, rows, candidates, unit)


def _shares_in(plan: PolicyPlan, count: int | None) -> set[object]:
    return set() if count is None else {n.value for n in plan.counts[count].expr.walk() if n.op == "share"}


def _note(plan: PolicyPlan, site: Site, name: str, index: Tensor, order: Tensor, values: Tensor) -> None:
    """Write one value per entry, float32 [rows, n] in the rows' order, into a state of theirs."""
    state = [s.name for s in plan.states].index(name)
    values = torch.zeros_like(values, dtype=torch.float32).scatter(1, order, values.float())
    width = int(site.length[index].max())
    there = torch.arange(width, device=values.device) < site.length[index][:, None]
    site.state[state, site.slot_matrix(index, width)[there]] = values[:, :width][there]


def evict_span(plan: PolicyPlan, sites: list[Site], scale: float, step: bool) -> Tensor:
    """After the last layer: divide measured shares where a prompt ends, decide every class that has waited.

    sites: all layers' in order; step: whether the forward was a step, in which only competing layers wait.
    Returns the parts of measured shares, int64 [shares, layers, batch], meaningful where a prompt ended; they and
    the counts that follow are in `Site.counts`, too.
    """
    first = sites[0]
    parts = torch.zeros(len(plan.shares), plan.facts.layers, first.batch, dtype=torch.int64, device=first.k.device)
    for b in range(first.batch):
        if not step and bool(first.clock[b, Clock.ENDS]):
            _divide(plan, sites, b, parts)
    for cls in waits(plan, step):
        for b in first.fires[cls].nonzero().flatten().tolist():
            if step:
                for layer in plan.class_layers(cls):
                    note_scores(plan, cls, sites[layer], b, scale, None)
            _decide(plan, cls, sites, b, scale)
    return parts


# -- shares ------------------------------------------------------------------------------------------------------------


def _divide(plan: PolicyPlan, sites: list[Site], b: int, parts: Tensor) -> None:
    """Divide the measured shares of sequence b by what is noted, and count anew."""
    first = sites[0]
    scalars = scalars_of_clock(first, b)
    measured: dict[int, tuple[int, ...]] = {}
    for i, share in enumerate(plan.shares):
        if not share.measured:
            continue
        noted = [_noted(plan, i, sites[layer], b) for layer in leaders_of_share(plan, i)]
        total = share_total(share, scalars)
        if share.by == "softmax":
            found = by_softmax(total, [_mean_number(rows) for rows in noted])
        else:
            found = by_cover(total, [_mean_by_position(rows) for rows in noted])
        measured[i] = spread(plan, i, found)
        parts[i, :, b] = torch.tensor(measured[i], device=parts.device)
    if measured:
        numbers = torch.tensor(all_numbers(plan, scalars, measured), device=first.counts.device)
        first.counts[:, :, b] = numbers.T


def _noted(plan: PolicyPlan, share: int, site: Site, b: int) -> list[tuple[Tensor, Tensor]]:
    """(positions, noted values) of each row of one layer that uses a share, wherever it is, lower heads first; entries
    that have a position and have not left their window."""
    state = [s.name for s in plan.states].index(f"@share:{share}")
    using = [cls for cls in range(len(plan.classes)) if share in plan.shares_of(cls)]
    heads = sorted({head for cls in using for head in plan.heads(int(site.layer), cls)})
    base = site.base(plan.facts.kv_heads) + b * plan.facts.kv_heads
    seen, reach = int(site.clock[b, Clock.START] + site.clock[b, Clock.NEW]), plan.facts.reach(int(site.layer))
    oldest = max(0, seen + 1 - reach) if reach else 0
    found = []
    for row in (base + head for head in heads):
        slots = site.slots(row, 0, int(site.length[row]))
        pos = site.pos[slots].long()
        there = pos >= oldest
        found.append((pos[there], site.state[state, slots[there]]))
    return found if plan.shard is None else _of_all(plan, found, site.k.device)


def _of_all(plan: PolicyPlan, mine: list[tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """What all processes have noted; a place without an entry has position -1."""
    width = max((len(pos) for pos, _ in mine), default=0)
    own = torch.full((len(mine), width, 2), -1.0, dtype=torch.float64, device=device)
    for row, (pos, values) in zip(own, mine, strict=True):
        row[: len(pos), 0], row[: len(pos), 1] = pos.double(), values.double()
    rows = [row for part in gathered(plan, own, everyone(plan)) for row in part]
    there = [(row, row[:, 0] >= 0) for row in rows]
    return [(row[at, 0].long(), row[at, 1].float()) for row, at in there]


def _mean_number(rows: list[tuple[Tensor, Tensor]]) -> float:
    """The mean of the rows' numbers, each of which is noted on every entry; NaN where no row holds one."""
    numbers = [float(values[0]) for _, values in rows if len(values)]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def _mean_by_position(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The rows' mean of each position's value, older first, NaN and negative ones as 0: float64 [positions]."""
    pos = torch.cat([pos for pos, _ in rows])
    values = torch.cat([torch.where(values > 0, values, 0).double() for _, values in rows])
    places, which = pos.unique(return_inverse=True)
    return values.new_zeros(len(places)).index_add(0, which, values) / len(rows)


# -- decisions ---------------------------------------------------------------------------------------------------------


class _Noted(Plainly):
    """Scores as they were noted."""

    def __init__(self, plan: PolicyPlan, cls: int) -> None:
        self.plan, self.cls = plan, cls

    def score(self, term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor:  # type: ignore[override]
        whole = [replace(t, score=of_units(t.score)) if t.whole else t for t in self.plan.classes[self.cls].selections]
        return rows.state[f"@score:{self.cls}:{whole.index(term)}"]


def _decide(plan: PolicyPlan, cls: int, sites: list[Site], b: int, scale: float) -> None:
    """Judge all rows of a class in one sequence together, and carry it out layer by layer."""
    part = plan.classes[cls]
    conditions = [t.cond for t in part.triggers if t.cond is not None]
    found = []
    for layer in plan.class_layers(cls):
        site, heads = sites[layer], list(plan.heads(layer, cls))
        if not heads:  # another process has them all
            continue
        rows, order, index = gather_rows(plan, site, [b], heads, reads_keys(conditions), scale)
        if conditions:
            rows = met(plan, cls, site, with_queries(plan, site, [b], heads, rows, sources_of(conditions), None))
        judged = judging(part, cls, site, [b], len(heads), rows)
        numbers = numbers_of(plan, part, site, [b], heads, rows)
        found.append((site, heads, rows, order, index, judged, numbers))
    if not found:
        return
    all_rows = _joined([rows for _, _, rows, *_ in found])
    known = [judged for *_, judged, _ in found if judged is not None]
    judged = torch.cat(known) if known else None
    place = Place(
        cls,
        tuple(int(site.layer) for site, heads, *_ in found for _ in heads),
        tuple(h for _, heads, *_ in found for h in heads),
        (b,) * len(all_rows.pos),
        sites[0].picked,
        judged,
        plan.first_head,
    )
    ends = sites[0].clock[b, Clock.ENDS].bool().expand(len(all_rows.pos))
    numbers = torch.cat([n for *_, n in found], 1)
    keep, won = keep_mask(plan, part, all_rows, numbers, ends, _Noted(plan, cls), place)
    if judged is not None:
        keep, won = torch.where(judged[:, None], keep, all_rows.resident), won & judged[:, None]
    at = 0
    for site, heads, rows, order, index, *_ in found:
        mine, width = slice(at, at + len(heads)), rows.pos.shape[1]
        kept, chosen = (torch.zeros_like(x[mine, :width]).scatter(1, order, x[mine, :width]) for x in (keep, won))
        carry_out(plan, part, site, index, kept, chosen)
        at += len(heads)


def _joined(parts: list[Rows]) -> Rows:
    """Rows of several layers as one matrix, for what reads positions, marks and states alone."""
    width = max(rows.pos.shape[1] for rows in parts)

    def joined(tensors: list[Tensor], fill: float) -> Tensor:
        return torch.cat([F.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])

    names = parts[0].state
    return replace(
        parts[0],
        pos=joined([rows.pos for rows in parts], -1),
        resident=joined([rows.resident for rows in parts], False),
        readable=joined([rows.readable for rows in parts], False),
        frozen=joined([rows.frozen for rows in parts], False),
        now=torch.cat([rows.now for rows in parts]),
        prompt=torch.cat([rows.prompt for rows in parts]),
        state={name: joined([rows.state[name] for rows in parts], 0.0) for name in names},
        k=None,
        v=None,
        raw=None,
        queries=None,
        bias=None,
        heads=None,
        step=None,
        chunk=None,
    )
