"""Sequences moved between and within stores: selected, repeated, put together, cut short. The host waits here.

Takes stores of one plan and layout between forwards; gives stores in which every row holds what it held, at the same
positions, and that count their bytes as any other. On pages a repeated sequence shares its full pages; extents copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvcompile.extents import ExtentStore
from kvcompile.kernels.extent import extent
from kvcompile.kernels.landmarks import forget
from kvcompile.kernels.layout import Site, compact
from kvcompile.kernels.states import follow_reads
from kvcompile.limits import CacheFull, room_in_all
from kvcompile.pages import PagedStore
from kvcompile.sharing import Shared
from kvcompile.store import POOLS, Pools, Store

# What stands beside the pools and belongs to a sequence: name and the dimension that counts sequences.
_BESIDE = (
    ("ring", 1), ("picked", 1), ("clock", 0), ("counts", 2), ("fires", 1), ("marks", 1), ("edges", 1), ("marked", 1),
)  # fmt: skip


def select(store: Store, sequences: Sequence[int]) -> None:
    """In place: sequence i becomes what `sequences[i]` was; repeats and other orders allowed, the rest is released."""
    if list(sequences) == list(range(store.batch)):
        return
    if isinstance(store, PagedStore):
        _select_pages(store, sequences)
    else:
        assert isinstance(store, ExtentStore)
        _select_extents(store, sequences)
    index = torch.tensor(sequences, device=store.device)
    for name, dim in _BESIDE:
        old = getattr(store, name)
        setattr(store, name, _into(old, old.index_select(dim, index)))
    scalar = _by_sequence(store, store.scalar.flatten(1)).index_select(2, index)
    store.scalar = _into(store.scalar, scalar.flatten(2))
    fewer = len(sequences) < store.batch
    store.batch, store.rows = len(sequences), len(sequences) * store.plan.facts.kv_heads
    if fewer:
        store.settle()


def join(store: Store, parts: Sequence[Store]) -> None:
    """An empty store for as many sequences takes copies of those of all these, in order; they stay as they are."""
    store.ahead = max(s.ahead for s in parts)
    store.rope = max((s.rope for s in parts), key=lambda rope: rope.shape[1])
    store.cover(max(s.picked.shape[3] for s in parts))
    store.ring = torch.cat([s.ring for s in parts], 1)
    store.scalar = torch.cat([s.scalar for s in parts], 2)
    store.cover(store.landmarks.span * max(s.marks.shape[2] for s in parts))
    at = 0
    for part in parts:
        own = slice(at, at + part.batch)
        store.picked[:, own, :, : part.picked.shape[3]] = part.picked
        for name in ("marks", "edges"):
            held = getattr(part, name)
            getattr(store, name)[:, own, : held.shape[2]] = held
        store.marked[:, own] = part.marked
        store.clock[own] = part.clock
        at += part.batch
    if isinstance(store, PagedStore):
        _join_pages(store, [s for s in parts if isinstance(s, PagedStore)])
    else:
        assert isinstance(store, ExtentStore)
        _join_extents(store, [s for s in parts if isinstance(s, ExtentStore)])


def unshare(store: Store, sequences: Sequence[int]) -> None:
    """Rows of these sequences share no page any more. CacheFull, and nothing has changed, without room for copies."""
    if isinstance(store, PagedStore):
        rows = torch.zeros(store.plan.facts.layers, store.batch, store.plan.facts.kv_heads, dtype=torch.bool)
        rows[:, list(sequences)] = True
        with room_in_all(store):
            store.own(rows.flatten())


def cut(store: Store, sequence: int, seen: int, slides: bool = False) -> None:
    """In place: entries at position `seen` and later go; with `slides` also what a query at `seen` is too far from.

    Call `unshare` before the first cut.
    """
    kv_heads = store.plan.facts.kv_heads
    for layer in range(store.plan.facts.layers):
        site = store.site(layer)
        start = site.base(kv_heads) + sequence * kv_heads
        index = torch.arange(start, start + kv_heads, device=store.device)
        reach = store.plan.facts.reach(layer) if slides else 0
        compact(site, index, _until(site, index, seen, reach), by_position=True)
        if isinstance(store, PagedStore):
            store.upper[start : start + kv_heads] = site.length[start : start + kv_heads].long().cpu()
    forget(store.marked, store.landmarks, sequence, seen)
    store.settle()


def _until(site: Site, rows: Tensor, seen: int, reach: int) -> Tensor:
    """Which entries stay, bool [rows, n]."""
    width = int(site.length[rows].max())
    slots = site.slot_matrix(rows, width)
    pos = site.pos[slots]
    keep = (torch.arange(width, device=pos.device) < site.length[rows][:, None]) & (pos < seen)
    return keep & ((pos > seen - reach) | (pos < 0)) if reach else keep


@contextlib.contextmanager
def _room_beside(store: Store, sequences: int) -> Iterator[None]:
    """A block that finds room for so many sequences: what stands beside their rows counts in it already."""
    with room_in_all(store), store.claimed(max(0, sequences - store.batch)):
        yield


def _by_sequence(store: Store, rows: Tensor) -> Tensor:
    """[..., layers * rows] as [..., layers, batch, kv_heads]."""
    return rows.unflatten(-1, (store.plan.facts.layers, store.batch, store.plan.facts.kv_heads))


def _into(old: Tensor, new: Tensor) -> Tensor:
    """New content at the old address where that fits: what has captured the address goes on."""
    return old.copy_(new) if old.shape == new.shape else new.contiguous()


# -- extents ---------------------------------------------------------------------------------------------------------


def _select_extents(store: ExtentStore, sequences: Sequence[int]) -> None:
    """The first of a sequence's repeats keeps its extents, the others take those of released sequences or new ones."""
    kv_heads = store.plan.facts.kv_heads
    rows = [b * kv_heads + h for b in sequences for h in range(kv_heads)]
    first = {row: i for i, row in reversed(list(enumerate(rows)))}
    again = [i for i, row in enumerate(rows) if first[row] != i]
    released = [row for row in range(store.rows) if row not in first]
    # Room everywhere before anything is copied, since there may be none.
    with _room_beside(store, len(sequences)):
        homes = [_room(store, layer, rows, again, released) for layer in range(store.plan.facts.layers)]
    tables = [_extents_of(store, layer, rows, again, *found) for layer, found in enumerate(homes)]
    store.length = _into(store.length, store.length[:, rows])
    store.table = _into(store.table, torch.stack(tables))
    store.room = 0  # copies have less of it than rows that once held more


def _room(
    store: ExtentStore, layer: int, rows: list[int], again: list[int], released: list[int]
) -> tuple[list[tuple[int, int]], int]:
    """(start, capacity) for copies of the rows at `again` in a pool that has them, and the first slot then free."""
    lengths = store.length[layer].tolist()
    needs = [extent(lengths[rows[i]]) if lengths[rows[i]] else 0 for i in again]
    homes, top = _homes(store, layer, needs, released)
    if top <= store.pools[layer].slots:
        return homes, top
    store.resize(layer, sum(extent(n) for n in lengths if n) + sum(needs))
    return _homes(store, layer, needs, released)


def _extents_of(
    store: ExtentStore, layer: int, rows: list[int], again: list[int], homes: list[tuple[int, int]], top: int
) -> Tensor:
    """Where rows will lie that continue the old rows `rows`, those at `again` on copies: int64 [rows, 2]."""
    lengths, table = store.length[layer].tolist(), store.table[layer, rows]
    if again:
        counts = [lengths[rows[i]] for i in again]
        starts = [int(table[i, 0]) for i in again]
        source = torch.cat([torch.arange(at, at + n) for at, n in zip(starts, counts, strict=True)])
        target = torch.cat([torch.arange(at, at + n) for (at, _), n in zip(homes, counts, strict=True)])
        _copy_slots(store.pools[layer], source, store.pools[layer], target)
        table[again] = torch.tensor(homes)
    store.top[layer] = top
    return table


def _homes(store: ExtentStore, layer: int, needs: list[int], released: list[int]) -> tuple[list[tuple[int, int]], int]:
    """(start, capacity) for rows that need so many slots, and the first slot that is then free."""
    table, top = store.table[layer].tolist(), int(store.top[layer])
    spare, homes = [tuple(table[row]) for row in released], []
    for need in needs:
        found = next((home for home in spare if home[1] >= need), None)
        if found is None:
            homes.append((top, need))
            top += need
        else:
            homes.append(found)
            spare.remove(found)
    return homes, top


def _copy_slots(source: Pools, at: Tensor, target: Pools, to: Tensor) -> None:
    for name in POOLS[:-1]:
        getattr(target, name)[to] = getattr(source, name)[at]
    target.state[:, to] = source.state[:, at]


def _join_extents(store: ExtentStore, parts: list[ExtentStore]) -> None:
    store.length = torch.cat([p.length for p in parts], 1)
    for layer in range(store.plan.facts.layers):
        capacities = [extent(n) if n else 0 for n in store.length[layer].tolist()]
        pool = store.new_pools(sum(capacities))
        store.put(layer, pool)
        row = top = 0
        for part in parts:
            for (start, _), n in zip(part.table[layer].tolist(), part.length[layer].tolist(), strict=True):
                _copy_slots(part.pools[layer], torch.arange(start, start + n), pool, torch.arange(top, top + n))
                store.table[layer, row, 0], store.table[layer, row, 1] = top, capacities[row]
                top += capacities[row]
                row += 1
        store.top[layer] = top


# -- pages -----------------------------------------------------------------------------------------------------------


def _select_pages(store: PagedStore, sequences: Sequence[int]) -> None:
    """Rows of a repeated sequence hold the same full pages; the page that is being filled is each one's own."""
    page, width = store.plan.page, store.table.shape[1]
    length = _by_sequence(store, store.length.cpu())[:, sequences].flatten()
    table = store.table.cpu().unflatten(0, (store.plan.facts.layers, store.batch, -1))[:, sequences].reshape(-1, width)
    again = torch.tensor([b in sequences[:i] for i, b in enumerate(sequences)])
    again = again[None, :, None].expand(store.plan.facts.layers, -1, store.plan.facts.kv_heads).flatten()
    place = torch.arange(width)
    held = place < -(-length // page)[:, None]
    # States that reads change are each row's own, so nothing can be shared where there are some.
    begun = place >= (0 if follow_reads(store.plan) else (length // page)[:, None])
    copied = held & begun & again[:, None]
    kept = held & ~copied
    former = store.upper, store.shared
    try:
        with _room_beside(store, len(sequences)):
            store.admit(length.long(), Shared.among(table, kept, store.free.shape[0]))
    except CacheFull:
        store.upper, store.shared = former
        raise
    more = store.table.shape[1] - width
    table, kept, copied = (torch.nn.functional.pad(t, (0, more)) for t in (table, kept, copied))
    used = torch.zeros(store.free.shape[0], dtype=torch.bool)
    used[table[kept].long()] = True
    left = (~used).nonzero().flatten().int()
    store.free[: len(left)] = left.to(store.device)
    store.top.fill_(len(left))
    store.length, store.table = (_into(old, new.to(old)) for old, new in ((store.length, length), (store.table, table)))
    count, top = int(copied.sum()), len(left)
    fresh = store.free[top - count : top].clone()
    store.copy_pages(table[copied].long().to(store.device), fresh.long())
    row, at = copied.nonzero(as_tuple=True)
    store.table[row.to(store.device), at.to(store.device)] = fresh
    store.top.fill_(top - count)


def _join_pages(store: PagedStore, parts: list[PagedStore]) -> None:
    """Pages that rows share stay shared."""
    page, layers, kv_heads = store.plan.page, store.plan.facts.layers, store.plan.facts.kv_heads
    width = max(p.table.shape[1] for p in parts)
    lengths, tables, pages, used = [], [], [], 0
    for part in parts:
        length, table = part.length.cpu(), part.table.cpu()
        held = torch.arange(table.shape[1]) < -(-length // page)[:, None]
        found, number = table[held].unique(return_inverse=True)
        own = torch.zeros(len(length), width, dtype=torch.int32)
        own[:, : table.shape[1]][held] = (number + used).int()
        lengths.append(length.view(layers, part.batch, kv_heads))
        tables.append(own.view(layers, part.batch, kv_heads, width))
        pages.append(found.long())
        used += len(found)
    length, table = torch.cat(lengths, 1).flatten(), torch.cat(tables, 1).reshape(-1, width)
    held = torch.arange(width) < -(-length // page)[:, None]
    store.upper, store.shared = length.long(), Shared.among(table, held, used)
    store.commit()
    store.length = length.to(store.device)
    store.table = torch.nn.functional.pad(table, (0, max(0, store.table.shape[1] - width))).to(store.device)
    at = 0
    for part, found in zip(parts, pages, strict=True):
        source = (found[:, None] * page + torch.arange(page)).flatten().to(store.device)
        _copy_slots(part.pools, source, store.pools, torch.arange(at, at + len(source), device=store.device))
        at += len(source)
    total = store.free.shape[0]
    store.free[: total - used] = torch.arange(used, total, dtype=torch.int32, device=store.device)
    store.top.fill_(total - used)
