"""Learned head masks in .safetensors files that nobody vouches for.

Takes the bytes of a file, of bounded size, and the model's shape; gives scores, the mask if there is one, and what the
file says about itself. Guarantees: nothing but these two tensors is accepted; what is wrong is a PolicyError that names
file, tensor and what the model needs; neither torch nor numpy is imported.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from kvcompile.dsl.diagnostics import fail, outside

Table = tuple[tuple[float, ...], ...]

PROVENANCE = "kvcompile"  # the metadata that is a JSON object; a file without it says what it says key by key
_TENSORS = {"scores": ("F32", "f"), "mask": ("U8", "B")}
_SEEN = 80  # characters of a file's own words that a message shows


@dataclass(frozen=True, slots=True)
class Masks:
    """What a file of learned heads holds. `scores`: [layer][kv head], finite, higher means keep; `mask`: 1.0 for a kept
    head, else 0.0, or None; `provenance`: where it comes from, as whoever wrote it says.
    """

    scores: Table
    mask: Table | None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def read_masks(path: Path, data: bytes, layers: int | None = None, heads: int | None = None) -> Masks:
    """Parse the bytes of `path`. layers, heads: of the model, where there is one to fit. PolicyError K610 for what is
    no such file, K611 for numbers that cannot be, K612 for shapes."""
    from safetensors import SafetensorError, deserialize

    where = str(path)
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        reason = str(error)[:_SEEN]
        raise fail("K610", f"no safetensors file: {reason}", outside(where), "save the masks again") from None
    other = next((name for name in sorted(tensors) if name not in _TENSORS), None)
    if other is not None or "scores" not in tensors:
        message = "there is no tensor `scores`" if other is None else f"there is a tensor `{other[:_SEEN]}`"
        raise fail("K612", f"{message} in this file", outside(where),
                   "a file of learned heads holds `scores`, and perhaps a `mask`")  # fmt: skip
    provenance = _provenance(data)
    found = {name: _table(where, name, tensor, (layers, heads), provenance) for name, tensor in tensors.items()}
    scores, mask = found["scores"], found.get("mask")
    if mask is not None and [len(row) for row in mask] != [len(row) for row in scores]:
        raise fail("K612", f"`scores` and `mask` have the shapes {_shape(scores)} and {_shape(mask)}", outside(where),
                   "save the masks again")  # fmt: skip
    return Masks(scores, mask, provenance)


def _table(
    where: str,
    name: str,
    tensor: Mapping[str, Any],
    wanted: tuple[int | None, int | None],
    provenance: Mapping[str, Any],
) -> Table:
    """One tensor as rows of numbers."""
    shape, dtype, (kind, letter) = tuple(tensor["shape"]), tensor["dtype"], _TENSORS[name]
    if dtype != kind:
        _misfit(where, f"`{name}` is {dtype}", f"save it as {kind}", provenance)
    if len(shape) != 2 or not all(shape):
        _misfit(where, f"`{name}` has the shape {list(shape)}", "one number for each KV head of each layer", provenance)
    if any(size is not None and size != have for size, have in zip(wanted, shape, strict=True)):
        _misfit(where, f"`{name}` is of {shape[0]} layers with {shape[1]} KV heads",
                f"this model has {wanted[0]} layers with {wanted[1]}", provenance)  # fmt: skip
    values = [float(value) for value in struct.unpack(f"<{shape[0] * shape[1]}{letter}", tensor["data"])]
    bad = next((at for at, value in enumerate(values) if not _fits(name, value)), None)
    if bad is not None:
        place = f"layer {bad // shape[1]}, KV head {bad % shape[1]}"
        wants = "finite numbers" if name == "scores" else "0 and 1"
        raise fail("K611", f"`{name}` has {values[bad]:g} for {place}", outside(where), f"it holds {wants} only")
    return tuple(tuple(values[start : start + shape[1]]) for start in range(0, len(values), shape[1]))


def _fits(name: str, value: float) -> bool:
    return math.isfinite(value) if name == "scores" else value in (0.0, 1.0)


def _misfit(where: str, message: str, hint: str, provenance: Mapping[str, Any]) -> NoReturn:
    model = provenance.get("model")
    model = model.get("name") if isinstance(model, dict) else model
    origin = f", learned on {model[:_SEEN]}" if isinstance(model, str) and model else ""
    raise fail("K612", message + origin, outside(where), hint)


def _provenance(data: bytes) -> Mapping[str, Any]:
    """What the header says about the file; empty where it says nothing that can be read."""
    size = int.from_bytes(data[:8], "little")
    try:
        said = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        found = json.loads(said[PROVENANCE]) if PROVENANCE in said else said
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return {}
    return found if isinstance(found, dict) else {}


def _shape(table: Table) -> list[int]:
    return [len(table), len(table[0])]
