"""From slots to rows and back: builds `evaluate.Rows` for some heads of some sequences, applies what was decided.

A prefill's rows are the resident entries followed by the piece's fresh ones, which are not in the pools
yet: losers among them never will be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.formulas import reads_keys, sources_of
from kvcompile.kernels.layout import Clock, Site, compact, write
from kvcompile.kernels.plan import ClassPlan, Expr, PolicyPlan, QuerySource, formulas_of
from kvcompile.kernels.rotary import places, places_among, rotate
from kvcompile.kernels.rows import Queries, Rows


@dataclass(frozen=True)
class Fresh:
    """A piece of a sequence before it is in the cache, or of several that are equally far.

    q [kv_heads, group, n, head_dim]; k, v [kv_heads, n, head_dim]; state float32 [states, kv_heads, n], where
    n counts real tokens first, then peeked ones (k, v, q only); `real` is the number of real tokens. The KV heads of
    several sequences follow each other, sequence by sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    real: int
    start: int

    @property
    def pos(self) -> Tensor:
        return torch.arange(self.start, self.start + self.k.shape[1], device=self.k.device)


def sequence(site: Site, b: int, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, kv_heads: int) -> Fresh:
    """Cut sequence b's own tokens out of a right-aligned forward: q [B, q_heads, m, D], k, v [B, kv_heads, m, D]."""
    return together(site, [b], q, k, v, state, kv_heads)


def together(
    site: Site, sequences: list[int], q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, kv_heads: int
) -> Fresh:
    """As `sequence`, for several sequences whose clocks are the same."""
    new, peek, start = site.clock[sequences[0], :3].tolist()
    cut = slice(q.shape[2] - new - peek, q.shape[2])
    real = slice(cut.start, cut.start + new)
    of: slice | list[int] = slice(sequences[0], sequences[0] + 1) if len(sequences) == 1 else sequences
    q, k, v = (t[of][:, :, cut].flatten(0, 1) for t in (q, k, v))
    if state is None:
        state = torch.zeros(0, k.shape[0], new, device=k.device)
    else:
        state = state[:, of][..., real].flatten(1, 2)
    return Fresh(q.unflatten(0, (len(sequences) * kv_heads, -1)), k, v, state, new, start)


AT_ONCE = 1 << 20  # numbers of keys, queries or attention that are taken at a time; one sequence's may be more


def few(sequences: list[int], size: int) -> list[list[int]]:
    """Sequences in groups that can be taken at once, where each takes `size` numbers: of short pieces many, of long
    ones, where nothing would be gained and every copy counts, one by one."""
    step = max(1, AT_ONCE // max(size, 1))
    return [sequences[i : i + step] for i in range(0, len(sequences), step)]


def pieces_of(sequences: list[int], heads: list[int], kv_heads: int) -> list[int]:
    """Where the KV heads of some sequences stand in their `Fresh`."""
    return [i * kv_heads + h for i in range(len(sequences)) for h in heads]


def needs_keys(plan: PolicyPlan, cls: ClassPlan) -> bool:
    """Whether a class's formulas read keys, values or attention; else positions and states are enough to decide."""
    landmarks = [e for u in plan.units for _, e in u.landmarks]
    return reads_keys([*_judged_by(cls), *landmarks])


def query_sources(cls: ClassPlan) -> set[QuerySource]:
    """Whose queries a class's formulas ask for."""
    return sources_of(_judged_by(cls))


def _judged_by(cls: ClassPlan) -> list[Expr]:
    of_losers = [e for loser in cls.losers for e in (loser.when, loser.weight) if e is not None]
    return formulas_of(cls) + of_losers


def with_queries(
    plan: PolicyPlan,
    site: Site,
    sequences: list[int],
    heads: list[int],
    rows: Rows,
    sources: set[QuerySource],
    fresh: Fresh | None,
) -> Rows:
    """Rows of sequences that are equally far, with the queries that their formulas ask for, as they read these rows."""
    kv_heads = plan.facts.kv_heads
    found = {s: gather_queries(site, sequences, heads, kv_heads, s, fresh) for s in sources}
    return replace(rows, queries={s: placed(rows, queries) for s, queries in found.items()})


def placed(rows: Rows, queries: Queries) -> Queries:
    """Under `positions compact` queries turned by their place among what the rows hold; else as they are."""
    if not rows.compact or not queries.pos.shape[1]:
        return queries
    assert rows.rope is not None
    place = places_among(queries.pos.clamp(min=0), rows.pos, rows.readable)
    return Queries(rotate(queries.q, place[:, None], rows.rope), queries.pos)


def gather_queries(
    site: Site, sequences: list[int], heads: list[int], kv_heads: int, source: QuerySource, fresh: Fresh | None
) -> Queries:
    """The queries of a source for some KV heads of sequences that are equally far, as the model gave them.

    `last` and `previous` read the ring of newest queries; `peek` the piece's peeked tokens, in the last piece the
    ring; `forward` and `sample` this forward's own. Of a sample without any query one that is absent is left.
    """
    picks, b = pieces_of(sequences, heads, kv_heads), sequences[0]
    rows = len(picks)
    if source.kind in ("forward", "sample") and fresh is not None:
        own = Queries(fresh.q[picks][:, :, : fresh.real], fresh.pos[: fresh.real].expand(rows, -1))
        return own if source.kind == "forward" else sampled(own, source)
    if source.kind == "peek" and fresh is not None and not int(site.clock[b, Clock.ENDS]):
        return Queries(fresh.q[picks][:, :, fresh.real :], fresh.pos[fresh.real :].expand(rows, -1))
    width = source.width if source.kind in ("last", "peek") else 1
    newest = int(site.clock[b, Clock.START] + site.clock[b, Clock.NEW]) - 1 - (source.kind == "previous")
    pos = torch.arange(newest - width + 1, newest + 1, device=site.ring.device)
    ring = site.ring[sequences].unflatten(1, (kv_heads, -1)).flatten(0, 1)[picks]
    found = Queries(ring[:, :, pos % site.ring.shape[2]], pos.clamp(min=-1).expand(rows, -1))
    return sampled(found, source) if source.kind == "sample" else found


def sampled(queries: Queries, source: QuerySource) -> Queries:
    """Those of some queries, the same positions in each row, that belong to the sample; one absent where none does."""
    pos, part = queries.pos[0], source.part
    due = pos * part.numerator // part.denominator > (pos - 1) * part.numerator // part.denominator
    chosen = (due & (pos >= 0)).nonzero().flatten()
    if not len(chosen):
        return Queries(torch.zeros_like(queries.q[:, :, :1]), torch.full_like(queries.pos[:, :1], -1))
    return Queries(queries.q[:, :, chosen], queries.pos[:, chosen])


def gather_rows(
    plan: PolicyPlan,
    site: Site,
    sequences: list[int],
    heads: list[int],
    keys: bool,
    scale: float,
    fresh: Fresh | None = None,
) -> tuple[Rows, Tensor, Tensor]:
    """The same KV heads of some sequences (equally far ones where `fresh` comes in), sequence by sequence.

    Returns the rows in position order; the column order that led there, int64 [rows, n] (column c is entry
    order[row, c]: resident entries by their place in the row, then fresh ones); and the rows' indices.
    """
    base, kv_heads = site.base(plan.facts.kv_heads), plan.facts.kv_heads
    index = torch.tensor([base + b * kv_heads + h for b in sequences for h in heads], device=site.k.device)
    lengths = site.length[index].long()
    width = int(lengths.max())
    slots = site.slot_matrix(index, width)
    there = torch.arange(width, device=slots.device) < lengths[:, None]
    pos = site.pos[slots].long().masked_fill(~there, -1)
    resident, readable, frozen = there, there, (site.frozen[slots] != 0) & there
    state = site.state[:, slots].masked_fill(~there, 0)
    # Slots that no entry has used hold anything, NaN too, and 0 * NaN would reach a sum.
    k, v = (pool[slots].masked_fill(~there[..., None], 0) if keys and width else None for pool in (site.k, site.v))
    if fresh is not None:
        picks, n = pieces_of(sequences, heads, kv_heads), fresh.k.shape[1]
        count = len(picks)
        real = torch.arange(n, device=slots.device) < fresh.real
        pos = torch.cat([pos, fresh.pos.expand(count, -1)], 1)
        resident = torch.cat([resident, real.expand(count, -1)], 1)
        readable = torch.cat([readable, torch.ones(count, n, dtype=torch.bool, device=slots.device)], 1)
        frozen = torch.cat([frozen, torch.zeros(count, n, dtype=torch.bool, device=slots.device)], 1)
        pad = torch.zeros(state.shape[0], count, n - fresh.real, device=slots.device)
        state = torch.cat([state, fresh.state[:, picks], pad], 2)
        if keys:
            k = fresh.k[picks] if k is None else torch.cat([k, fresh.k[picks]], 1)
            v = fresh.v[picks] if v is None else torch.cat([v, fresh.v[picks]], 1)
    if not pos.shape[1]:  # rows that have dropped all: a column without an entry, for what reduces over entries
        pos, state = F.pad(pos, (0, 1), value=-1), F.pad(state, (0, 1))
        resident, readable, frozen = (F.pad(t, (0, 1)) for t in (resident, readable, frozen))
        k, v = (pool.new_zeros(*pos.shape, pool.shape[1]) if keys else None for pool in (site.k, site.v))
    order = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
    if bool((pos[:, 1:] < pos[:, :-1]).any()):
        order = torch.argsort(pos, dim=1, stable=True)
        pos, resident, readable, frozen = (t.gather(1, order) for t in (pos, resident, readable, frozen))
        state = state.gather(2, order.expand_as(state))
        k, v = (None if t is None else t.gather(1, order[..., None].expand_as(t)) for t in (k, v))
    clock = site.clock[sequences].repeat_interleave(len(heads), 0)
    raw, bias = None, None
    if plan.compact and k is not None:
        # An entry without position has been turned by no place and never is.
        raw, k = k, torch.where((pos < 0)[..., None], k, rotate(k, places(pos, readable), site.rope))
    if plan.folds:
        tokens = state[[s.name for s in plan.states].index("@count")]
        bias = torch.where(resident & (pos < 0), tokens.log(), 0.0)
    now = clock[:, Clock.START] + clock[:, Clock.NEW] - 1
    reach = plan.facts.reach(int(site.layer))
    if reach:  # what no later query can read competes for nothing, and goes with the next decision
        resident = resident & ((pos > now[:, None] + 1 - reach) | (pos < 0))
    sink = None
    if site.sink.shape[0]:
        sink = site.sink[int(site.layer)].unflatten(0, (kv_heads, -1))[index % kv_heads]
    rows = Rows(
        pos=pos,
        resident=resident,
        readable=readable,
        frozen=frozen,
        now=now,
        prompt=clock[:, Clock.PROMPT],
        state={s.name: state[i] for i, s in enumerate(plan.states)},
        scale=scale,
        k=k,
        v=v,
        layer=int(site.layer),
        heads=index % kv_heads,
        step=clock[:, Clock.STEP],
        chunk=clock[:, Clock.NEW],
        bias=bias,
        rope=site.rope if site.rope.shape[1] else None,
        compact=plan.compact,
        raw=raw,
        sequences=len(sequences),
        cap=plan.facts.softcap,
        reach=reach,
        sink=sink,
        first=plan.first_head,
        units=plan.units,
        index=torch.arange(len(pos), device=pos.device),
    )
    return rows, order, index


def apply(site: Site, rows: Tensor, keep: Tensor, won: Tensor, cls: ClassPlan) -> None:
    """Carry out a decision on resident entries: keep and won bool [rows, n], in entry order."""
    if bool(won.any()):
        site.frozen[site.slot_matrix(rows, keep.shape[1])[won]] = 1
    compact(site, rows, keep, cls.by_position)


def apply_fresh(
    plan: PolicyPlan,
    site: Site,
    sequences: list[int],
    heads: list[int],
    keep: Tensor,
    won: Tensor,
    cls: ClassPlan,
    fresh: Fresh,
) -> None:
    """Carry out a decision on what is resident and what comes in: bool [rows, n] each, fresh entries last."""
    kv_heads = plan.facts.kv_heads
    base, width = site.base(kv_heads), keep.shape[1] - fresh.k.shape[1]
    rows = [base + b * kv_heads + h for b in sequences for h in heads]
    apply(site, torch.tensor(rows, device=site.k.device), keep[:, :width], won[:, :width], cls)
    picks = torch.tensor(pieces_of(sequences, heads, kv_heads), device=keep.device)
    row, entry = keep[:, width:].nonzero(as_tuple=True)
    of = picks[row]
    write(
        site, rows, keep[:, width:].sum(1).tolist(), fresh.k[of, entry], fresh.v[of, entry], fresh.pos[entry],
        won[:, width:][row, entry], fresh.state[:, of, entry],
    )  # fmt: skip
