"""Files of trained block gates: safetensors that say of themselves what they were trained on.

Takes weights and facts; gives a file, and of a file that nobody vouches for float32 tensors by the names of
`kernels.gates`. Guarantees: at most 1 GiB, finite, and of the layers, heads, widths, units and landmarks that the plan
reads by them; what is wrong is a PolicyError (K615 unreadable, K616 does not fit) that names file and tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompile.dsl.diagnostics import PolicyError, fail, outside
from kvcompile.kernels.gates import PARTS, POOLED, inputs_of
from kvcompile.kernels.plan import Expr, ModelFacts, PolicyPlan, UnitPlan, words_of
from kvcompile.passes.masks import PROVENANCE

FORMAT, VERSION = "kvcompile block gates", 1
QUERIES, KEYS = ("pooled", "each"), ("k", "raw.k")
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_METADATA = 1 << 20
MOST_MARKS = 8
_SEEN = 60  # characters of a file's own words that a message shows
_SHAPES = (
    "layers.L.q [query heads, head_dim, width] or [KV heads, group * head_dim, width], "
    "layers.L.k [KV heads, landmarks * head_dim, width], and perhaps layers.L.q_norm, layers.L.k_norm [width] and "
    "rope [width / 2]"
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What gates were trained on. unit, offset: of the policy's unit; queries: "pooled" over a unit, or "each" alone;
    keys: "k" or "raw.k"; landmarks: how they are pooled, in order: min, max or mean."""

    unit: int
    offset: int
    queries: str
    keys: str
    landmarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit, "offset": self.offset, "queries": self.queries, "keys": self.keys,
            "landmarks": list(self.landmarks),
        }  # fmt: skip


def gate_bytes(tensors: Mapping[str, Tensor], trained: Trained, provenance: Mapping[str, Any]) -> bytes:
    """The bytes of a file. provenance: JSON values, where the gates come from."""
    from safetensors.torch import save

    told = {**provenance, "format": FORMAT, "version": VERSION, **trained.as_json()}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry only: several would be written in an order of chance, and equal gates in unequal bytes.
    return save(weights, {PROVENANCE: json.dumps(told, sort_keys=True)})


def gates_in(plan: PolicyPlan) -> dict[str, tuple[Expr, frozenset[int]]]:
    """The trained gates that a plan's reads ask for: by key, the score's node and the layers that read by it."""
    found: dict[str, tuple[Expr, frozenset[int]]] = {}
    for index, read in enumerate(plan.reads):
        layers = frozenset(i for i in range(plan.facts.layers) if index in plan.reading(i) and i not in plan.off)
        nodes = [n for rule in read.rules for term in rule.selections for n in term.score.walk() if n.op == "learned"]
        for node in nodes:
            key = str(node.value)
            found[key] = node, layers | (found[key][1] if key in found else frozenset())
    return found


def read_gates(
    file: Any, path: Path, key: str, score: Expr, layers: frozenset[int], plan: PolicyPlan
) -> dict[str, Tensor]:
    """The tensors of an open file, checked against what a plan asks of them, by their names behind `key:`."""
    facts = plan.facts
    unit = plan.unit(next(words_of(arg)[0] for arg in score.args if arg.op == "landmark"))
    about = _about(file, path)
    trained = _trained(about, path)
    _check_same(trained, _wanted(score, unit, trained.queries, path), about, path)
    if plan.compact:
        raise _unfit(path, "they know original positions, and the policy has `positions compact`", "leave it out")
    shapes = _shapes(file, path, layers, facts, len(trained.landmarks))
    odd = sorted(set(file.keys()) - set(shapes))
    if odd:
        raise _unfit(path, f"there is `{odd[0][:_SEEN]}`, which no layer of this model reads{_origin(about)}", _SHAPES)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        cut = file.get_slice(name)
        if tuple(cut.get_shape()) != shape or cut.get_dtype() not in FLOATS:
            seen = f"{cut.get_dtype()} {list(cut.get_shape())}"
            raise _unfit(path, f"`{name}` is {seen} where {list(shape)} floats are meant{_origin(about)}", _SHAPES)
        tensor = file.get_tensor(name).float()
        if not bool(tensor.isfinite().all()):
            raise _unfit(path, f"`{name}` holds NaN or infinity", "train the gates again")
        found[f"{key}:{name}"] = tensor
    for word, holds in (("pooled", trained.queries == "pooled"), ("raw", trained.keys == "raw.k")):
        if holds:
            found[f"{key}:{word}"] = torch.zeros(())
    return found


# ---------------------------------------------------------------- what the file says of itself


def _about(file: Any, path: Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(PROVENANCE, "")
    try:
        found = json.loads(text) if 0 < len(text) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _unfit(path, "it does not say what its gates were trained on",
                     f"its metadata needs an entry `{PROVENANCE}`, as `kvcompile learn` writes it")  # fmt: skip
    if found.get("version") != VERSION:
        raise _unfit(path, f"its version is {str(found.get('version'))[:20]}, this one reads {VERSION}",
                     "train the gates again")  # fmt: skip
    return found


def _trained(about: dict[str, Any], path: Path) -> Trained:
    unit, offset, queries, keys, marks = (
        about.get(name) for name in ("unit", "offset", "queries", "keys", "landmarks")
    )  # fmt: skip
    sizes = all(type(n) is int and 0 <= n < 1 << 31 for n in (unit, offset))
    listed = isinstance(marks, list) and 0 < len(marks) <= MOST_MARKS and all(mark in POOLED for mark in marks)
    if not sizes or queries not in QUERIES or keys not in KEYS or not isinstance(marks, list) or not listed:
        raise _unfit(path, "its metadata lacks unit, offset, queries, keys or landmarks, or has odd ones",
                     "train the gates again")  # fmt: skip
    return Trained(about["unit"], about["offset"], about["queries"], about["keys"], tuple(marks))


def _wanted(score: Expr, unit: UnitPlan, queries: str, path: Path) -> Trained:
    if unit.stride != unit.size:
        raise _unfit(path, f"units of `{unit.name}` overlap, and gates are of units that do not", "leave `stride=` out")
    try:
        fns, raw = inputs_of(score, unit)
    except ValueError as error:
        raise _unfit(path, str(error), "such as `c = mean[i] raw.k`") from None
    return Trained(unit.size, unit.offset, queries, "raw.k" if raw else "k", fns)


def _check_same(there: Trained, here: Trained, about: dict[str, Any], path: Path) -> None:
    words = {
        "unit": "units of {} tokens", "offset": "units from position {} on", "keys": "landmarks of `{}`",
        "landmarks": "landmarks {}",
    }  # fmt: skip
    for name, phrase in words.items():
        pair = getattr(there, name), getattr(here, name)
        if pair[0] != pair[1]:
            one, other = (", ".join(x) if isinstance(x, tuple) else str(x) for x in pair)
            raise _unfit(
                path,
                f"they were trained on {phrase.format(one[:_SEEN])}, the policy has {phrase.format(other)}"
                + _origin(about),
                "write the policy as they were trained, or train again",
            )


# ---------------------------------------------------------------- tensors


def _shapes(file: Any, path: Path, layers: frozenset[int], facts: ModelFacts, marks: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that is there and may be; the width is that of the first layer's map of keys."""
    names = set(file.keys())
    missing = [layer for layer in sorted(layers) if f"layers.{layer}.k" not in names]
    if missing:
        raise _unfit(path, f"`layers.{missing[0]}.k` is missing", _SHAPES)
    first = file.get_slice(f"layers.{min(layers)}.k").get_shape() if layers else []
    width = int(first[-1]) if len(first) == 3 else 0
    joined = (facts.kv_heads, facts.group * facts.head_dim, width)
    out: dict[str, tuple[int, ...]] = {"rope": (width // 2,)} if "rope" in names else {}
    if not 0 < width <= 1 << 16 or ("rope" in out and width % 2):
        raise _unfit(path, f"gates of width {width} have no meaning", _SHAPES)
    for layer in range(facts.layers):
        name = f"layers.{layer}."
        if f"{name}k" not in names:
            continue
        q = tuple(file.get_slice(f"{name}q").get_shape()) if f"{name}q" in names else None
        heads = (
            facts.q_heads if q is None or (q != joined and _k_heads(file, name) == facts.q_heads) else facts.kv_heads
        )
        shapes = {
            "q": joined if q == joined else (facts.q_heads, facts.head_dim, width),
            "k": (heads, marks * facts.head_dim, width), "q_norm": (width,), "k_norm": (width,),
        }  # fmt: skip
        if q is None and width != facts.head_dim:
            raise _unfit(
                path, f"`{name}q` is missing, and the width {width} is not the heads' {facts.head_dim}", _SHAPES
            )
        out |= {name + part: shapes[part] for part in PARTS if name + part in names}
    return out


def _k_heads(file: Any, name: str) -> int:
    return int((file.get_slice(f"{name}k").get_shape() or [0])[0])


def _origin(about: dict[str, Any]) -> str:
    model = about.get("model")
    return f" (trained on {model[:_SEEN]})" if isinstance(model, str) and model else ""


def _unfit(path: Path, reason: str, hint: str) -> PolicyError:
    return fail("K616", f"the trained gates do not fit: {reason}", outside(str(path)), hint)
