"""What queries read under a class's `keep` set when every token is a step of its own: the strictest way to cut a text.

Takes a plan and a class whose set is made of regions; gives, for each key, the last query that reads it. A key is read
by its own query, and by later ones as long as the set has kept it at every `now` between: what was dropped stays out.
Guarantees: regions mean what `select.region_mask` says; memory is linear in the text, never tokens x tokens.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.kernels.compete import Place
from kvcompile.kernels.counts import count_value, scalars_of
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.select import random_order, region_mask

ALIGNED = 8  # columns of a block come in multiples of this, which attention kernels ask of masks
SMALLEST, LARGEST = 32, 1024  # queries of a block

# Regions whose members only leave while `now` grows, by the change of their count from one `now` to the next. Then a
# union's members only leave, too, and the first `now` at which a key is out can be found by bisection.
_LEAVES = {"sink": (None, 0), "stride": (0, 0), "random": (0, 0), "recent": (None, 1)}
_PLAIN = ("all", "sink", "recent", "stride", "random", "newest", "frozen")


def check_readable(plan: PolicyPlan, cls: ClassPlan) -> None:
    """Raises KvCompileError where what a query reads does not follow from positions alone."""

    def refuse(what: str) -> KvCompileError:
        return KvCompileError(
            f"what head class {cls.name!r} of policy {plan.name!r} keeps cannot stand in for attention: {what}. Use "
            "regions that follow from positions, such as `sink(n) | recent(n)`"
        )

    index = plan.classes.index(cls)
    if any(other.rows_of == index for other in plan.classes) or cls.rows_of is not None:
        raise refuse("it has more than one `keep`")
    if cls.keeps_all:
        return
    if cls.only_picks or any(isinstance(term, Selection) for term in cls.keep):
        raise refuse("it selects by a score, which follows from the text")
    if cls.moves:
        raise refuse("what it drops is merged or folded into other entries")
    for region in _regions(cls):
        if region.kind not in _PLAIN:
            raise refuse(f"region `{region.kind}` does not follow from an entry's place")
        if region.count is None:
            continue
        count = plan.counts[region.count]
        read = scalars_of(count) | {"a share" for node in count.expr.walk() if node.op == "share"}
        if read - {"now"}:
            raise refuse(f"the number in `{region.kind}` follows from {', '.join(sorted(read))}")


def by_place(cls: ClassPlan) -> bool:
    """Whether layers and heads of a class read differently."""
    return not cls.keeps_all and any(region.kind == "random" for region in _regions(cls))


def last_readers(plan: PolicyPlan, cls: ClassPlan, layer: int, head: int, total: int) -> Tensor:
    """For each of `total` keys the last query that reads it, int64 [total], between its own position and total - 1.

    Query t reads key s exactly if s <= t <= last_readers[s]. KvCompileError for sets that `check_readable` refuses,
    and for those that would take an entry back which they have let go.
    """
    check_readable(plan, cls)
    out = torch.arange(total)
    if cls.keeps_all:
        return torch.full_like(out, total - 1)
    for region in _regions(cls):
        out = torch.maximum(out, _first_out(plan, region, layer, head, total))
    return out.clamp(max=total - 1)


def readable(plan: PolicyPlan, cls: ClassPlan, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether each query reads each key: bool [q, k]; queries, keys int64, positions. Errors as of `last_readers`."""
    total = 1 + max((int(x.max()) for x in (queries, keys) if len(x)), default=0)
    last = last_readers(plan, cls, layer, head, total).to(queries.device)
    return (keys <= queries[:, None]) & (queries[:, None] <= last[keys])


class Reads(NamedTuple):
    """What blocks of queries read, block by block: which keys any of them reads, and which of those each one.

    columns int64 [rows, blocks, width], keys in order, filled up with 0; mask bool [rows, blocks, size, width]. Rows
    are heads, or one for all of them. Queries beyond the text, in the last block, read one key: their output is void,
    but it is a number.
    """

    columns: Tensor
    mask: Tensor


def reads(last: Tensor, size: int | None = None) -> Reads:
    """Blocks of `size` queries, or of as many as each reads keys (32 to 1024): last int64 [rows, total]."""
    rows, total = last.shape
    size = size or _block(last)
    blocks = -(-total // size)
    found = [(last[:, : min((b + 1) * size, total)] >= b * size) for b in range(blocks)]
    width = max([int(near.sum(1).max()) for near in found], default=1)
    width = -(-width // ALIGNED) * ALIGNED
    columns = torch.zeros(rows, blocks, width, dtype=torch.int64, device=last.device)
    used = torch.zeros(rows, blocks, width, dtype=torch.bool, device=last.device)
    for block, near in enumerate(found):
        place = near.cumsum(1) - 1
        row, key = near.nonzero(as_tuple=True)
        columns[row, block, place[row, key]] = key
        used[row, block, place[row, key]] = True
    query = torch.arange(blocks * size, device=last.device).view(1, blocks, size, 1)
    until = torch.where(used, last.gather(1, columns.flatten(1)).view_as(columns), -1)
    mask = (columns[:, :, None] <= query) & (query <= until[:, :, None])
    mask[..., 0] |= query[..., 0] >= total
    return Reads(columns, mask)


def _block(last: Tensor) -> int:
    """As many queries as keys that a query reads at most, a power of two: blocks then read about twice as many."""
    rows, total = last.shape
    change = torch.zeros(rows, total + 1, dtype=torch.int64, device=last.device)
    change[:, :total] += 1
    change.scatter_add_(1, last + 1, torch.full_like(last, -1))
    most = int(change.cumsum(1).max()) if total else 1
    return min(LARGEST, max(SMALLEST, 1 << (most - 1).bit_length()))


def _regions(cls: ClassPlan) -> list[Region]:
    return [term for term in cls.keep if isinstance(term, Region)]


def _first_out(plan: PolicyPlan, region: Region, layer: int, head: int, total: int) -> Tensor:
    """For each key the first `now`, from its own position on, at which the region does not hold it, else `total`."""
    numbers = _numbers(plan, region, total)
    if region.kind in _LEAVES and region.count is not None:
        least, most = _LEAVES[region.kind]
        change = numbers[region.count].diff()
        if bool((change > most).any()) or (least is not None and bool((change < least).any())):
            raise KvCompileError(
                f"`{region.kind}` of policy {plan.name!r} takes entries back as `now` grows, so what a query reads has "
                "no plain form: give it a number that does not grow"
            )
    if region.kind == "random":
        assert region.count is not None
        return _first_out_of_random(region, int(numbers[region.count, 0]), layer, head, total)
    place = Place(0, (layer,), (head,), (0,))
    keys = torch.arange(total)
    low, high = keys.clone(), torch.full_like(keys, total)
    while bool((low < high).any()):
        now = ((low + high) // 2).clamp(max=total - 1)
        inside = region_mask(plan, region, _rows(keys, now), numbers[:, now], place)[:, 0]
        low, high = (
            torch.where(inside & (low < high), now + 1, low),
            torch.where(inside, high, torch.minimum(high, now)),
        )
    return low


def _first_out_of_random(region: Region, count: int, layer: int, head: int, total: int) -> Tensor:
    """The same for `random`: each new position pushes the one that ranks last out of the `count`, or itself."""
    order = random_order(region, layer, head, torch.arange(total)).tolist()
    out = [total] * total
    inside: list[tuple[int, int]] = []
    for now, rank in enumerate(order):
        heapq.heappush(inside, (-rank, now))
        if len(inside) > count:
            out[heapq.heappop(inside)[1]] = now
    return torch.tensor(out, dtype=torch.int64)


def _numbers(plan: PolicyPlan, region: Region, total: int) -> Tensor:
    """The region's count at every `now`, int64 [counts, total], in the plan's order; counts it does not read are 0."""
    numbers = torch.zeros(len(plan.counts), total, dtype=torch.int64)
    if region.count is None:
        return numbers
    count = plan.counts[region.count]
    moves = "now" in scalars_of(count)
    found = [count_value(count, {"now": now}) for now in range(total if moves else min(total, 1))]
    numbers[region.count] = torch.tensor(found, dtype=torch.int64)
    return numbers


def _rows(keys: Tensor, now: Tensor) -> Rows:
    """One row a key, each at a `now` of its own."""
    there = torch.ones(len(keys), 1, dtype=torch.bool)
    none = torch.zeros_like(there)
    return Rows(keys[:, None], there, there, none, now, torch.zeros_like(now), {})
