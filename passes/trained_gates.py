"""What files of trained gates say of themselves, held against the policy and the model before a number is read.

Takes a plan and paths; gives what each file was trained on and the shapes of its tensors. Guarantees: headers alone
are read, of at most 1 GiB; what is wrong is a PolicyError (K615 unreadable, K616 does not fit) that names file and
tensor. Who compiles a policy and who loads its weights asks here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompile.dsl.diagnostics import PolicyError, fail, outside
from kvcompile.kernels.plan import Expr, ModelFacts, PolicyPlan, UnitPlan, words_of
from kvcompile.passes.files import MAX_WEIGHTS
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


@dataclass(frozen=True, slots=True)
class Header:
    """A file that fits. shapes: of every tensor."""

    trained: Trained
    shapes: Mapping[str, tuple[int, ...]]


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


def check_gates(plan: PolicyPlan, files: Mapping[str, Path]) -> None:
    """Every file of gates of a plan. files: path by key of the score."""
    for key, (score, layers) in gates_in(plan).items():
        with opened(files[key], "numpy") as file:
            header_of(file, files[key], score, layers, plan)


def header_of(file: Any, path: Path, score: Expr, layers: frozenset[int], plan: PolicyPlan) -> Header:
    """What an open file holds, checked against what a plan's score asks of it in `layers`."""
    unit = plan.unit(next(words_of(arg)[0] for arg in score.args if arg.op == "landmark"))
    about = _about(file, path)
    trained, origin = _trained(about, path), _origin(about)
    _check_same(trained, _wanted(score, unit, trained.queries, path), about, path)
    if plan.compact:
        raise unfit(path, "they know original positions, and the policy has `positions compact`", "leave it out")
    shapes = _shapes(file, path, layers, plan.facts, len(trained.landmarks))
    odd = sorted(set(file.keys()) - set(shapes))
    if odd:
        raise unfit(path, f"there is `{odd[0][:_SEEN]}`, which no layer of this model reads{origin}", _SHAPES)
    for name, shape in shapes.items():
        cut = file.get_slice(name)
        if tuple(cut.get_shape()) != shape or cut.get_dtype() not in FLOATS:
            seen = f"{cut.get_dtype()} {list(cut.get_shape())}"
            raise unfit(path, f"`{name}` is {seen} where {list(shape)} floats are meant{origin}", _SHAPES)
    return Header(trained, shapes)


@contextlib.contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file; of `numpy` only the header may be read. PolicyError K615 for what is none."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.is_dir():
            raise _unreadable(path, "it is a directory", "name the file in it")
        if path.stat().st_size > MAX_WEIGHTS:
            raise _unreadable(path, f"it is larger than {MAX_WEIGHTS} bytes", "is this a file of trained scores?")
        with safe_open(str(path), framework=framework, device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise _unreadable(path, "there is no such file", "check the path") from None
    except SafetensorError as error:
        raise _unreadable(path, f"it is no safetensors file ({error})", "save it with safetensors") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable(path, str(reason), "check the path and its rights") from None


def _unreadable(path: Path, reason: str, hint: str) -> PolicyError:
    return fail("K615", f"cannot read the trained scores: {reason}", outside(str(path)), hint)


# ---------------------------------------------------------------- what the file says of itself


def _about(file: Any, path: Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(PROVENANCE, "")
    try:
        found = json.loads(text) if 0 < len(text) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise unfit(path, "it does not say what its gates were trained on",
                     f"its metadata needs an entry `{PROVENANCE}`, as `kvcompile learn` writes it")  # fmt: skip
    if found.get("version") != VERSION:
        raise unfit(path, f"its version is {str(found.get('version'))[:20]}, this one reads {VERSION}",
                     "train the gates again")  # fmt: skip
    return found


def _trained(about: dict[str, Any], path: Path) -> Trained:
    unit, offset, queries, keys, marks = (
        about.get(name) for name in ("unit", "offset", "queries", "keys", "landmarks")
    )  # fmt: skip
    from kvcompile.kernels.gates import POOLED

    sizes = all(type(n) is int and 0 <= n < 1 << 31 for n in (unit, offset))
    listed = isinstance(marks, list) and 0 < len(marks) <= MOST_MARKS and all(mark in POOLED for mark in marks)
    if not sizes or queries not in QUERIES or keys not in KEYS or not isinstance(marks, list) or not listed:
        raise unfit(path, "its metadata lacks unit, offset, queries, keys or landmarks, or has odd ones",
                     "train the gates again")  # fmt: skip
    return Trained(about["unit"], about["offset"], about["queries"], about["keys"], tuple(marks))


def _wanted(score: Expr, unit: UnitPlan, queries: str, path: Path) -> Trained:
    if unit.stride != unit.size:
        raise unfit(path, f"units of `{unit.name}` overlap, and gates are of units that do not", "leave `stride=` out")
    from kvcompile.kernels.gates import inputs_of

    try:
        fns, raw = inputs_of(score, unit)
    except ValueError as error:
        raise unfit(path, str(error), "such as `c = mean[i] raw.k`") from None
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
            raise unfit(
                path,
                f"they were trained on {phrase.format(one[:_SEEN])}, the policy has {phrase.format(other)}"
                + _origin(about),
                "write the policy as they were trained, or train again",
            )


# ---------------------------------------------------------------- tensors


def _shapes(file: Any, path: Path, layers: frozenset[int], facts: ModelFacts, marks: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that is there and may be; the width is that of the first layer's map of keys."""
    from kvcompile.kernels.gates import PARTS

    names = set(file.keys())
    missing = [layer for layer in sorted(layers) if f"layers.{layer}.k" not in names]
    if missing:
        raise unfit(path, f"`layers.{missing[0]}.k` is missing", _SHAPES)
    first = file.get_slice(f"layers.{min(layers)}.k").get_shape() if layers else []
    width = int(first[-1]) if len(first) == 3 else 0
    joined = (facts.kv_heads, facts.group * facts.head_dim, width)
    out: dict[str, tuple[int, ...]] = {"rope": (width // 2,)} if "rope" in names else {}
    if not 0 < width <= 1 << 16 or ("rope" in out and width % 2):
        raise unfit(path, f"gates of width {width} have no meaning", _SHAPES)
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
            raise unfit(
                path, f"`{name}q` is missing, and the width {width} is not the heads' {facts.head_dim}", _SHAPES
            )
        out |= {name + part: shapes[part] for part in PARTS if name + part in names}
    return out


def _k_heads(file: Any, name: str) -> int:
    return int((file.get_slice(f"{name}k").get_shape() or [0])[0])


def _origin(about: dict[str, Any]) -> str:
    model = about.get("model")
    return f" (trained on {model[:_SEEN]})" if isinstance(model, str) and model else ""


def unfit(path: Path, reason: str, hint: str) -> PolicyError:
    return fail("K616", f"the trained gates do not fit: {reason}", outside(str(path)), hint)
