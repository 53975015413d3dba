"""What becomes of an entry's states: first values, `on insert`, `on attend`, `on step`. Written once, for every layout.

Takes a plan, a layer's tensors and the tokens of a forward; changes states in place. Guarantees: however a prompt is
cut, padded or batched, the same states; nothing is changed by a query that was before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType

import torch
from torch import Tensor

from kvcompile.kernels.arithmetic import holds
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.evaluate import FORWARD, Leaves, evidence, score
from kvcompile.kernels.formulas import sources_of, states_read
from kvcompile.kernels.gather import Fresh, gather_rows, placed, sampled, sequence
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import Expr, PolicyPlan, QuerySource, StatePlan, Update, evidence_of, words_of
from kvcompile.kernels.ranks import across
from kvcompile.kernels.reads import HELD, held_set, holds_sets, with_reads
from kvcompile.kernels.rotary import rotate
from kvcompile.kernels.rows import Queries, Rows, readable_by

BLOCK = 256  # queries whose probabilities are held at a time
Weights = Mapping[str, Tensor]
UNTRAINED: Weights = MappingProxyType({})  # of a policy without trained scores
Growth = Callable[[tuple[StatePlan, ...], Rows, Fresh], dict[str, Tensor]]


def follow_reads(plan: PolicyPlan) -> bool:
    """Whether states change after a read, so that the read has to leave its probabilities behind."""
    return any(s.add is not None for s in plan.states) or any(u.event != "insert" for u in plan.updates)


# -- new entries -----------------------------------------------------------------------------------------------------


def first_states(plan: PolicyPlan, site: Site, b: int, fresh: Fresh, weights: Weights) -> Tensor:
    """What a piece's real entries start with, `on insert` included: float32 [states, kv_heads, real].

    They are not in the pools yet. Formulas may read the own token's q, k, v, its position, which is `now`, and `len`.
    """
    pos, heads = fresh.pos[: fresh.real], plan.facts.kv_heads
    inserts = [u for u in plan.updates if u.event == "insert"]
    if not inserts and all(_known(s.init) for s in plan.states):
        return plain_states(plan, pos)[:, None].expand(-1, heads, -1)
    formulas = [*(s.init for s in plan.states), *_formulas(inserts)]
    if any(n.op == "reduce" and words_of(n)[1] in "iu" for f in formulas for n in f.walk()):
        raise KvCompileError("a new entry's state cannot be reduced over the entries of its row")
    rows, leaves = _newcomers(plan, site, b, fresh, weights)
    for state in plan.states:
        rows.state[state.name] = score(state.init, rows, rows.resident, leaves=leaves)
    _assign(inserts, rows, leaves)
    return torch.stack([rows.state[s.name] for s in plan.states])


def starts_plainly(plan: PolicyPlan) -> bool:
    """Whether new entries' states are numbers or their own positions, see `plain_states`."""
    return all(_known(s.init) for s in plan.states) and all(u.event != "insert" for u in plan.updates)


def plain_states(plan: PolicyPlan, pos: Tensor) -> Tensor:
    """First states of entries at `pos` [n], where they need no formula: float32 [states, n]."""
    if not plan.states:
        return torch.zeros(0, *pos.shape, device=pos.device)
    return torch.stack([_plain(s.init, pos) for s in plan.states])


def _known(init: Expr) -> bool:
    return init.op == "const" or (init.op, init.value) in (("scalar", "now"), ("field", "pos"))


def _plain(init: Expr, pos: Tensor) -> Tensor:
    if isinstance(init.value, (Fraction, int, float)):
        return torch.full(pos.shape, float(init.value), device=pos.device)
    return pos.float()


def _newcomers(plan: PolicyPlan, site: Site, b: int, fresh: Fresh, weights: Weights) -> tuple[Rows, Leaves]:
    """A piece's entries alone, each with its own query, and what is a number of each entry instead of the row."""
    heads, real = plan.facts.kv_heads, slice(0, fresh.real)
    base = site.base(heads) + b * heads
    pos = fresh.pos[real].expand(heads, -1)
    there = torch.ones_like(pos, dtype=torch.bool)
    held = site.length[base : base + heads].long()[:, None]
    q, k = fresh.q[:, :, real], fresh.k[:, real]
    if plan.compact:
        place = held + torch.arange(fresh.real, device=pos.device) - _without_position(plan, site, base)
        q, k = rotate(q, place[:, None], site.rope), rotate(k, place, site.rope)
    clock = site.clock[b].expand(heads, -1)
    rows = Rows(
        pos=pos,
        resident=there,
        readable=there,
        frozen=~there,
        now=pos[:, -1],
        prompt=clock[:, Clock.PROMPT],
        state={},
        k=k,
        v=fresh.v[:, real],
        layer=int(site.layer),
        heads=torch.arange(heads, device=pos.device),
        step=clock[:, Clock.STEP],
        chunk=clock[:, Clock.NEW],
        rope=site.rope if site.rope.shape[1] else None,
        compact=plan.compact,
        raw=fresh.k[:, real] if plan.compact else None,
        own=q,
        weights=weights,
        first=plan.first_head,
        across=across(plan, None, int(site.layer)),
    )
    count = held + 1 + torch.arange(fresh.real, device=pos.device)
    return rows, {("scalar", "now"): pos, ("scalar", "len"): count, ("field", "age"): torch.zeros_like(pos)}


def _without_position(plan: PolicyPlan, site: Site, base: int) -> Tensor:
    """How many entries of each row have no position and so no place: int64 [kv_heads, 1]."""
    rows = range(base, base + plan.facts.kv_heads)
    folded = [int((site.pos[site.slots(r, 0, int(site.length[r]))] < 0).sum()) if plan.folds else 0 for r in rows]
    return torch.tensor(folded, device=site.pos.device)[:, None]


# -- a piece of a prompt ---------------------------------------------------------------------------------------------


def growth(states: tuple[StatePlan, ...], rows: Rows, fresh: Fresh) -> dict[str, Tensor]:
    """What a piece's queries add to each state: name -> float32 [kv_heads, n], in the rows' order.

    Runs block by block over queries, whose sums add up.
    """
    grown = {s.name: torch.zeros_like(rows.state[s.name]) for s in states if s.add is not None}
    for at in range(0, fresh.real if grown else 0, BLOCK):
        asked = _asked(rows, fresh, slice(at, min(at + BLOCK, fresh.real)))
        for state in states:
            if state.add is None:
                continue
            sources = sources_of([state.add])
            part = replace(rows, queries={s: _of(asked, s) for s in sources} or {FORWARD: asked})
            grown[state.name] += score(state.add, part, rows.resident, among=rows.readable, causal=True)
    return grown


def observe(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights,
    growth: Growth = growth,
) -> Tensor:  # fmt: skip
    """States in a piece: new entries get theirs, then every entry's change as the piece's real queries say.

    Resident entries' states change in place; returns those of the piece's entries, float32
    [states, B, kv_heads, m], right-aligned. A backend may bring its own `growth`, with the same meaning.
    """
    facts = plan.facts
    out = torch.zeros(len(plan.states), q.shape[0], facts.kv_heads, q.shape[2], device=q.device)
    heads = list(range(facts.kv_heads))
    updates = [u for u in plan.updates if u.event == "attend"]
    in_turn = _in_turn(plan, updates)
    for b in range(site.batch):
        fresh = sequence(site, b, q, k, v, None, facts.kv_heads)
        if not fresh.real:
            continue
        fresh = _real_only(fresh, first_states(plan, site, b, fresh, weights))
        stop = q.shape[2] - int(site.clock[b, Clock.PEEK])
        own = out[:, b, :, stop - fresh.real : stop]
        if not updates and all(s.add is None for s in plan.states) and not holds_sets(plan):
            own.copy_(fresh.state)
            continue
        rows, order, index = gather_rows(plan, site, [b], heads, True, scale, fresh)
        rows = replace(rows, weights=weights, state=dict(rows.state), across=across(plan, None, int(site.layer)))
        rows = with_reads(plan, site, [b], heads, rows, fresh)
        if holds_sets(plan):
            rows.state[HELD] = held_set(plan, rows, _asked(rows, fresh, slice(fresh.real - 1, fresh.real)))
        for name, more in growth(tuple(s for s in plan.states if s not in in_turn), rows, fresh).items():
            rows.state[name] = rows.state[name] + more
        if updates:
            _one_by_one(in_turn, updates, rows, fresh)
        own.copy_(_put_back(plan, site, rows, order, index))
    return out


def _in_turn(plan: PolicyPlan, updates: list[Update]) -> list[StatePlan]:
    """States with a sum whose running value some update reads or sets: they have to grow query by query."""
    met = states_read(_formulas(updates)) | {name for u in updates for name, _ in u.assigns}
    return [s for s in plan.states if s.add is not None and s.name in met]


def _one_by_one(sums: list[StatePlan], updates: list[Update], rows: Rows, fresh: Fresh) -> None:
    """`on attend`, a query at a time in position order: its sums first, then the updates as they are written."""
    formulas = [s.add for s in sums if s.add is not None] + _formulas(updates)
    sources = sources_of(formulas) or {FORWARD}
    reads = any(n.op == "evidence" and evidence_of(n) == ("attn", FORWARD) for f in formulas for n in f.walk())
    older = rows.pos.shape[1] - fresh.real  # the piece's entries are the newest, so the last columns of every row
    for at in range(0, fresh.real, BLOCK):
        asked = _asked(rows, fresh, slice(at, min(at + BLOCK, fresh.real)))
        attn = evidence(replace(rows, queries={FORWARD: asked}), FORWARD, "attn") if reads else None
        for i in range(asked.pos.shape[1]):
            this = Queries(asked.q[:, :, i : i + 1], asked.pos[:, i : i + 1])
            seen = rows.until(older + at + i + 1)
            seen = replace(
                seen,
                now=this.pos[:, 0],
                queries={s: _of(this, s) for s in sources},
                attn=None if attn is None else attn[:, :, i : i + 1, : seen.pos.shape[1]],
            )
            _grow(sums, seen)
            _assign(updates, seen, None)
            for name in {s.name for s in sums} | {name for u in updates for name, _ in u.assigns}:
                rows.state[name][:, : seen.pos.shape[1]] = seen.state[name]


def _asked(rows: Rows, fresh: Fresh, block: slice) -> Queries:
    """Some of a piece's queries, as they read these rows."""
    return placed(rows, Queries(fresh.q[:, :, block], fresh.pos[block].expand(len(rows.pos), -1)))


def _of(queries: Queries, source: QuerySource) -> Queries:
    """This forward's queries as a source has them; the newest of one is itself."""
    return sampled(queries, source) if source.kind == "sample" else queries


def _real_only(fresh: Fresh, state: Tensor) -> Fresh:
    """Without peeked tokens, which leave no states; with the states that new entries start from."""
    real = slice(0, fresh.real)
    return replace(fresh, q=fresh.q[:, :, real], k=fresh.k[:, real], v=fresh.v[:, real], state=state)


# -- a step ----------------------------------------------------------------------------------------------------------


def grow_states(plan: PolicyPlan, site: Site, rows: Rows, order: Tensor, index: Tensor) -> None:
    """`on attend` and then `on step`, after a step's read has left its query and its probabilities in the rows."""
    formulas = [s.add for s in plan.states if s.add is not None] + _formulas(plan.updates)
    queries = (rows.queries or {})[FORWARD]
    known = {s: _of(queries, s) for s in sources_of(formulas)} | {FORWARD: queries}
    rows = replace(rows, queries=known, state=dict(rows.state), across=across(plan, None, int(site.layer)))
    _grow([s for s in plan.states if s.add is not None], rows)
    _assign([u for u in plan.updates if u.event == "attend"], rows, None)
    _assign([u for u in plan.updates if u.event == "step"], rows, None)
    _put_back(plan, site, rows, order, index)


# -- what they share -------------------------------------------------------------------------------------------------


def _formulas(updates: Iterable[Update]) -> list[Expr]:
    return [e for u in updates for e in (*(value for _, value in u.assigns), u.where) if e is not None]


def _grow(states: list[StatePlan], rows: Rows) -> None:
    """Let states grow by what the rows' queries add; all entries were there before them."""
    for state in states:
        if state.add is not None:
            rows.state[state.name] = rows.state[state.name] + score(state.add, rows, rows.resident, among=_read(rows))


def _assign(updates: list[Update], rows: Rows, leaves: Leaves | None) -> None:
    """Set the rows' states, assignments left to right, where the entry's condition holds."""
    among = _read(rows)
    for update in updates:
        there = rows.resident
        if update.where is not None:
            there = there & holds(score(update.where, rows, rows.resident, leaves=leaves, among=among))
        for name, formula in update.assigns:
            value = score(formula, rows, rows.resident, leaves=leaves, among=among)
            rows.state[name] = torch.where(there, value, rows.state[name])


def _read(rows: Rows) -> Tensor:
    """What the newest query has read, bool [rows, n]: also an entry that has left the window since."""
    return readable_by(rows, rows.now[:, None])[:, 0]


def _put_back(plan: PolicyPlan, site: Site, rows: Rows, order: Tensor, index: Tensor) -> Tensor:
    """File the states of resident entries; returns those of entries after them, float32 [states, kv_heads, fresh]."""
    lengths = site.length[index]
    width = int(lengths.max())
    slots = site.slot_matrix(index, width)
    there = torch.arange(width, device=slots.device) < lengths[:, None]
    rest = []
    for i, state in enumerate(plan.states):
        total = rows.state[state.name]
        total = torch.zeros_like(total).scatter(1, order, total)
        site.state[i, slots[there]] = total[:, :width][there]
        rest.append(total[:, width:])
    return torch.stack(rest)
