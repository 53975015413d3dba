"""A `KvCache` as a file, and back: `save_cache(model, cache, path)`, `load_cache(model, path)`.

The file (safetensors, see `sealed.py`) says which policy, model and weights it is of and holds each row's entries in
order, whatever the memory layout; a cache saved from pages goes on in extents. Guarantees: the restored cache continues
as the saved one would; a file that is damaged, foreign or inconsistent is a KvCompileError, and nothing is half made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.api import Optimized, optimized
from kvcompile.cache import KvCache
from kvcompile.kernels import ops
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import write
from kvcompile.kernels.learned import fingerprint
from kvcompile.kernels.marks import drops, layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.pages import PagedStore
from kvcompile.placement import local
from kvcompile.sealed import Found, Part, memory, put, take
from kvcompile.sequences import Piece, Progress
from kvcompile.spans import Spans, table_bytes
from kvcompile.tally import SUMS

FORMAT = 1
HEAD = "kvcompile"  # the header's entry that describes a cache
MAX_BATCH = 1 << 16
MAX_NUMBER = (1 << 31) - 1  # positions are int32
MOST_TOLD = 1 << 24  # tokens of all sequences that spans may tell of
SAMPLE = 16  # numbers of each parameter by which weights are told apart
_TABLES = ("judged", "since", "shares")  # fields of Progress that are tables; all others but `spans` are numbers


def save_cache(model: nn.Module, cache: KvCache, path: str | os.PathLike[str]) -> None:
    """Write a cache to one file, in one step; `cache` goes on as before.

    Raises KvCompileError where the cache is not of this model's policy, is in use, has failed, or cannot be written.
    """
    if not isinstance(cache, KvCache):
        raise KvCompileError(f"save_cache writes a KvCache of an optimised model, not {type(cache).__name__}")
    state = optimized(model)
    with state.forward.traffic.inside(), cache.guard.held(), torch.no_grad():
        cache.guard.refuse_fault()
        if cache.plan.digest != state.compiled.plan.digest:
            raise KvCompileError(
                f"this KvCache is of policy {cache.plan.name} ({cache.plan.digest}) and the model runs "
                f"{state.compiled.plan.name} ({state.compiled.plan.digest}): save it with the model that filled it"
            )
        head = _identity(model, state) | {
            "batch": cache.batch,
            "columns": cache.columns,
            "sequences": [_numbers(s) for s in cache.sequences.each],
            "tokens": cache.run.tokens,
            "triangles": cache.run.triangles,
        }
        put(Path(path), {HEAD: json.dumps(head)}, _parts(cache))


def load_cache(model: nn.Module, path: str | os.PathLike[str]) -> KvCache:
    """The cache of a file, for an optimised model that runs the policy it was saved under, with the same weights.

    Backend and layout may differ. Times of the report start anew. Raises KvCompileError for anything else, and for
    files that are damaged; a file that is larger than the machine's memory is not tried.
    """
    state = optimized(model)
    plan, place = state.compiled.plan, Path(path)
    heads: list[dict[str, Any]] = []

    def check(text: Mapping[str, str], found: Mapping[str, Found]) -> None:
        heads.append(_head(text, _identity(model, state), plan, place))
        _check_room(plan, heads[0], place)
        _check_shapes(found, plan, heads[0], place)

    with state.forward.traffic.inside(), torch.inference_mode(False), torch.no_grad():  # the former turns gradients on
        _, tensors = take(place, check)
        head = heads[0]
        _check_values(tensors, plan, head, place)
        device = next(p.device for p in model.parameters() if not p.is_meta)
        cache = state.forward.new_cache(head["batch"], device)
        _fill(cache, head, tensors)
    return cache


# -- what a file says of itself ---------------------------------------------------------------------------------------


def _identity(model: nn.Module, state: Optimized) -> dict[str, Any]:
    """What must be equal for a cache to go on: the format, the bound policy, the model and its weights."""
    plan, engine = state.compiled.plan, state.forward.engine
    return {
        "format": FORMAT,
        "policy": plan.name,
        "model": json.loads(json.dumps(asdict(plan.facts))),
        "weights": _weights(model),
        "trained": fingerprint(ops.program(engine.site).weights),
        "plan": plan.digest,
    }


def _weights(model: nn.Module) -> str:
    """A digest of some numbers of each parameter: enough to tell one checkpoint from another."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        here = local(parameter.detach())
        if here.device.type != "meta":
            found.update(here.reshape(-1)[:SAMPLE].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


_DIFFERS = {
    "format": "is of another format of saved caches",
    "policy": "was saved under another policy",
    "model": "was saved from a model of other sizes or another dtype",
    "weights": "was saved from a model with other weights",
    "trained": "was saved under other trained scores",
    "plan": "was saved under other parameters or tables of the policy, or by another version",
}


def _head(text: Mapping[str, str], here: Mapping[str, Any], plan: PolicyPlan, path: Path) -> dict[str, Any]:
    """The description in a header, its numbers checked. KvCompileError where it is another's, or makes no sense."""
    try:
        head = json.loads(text.get(HEAD, ""))
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise KvCompileError(f"{path} is no saved cache of kvcompile: its header does not describe one")
    for key, mine in here.items():
        if head.get(key) != mine:
            raise KvCompileError(
                f"the saved cache {path} {_DIFFERS[key]} ({_differing(head.get(key), mine)}): it goes on only in "
                "the model that it was saved from, under the same policy and parameters"
            )
    batch: Any = head.get("batch")
    if not _number(batch, 1, MAX_BATCH) or not _number(head.get("columns")):
        raise _odd(path, "batch or columns are no sensible numbers")
    for key in ("tokens", "triangles"):
        if not _listed(head.get(key), batch, 1 << 62):
            raise _odd(path, f"{key} are not {batch} sensible numbers")
    sequences = head.get("sequences")
    if not isinstance(sequences, list) or len(sequences) != batch:
        raise _odd(path, f"it does not tell the progress of {batch} sequences")
    head["sequences"], left = [], MOST_TOLD
    for value in sequences:
        head["sequences"].append(found := _progress(value, plan, path, left))
        left -= 0 if found.spans is None else found.spans.tokens
    return head


def _differing(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in here if there.get(key) != here[key]]
        return "; ".join(f"{key} {str(there.get(key))[:24]} there, {str(here[key])[:24]} here" for key in keys[:3])
    return f"{str(there)[:40]} there, {str(here)[:40]} here"


def _numbers(progress: Progress) -> dict[str, Any]:
    """One sequence's progress in JSON; tables as lists of key and value."""
    numbers = [f.name for f in fields(Progress) if f.name not in (*_TABLES, "spans")]
    out: dict[str, Any] = {name: int(getattr(progress, name)) for name in numbers}
    return out | {
        "spans": None if progress.spans is None else progress.spans.to_json(),
        "judged": [[c, unit, n] for (c, unit), n in progress.judged.items()],
        "since": [[c, n] for c, n in progress.since.items()],
        "shares": [[share, list(parts)] for share, parts in progress.shares.items()],
    }


def _progress(value: Any, plan: PolicyPlan, path: Path, most: int) -> Progress:
    """The reverse, of numbers that anybody may have written; most: tokens that its spans may tell of."""
    odd = _odd(path, "the progress of a sequence makes no sense")
    if not isinstance(value, dict) or value.keys() != {f.name for f in fields(Progress)}:
        raise odd
    plain = {key: n for key, n in value.items() if key not in (*_TABLES, "spans")}
    tables = [value[name] for name in _TABLES]
    if not all(_number(n, -1) for n in plain.values()) or not all(isinstance(table, list) for table in tables):
        raise odd
    if not all(isinstance(entry, list) and len(entry) == 3 - (i > 0) for i, t in enumerate(tables) for entry in t):
        raise odd
    units = [unit.name for unit in plan.units]
    judged, since, shares = tables
    measured = [index for index, share in enumerate(plan.shares) if share.measured]
    good = (
        all(_number(c, 0, len(plan.classes) - 1) and unit in units and _number(n) for c, unit, n in judged)
        and all(_number(c, 0, len(plan.classes) - 1) and _number(n, 0, max(0, value["seen"])) for c, n in since)
        and all(_number(i) and i in measured and _listed(p, plan.facts.layers) for i, p in shares)
        and 0 <= value["prompt"] <= value["seen"]
        and 0 <= value["steps"] <= value["seen"]
        and value["prefilled"] in (0, 1)
    )
    if not good:
        raise odd
    try:
        spans = None if value["spans"] is None else Spans.from_json(value["spans"], min(value["seen"], most))
    except KvCompileError as error:
        raise odd from error
    return Progress(
        **{**plain, "prefilled": bool(plain["prefilled"])},
        judged={(c, unit): n for c, unit, n in judged},
        since=dict(since),
        shares={share: tuple(parts) for share, parts in shares},
        spans=spans,
    )


def _number(value: Any, least: int = 0, most: int = MAX_NUMBER) -> bool:
    return type(value) is int and least <= value <= most


def _listed(value: Any, n: int, most: int = MAX_NUMBER) -> bool:
    return isinstance(value, list) and len(value) == n and all(_number(v, 0, most) for v in value)


def _odd(path: Path, why: str) -> KvCompileError:
    return KvCompileError(f"the saved cache {path} contradicts itself: {why}. Nothing of it was loaded")


# -- rows as tensors, and back ----------------------------------------------------------------------------------------


def _shapes(plan: PolicyPlan, head: Mapping[str, Any], entries: list[int]) -> dict[str, Found]:
    """Name, dtype and shape of every tensor of a file. entries: of each layer, all rows together."""
    facts, batch = plan.facts, head["batch"]
    dtype, width = getattr(torch, facts.dtype), facts.head_dim
    heads = (facts.layers, batch, facts.kv_heads)
    told = max(s.seen for s in head["sequences"]) if plan.picks else 0
    out = {
        "length": Found(torch.int32, heads),
        "ring": Found(dtype, (len(plan.live), batch, facts.q_heads, plan.ring, width)),
        "scalar": Found(torch.float32, (plan.scalars, facts.layers, batch * facts.kv_heads)),
        "picked": Found(torch.int32, (plan.picks, batch, facts.kv_heads, told)),
        "area": Found(torch.int64, heads),
        "widest": Found(torch.int64, heads),
        "widest_sum": Found(torch.int64, (batch,)),
    }
    for layer, n in enumerate(entries):
        out |= {
            f"layers.{layer}.k": Found(dtype, (n, width)),
            f"layers.{layer}.v": Found(dtype, (n, width)),
            f"layers.{layer}.pos": Found(torch.int32, (n,)),
            f"layers.{layer}.frozen": Found(torch.uint8, (n,)),
            f"layers.{layer}.state": Found(torch.float32, (len(plan.states), n)),
        }
    return out


def _parts(cache: KvCache) -> list[Part]:
    """Every tensor of a cache, its rows' entries side by side in the order of their rows."""
    plan, store, run = cache.plan, cache.store, cache.run
    run.tally.settle()
    lengths = store.lengths().cpu().contiguous()
    head = {"batch": cache.batch, "sequences": cache.sequences.each}
    shapes = _shapes(plan, head, lengths.sum((1, 2)).tolist())
    whole = {
        "length": lengths,
        "ring": store.ring,
        "scalar": store.scalar,
        "picked": store.picked[..., : shapes["picked"].shape[3]],
        **{name: getattr(run.tally, name) for name in SUMS},
    }

    def of_layer(layer: int, name: str) -> Tensor:
        site = store.site(layer)
        base = site.base(plan.facts.kv_heads)
        rows = enumerate(lengths[layer].flatten().tolist())
        slots = torch.cat([site.slots(base + row, 0, n) for row, n in rows])
        return site.state[:, slots] if name == "state" else getattr(site, name)[slots]

    def make(name: str) -> Tensor:
        if name in whole:
            return whole[name]
        _, layer, field = name.split(".")
        return of_layer(int(layer), field)

    return [Part(name, dtype, shape, partial(make, name)) for name, (dtype, shape) in shapes.items()]


def _check_room(plan: PolicyPlan, head: Mapping[str, Any], path: Path) -> None:
    """What stands beside the entries follows from numbers that cost a file nothing: landmarks, stretches."""
    each = head["sequences"]
    beside = head["batch"] * layout_of(plan).nbytes(max(s.seen for s in each))
    beside += table_bytes(plan, [s.spans for s in each])
    if beside > memory():
        raise _odd(path, f"so long a text asks for {beside} bytes beside its entries, more than this machine's memory")


def _check_shapes(found: Mapping[str, Found], plan: PolicyPlan, head: Mapping[str, Any], path: Path) -> None:
    """Exactly the tensors that the plan and the batch ask for; no row can hold more than its sequence has seen."""
    most = plan.facts.kv_heads * sum(s.seen for s in head["sequences"])
    entries = []
    for layer in range(plan.facts.layers):
        there = found.get(f"layers.{layer}.pos")
        if there is None or len(there.shape) != 1 or there.shape[0] > most * (layer not in plan.off):
            raise _odd(path, f"the positions of layer {layer} are missing or too many")
        entries.append(there.shape[0])
    wanted = _shapes(plan, head, entries)
    wrong = sorted(name for name, _ in wanted.items() ^ found.items())
    if wrong:
        raise _odd(path, f"the tensor {wrong[0][:40]!r} is not what this policy on this model needs")


def _check_values(tensors: Mapping[str, Tensor], plan: PolicyPlan, head: Mapping[str, Any], path: Path) -> None:
    """Lengths, positions and marks that a cache can have, and no NaN in keys or values."""
    seen = torch.tensor([s.seen for s in head["sequences"]])
    limit = seen[:, None].expand(-1, plan.facts.kv_heads)
    for layer, length in enumerate(tensors["length"].long()):
        pos = tensors[f"layers.{layer}.pos"].long()
        if bool((length < 0).any() or (length > limit).any()) or int(length.sum()) != len(pos):
            raise _odd(path, f"the lengths of layer {layer} are out of range")
        row = torch.arange(length.numel()).repeat_interleave(length.flatten())
        placed = pos >= 0
        if bool((pos >= limit.flatten()[row]).any()):
            raise _odd(path, f"layer {layer} holds positions that its sequence has not seen")
        if not _in_order(plan, layer, length, pos, seen):
            raise _odd(path, f"the rows of layer {layer} do not hold what the policy leaves, or in another order")
        alone = torch.bincount(row[~placed], minlength=1)
        if bool((pos < -1).any()) or int(alone.max()) > plan.folds:
            raise _odd(path, f"layer {layer} holds entries without a position")
        keys = row[placed] * (MAX_NUMBER + 1) + pos[placed]
        if len(keys.unique()) != len(keys):
            raise _odd(path, f"layer {layer} holds a position twice in one row")
        if bool((tensors[f"layers.{layer}.frozen"] > 1).any()):
            raise _odd(path, f"layer {layer} has marks that are neither 0 nor 1")
        if any(bool(tensors[f"layers.{layer}.{name}"].isnan().any()) for name in "kv"):
            raise _odd(path, f"layer {layer} holds NaN in its keys or values")
    chosen = tensors["picked"]
    if bool(((chosen < -1) | (chosen >= 1 << plan.facts.group)).any()):
        raise _odd(path, "what layers have chosen is marked for query heads that the model does not have")
    if any(bool((tensors[name] < 0).any()) for name in SUMS):
        raise _odd(path, "its account is negative")


def _in_order(plan: PolicyPlan, layer: int, length: Tensor, pos: Tensor, seen: Tensor) -> bool:
    """Kernels count on it, unchecked: rows that drop nothing hold every token in its place, and those that read or
    decide by units or neighbours hold theirs in order. length int64 [batch, kv_heads]; pos int64, row by row."""
    heads = [head for head, of in enumerate(plan.class_of[layer]) if layer not in plan.off]
    whole = [head for head in heads if not drops(plan, layer, head)]
    if bool((length[:, whole] != seen[:, None]).any()):
        return False
    ordered = torch.zeros(plan.facts.kv_heads, dtype=torch.bool)
    ordered[whole] = True
    for head in heads:
        rules = [c for c, cls in enumerate(plan.classes) if plan.class_of[layer][head] in (c, cls.rows_of)]
        ordered[head] |= any(plan.classes[c].by_position for c in rules) or layout_of(plan).readers[layer][head] >= 0
    row = torch.arange(length.numel()).repeat_interleave(length.flatten())
    there = ordered.repeat(len(length))[row] & (pos >= 0)
    row, pos = row[there], pos[there]
    return bool(((row[1:] != row[:-1]) | (pos[1:] > pos[:-1])).all())


def _fill(cache: KvCache, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put checked contents into an empty cache."""
    plan, store, run = cache.plan, cache.store, cache.run
    lengths = tensors["length"].flatten(1).tolist()
    for layer, rows in enumerate(lengths):
        store.reserve(layer, rows)
    if isinstance(store, PagedStore):
        store.commit()
    for layer, counts in enumerate(lengths):
        site = store.site(layer)
        base = site.base(plan.facts.kv_heads)
        k, v, pos, frozen, state = (
            tensors[f"layers.{layer}.{name}"].to(store.device) for name in ("k", "v", "pos", "frozen", "state")
        )
        write(site, [base + row for row in range(len(counts))], counts, k, v, pos, frozen, state)
    cache.columns = head["columns"]
    cache.sequences.each = head["sequences"]
    cache.tell([s.spans for s in cache.sequences.each])
    store.clock.copy_(cache.sequences.numbers([Piece(0)] * cache.batch)[0])
    store.cover(max(s.seen for s in head["sequences"]))
    picked = tensors["picked"]
    store.picked[..., : picked.shape[3]] = picked.to(store.device)
    store.ring.copy_(tensors["ring"])
    store.scalar.copy_(tensors["scalar"])
    run.tokens, run.triangles = list(head["tokens"]), list(head["triangles"])
    for name in SUMS:
        getattr(run.tally, name).copy_(tensors[name])
