"""How many entries each row can hold during a prefill, known before it runs: what the pools are sized by.

The bounds are those of `passes.residents`, walked from what the rows hold now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvcompile.cache import KvCache
from kvcompile.cuts import cuts_of
from kvcompile.kernels.extent import SLACK, extent
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.ranks import has_joint, of_all_heads
from kvcompile.limits import room_in_all
from kvcompile.pages import PagedStore
from kvcompile.passes.groups import Group, groups
from kvcompile.passes.residents import Rows, advance
from kvcompile.sequences import Piece, Progress


def reserve_prefill(cache: KvCache, forwards: list[list[Piece]], stepping: Sequence[bool] = (), draft: int = 0) -> None:
    """Make room for a whole prefill before its first piece, so that no pool grows between pieces.

    forwards: what each forward brings to each sequence. stepping: which sequences run a step before all that. draft:
    columns of candidates that follow in the same call. CacheFull, and nothing has changed, where the model's limit has
    no room for it.
    """
    bounds = _bounds(cache, forwards, stepping, draft)
    with room_in_all(cache.store):
        _reserve(cache, bounds, forwards, stepping, draft)


def _reserve(
    cache: KvCache, bounds: list[list[int]], forwards: list[list[Piece]], stepping: Sequence[bool], draft: int
) -> None:
    """Room for rows of at most so many entries, [layer][rows], and for what stands beside them."""
    store, limit = cache.store, cache.store.limit
    new = [sum(some[b].new for some in forwards) for b in range(cache.batch)]
    if isinstance(store, PagedStore) and (len(forwards) > 1 or any(stepping)):
        # Rows that will decide leave the pages that they share now: later there may be no room for it.
        decides = [[n > 0 and not cls.keeps_all for n in new] for cls in cache.plan.classes]
        store.separate(torch.tensor(decides), new, False)
    if limit.most is not None and not limit.has_room(store, total := _planned(cache, bounds, forwards, draft)):
        count = sum(map(bool, new))
        several = f"{count} sequence{'s' * (count > 1)} of up to {max(new)} tokens"
        limit.refuse(store, total, f"This prefill of {several} needs", _what_fits(cache, new, draft))
    for layer, rows in enumerate(bounds):
        store.reserve(layer, rows)
    if isinstance(store, PagedStore):
        store.commit()
    store.cover(_places(cache, forwards, draft))


def _bounds(
    cache: KvCache, forwards: list[list[Piece]], stepping: Sequence[bool] = (), draft: int = 0
) -> list[list[int]]:
    """The most that every row may come to hold, [layer][rows]."""
    store = cache.store
    # Heads that compete may win what other processes' heads lose, so theirs are counted, too.
    joint = any(cls.selections and has_joint(cache.plan, cls) for cls in cache.plan.classes)
    plan = cache.plan.whole if joint else cache.plan
    first = cache.plan.first_head if plan is not cache.plan else 0
    own = range(first, first + cache.plan.facts.kv_heads)
    held = store.lengths() if plan is cache.plan else of_all_heads(cache.plan, store.lengths(), 2)
    lengths: list[list[list[int]]] = held.tolist()
    for b, before in enumerate(cache.sequences.each):
        pieces = [some[b] for some in forwards if some[b].new]
        if stepping and stepping[b]:
            for by_sequence in lengths:
                by_sequence[b] = [n + 1 for n in by_sequence[b]]
        if pieces:
            seq = replace(before, prompt=before.seen + sum(piece.new for piece in pieces), steps=0, prefilled=False)
            most = most_entries(plan, seq, [layer[b] for layer in lengths], pieces, own)
            for layer, rows in enumerate(most):
                lengths[layer][b] = rows
    return [
        [0 if layer in plan.off else rows[head] + draft for rows in by_sequence for head in own]
        for layer, by_sequence in enumerate(lengths)
    ]


def _planned(
    cache: KvCache, bounds: list[list[int]], forwards: list[list[Piece]], draft: int = 0, batch: int | None = None
) -> int:
    """Bytes that the cache takes at most while its pools grow to these bounds and the pieces run.

    batch: were it a new one for the first `batch` sequences alone.
    """
    store, plan = cache.store, cache.plan
    part = cache.batch if batch is None else batch
    bounds = [rows[: part * plan.facts.kv_heads] for rows in bounds]
    width = max((piece.new + piece.peek for some in forwards for piece in some), default=0)
    width = max(width, draft)
    fresh = part * width * plan.facts.kv_heads * plan.facts.entry_bytes
    places = _places(cache, forwards, draft)
    size = max(256, 1 << places.bit_length())  # of tables that grow by doubling
    grown, beside = (part * n // cache.batch for n in store.covering(places))
    grown += plan.rotates * 8 * plan.facts.head_dim * max(0, size - store.rope.shape[1])
    now = most = -(-store.bytes_allocated() * part // cache.batch) + grown
    if isinstance(store, PagedStore):
        pools = [(store.pools.slots, store.pages_for(torch.tensor(bounds).flatten())[0] * plan.page)]
    else:
        held = store.length.tolist()
        sizes = [max(sum(map(extent, rows)), sum(extent(n) for n in held[i] if n)) for i, rows in enumerate(bounds)]
        pools = [(store.pools[layer].slots, sizes[layer]) for layer in plan.live]
    for old, new in pools:
        if new > old:  # both stand while entries move
            most, now = max(most, now + new * store.slot_bytes), now + (new - old) * store.slot_bytes
    return max(most, now + max(fresh, beside))


def _places(cache: KvCache, forwards: list[list[Piece]], draft: int) -> int:
    """Positions that the prefill, its peeked tokens and its candidates reach."""
    tokens = [sum(some[b].new for some in forwards) for b in range(cache.batch)]
    each = zip(cache.sequences.each, tokens, strict=True)
    return max(seq.seen + n for seq, n in each) + cache.plan.peek + draft


def _what_fits(cache: KvCache, new: list[int], draft: int) -> str:
    """The longest prompts, and the most of these sequences, for which there is room; each by itself."""
    ways = "make the policy's budget or pieces smaller, or optimise the model again with a larger max_bytes."
    if cache.plan.shard is not None:  # asking would take all processes
        return f"Shorten the prompts, {ways}"

    room = (cache.store.limit.most or 0) - cache.store.limit.others(cache.store)

    def fits(tokens: list[int], batch: int | None = None) -> bool:
        forwards = [cut.pieces for cut in cuts_of([list(range(n)) for n in tokens], cache.plan)]
        return _planned(cache, _bounds(cache, forwards, (), draft), forwards, draft, batch) <= room

    longest = _most(max(new), lambda most: fits([min(n, most) for n in new]))
    said = f"What would fit: up to {longest} tokens a sequence"
    if cache.batch > 1 and not any(seq.seen for seq in cache.sequences.each):
        some = _most(cache.batch, lambda batch: fits([n * (b < batch) for b, n in enumerate(new)], batch))
        said += f", or the first {some} of the {cache.batch} sequences alone"
    return f"{said}. Else {ways}"


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to below `limit` that fits, if what fits stays so for smaller ones."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def most_entries(
    plan: PolicyPlan, seq: Progress, lengths: list[list[int]], pieces: list[Piece], own: range | None = None
) -> list[list[int]]:
    """The most that each row of a sequence holds at a time while these pieces come in, [layer][KV head].

    lengths: entries before, [layer][KV head]. Of rows that compete the sum is bounded, not each row: it is spread
    evenly, what one holds beyond that another lacks. Where layers compete, each may come to hold what all may.
    own: the heads that this process has, all without it; those of several processes that compete are like such layers.
    """
    parts = groups(plan, seq.prompt)
    walks: dict[tuple[Group, int], Rows] = {}
    for group in parts:
        for start in {sum(lengths[layer][h] for layer, h in rows) for rows in _counted(plan, group)}:
            walks[group, start] = Rows.holding(plan, group, seq.prompt, seq.seen, start, seq.since, seq.judged)
    most = {key: key[1] for key in walks}
    for piece in pieces:
        advance(list(walks.values()), piece.new, "prefill.end" if piece.ends else "chunk", 0)
        most = {key: max(n, walks[key].peak) for key, n in most.items()}
    seen = seq.seen + sum(piece.new for piece in pieces)
    out = [list(layer) for layer in lengths]
    for group in parts:
        for rows in _counted(plan, group):
            total = most[group, sum(lengths[layer][h] for layer, h in rows)]
            for layer in {layer for layer, _ in rows}:
                heads = [h for at, h in rows if at == layer and (own is None or h in own)]
                apart = group.pooled or len(heads) < sum(at == layer for at, _ in rows)
                here = min(total, len(heads) * (seen + 1)) if apart else total
                for h in heads:
                    out[layer][h] = -(-here // len(heads)) + SLACK * group.competes  # uneven rows round up unevenly
    return out


def _counted(plan: PolicyPlan, group: Group) -> list[list[tuple[int, int]]]:
    """The (layer, KV head) pairs that are counted as one."""
    by_layer = [[(layer, h) for h in plan.heads(layer, group.rules[0])] for layer in group.layers]
    if group.pooled:
        return [[pair for layer in by_layer for pair in layer]]
    return by_layer if group.competes else [[pair] for layer in by_layer for pair in layer]
