"""The launch constants that may be tuned, per template: what a template reads today, and no more.

Takes a `KernelSpec`, gives its candidates (`Config`), the same always, the untuned one among them; puts a config
into a spec. Guarantees: any config gives the same answers but for rounding, so a wrong choice costs time only.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

from kvcompile.kernels.gpus import KIB
from kvcompile.kernels.spec import KernelSpec

Config = tuple[tuple[str, int], ...]  # (knob, value), sorted by knob
TEMPLATES = Path(__file__).parent / "templates"

# Facts of a spec, but for `units`: work units per multiprocessor, which `make_scratch` of decode takes as `target`.
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {
        "block_n": (32, 64, 128),
        "warps": (2, 4, 8),
        "stages": (2, 3, 4),
        "min_chunk": (128, 256, 512),
        "units": (1, 2, 3, 4),
    },
    "spans": {
        "block_n": (16, 32, 64),
        "warps": (2, 4, 8),
        "stages": (2, 3, 4),
        "min_chunk": (128, 256, 512),
        "units": (1, 2, 3, 4),
    },
    "blocks": {"block_m": (64, 128), "block_n": (32, 64), "warps": (4, 8), "stages": (2, 3, 4)},
    "marks": {"block_n": (16, 32, 64), "warps": (2, 4, 8)},
    "units": {"block_n": (4, 8, 16, 32), "warps": (4, 8)},
    "chosen": {"block_m": (64, 128), "block_n": (16, 32), "warps": (4, 8)},
    "prefill": {"block_m": (64, 128), "block_n": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    "evict": {"warps": (2, 4, 8, 16)},
    "select": {"warps": (4, 8, 16)},
    "pack": {"warps": (2, 4, 8)},
    "columns": {"block_n": (32, 64, 128), "block_q": (16, 32, 64, 128), "warps": (4, 8)},
    "keys": {"block_n": (32, 64, 128), "warps": (2, 4, 8)},
    "pool": {"warps": (2, 4, 8)},
}
UNITS = 3  # of an untuned decode; UNITS_PER_SM in its template
MOST = 192 * KIB  # of tiles under way: more fits no multiprocessor beside the rest
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
# Facts that no launch time depends on: which number a count is, what a share is, names.
NUMBERS = ("count", "fraction", "floor", "state_names")


def default(spec: KernelSpec) -> Config:
    """The config of the spec as it is: what runs where nothing was tuned."""
    facts = dict(spec.facts)
    known = {name: int(facts[name]) for name in _knobs(spec) if name in facts}
    return tuple(sorted((known | ({"units": UNITS} if spec.template in ("decode", "spans") else {})).items()))


def space(spec: KernelSpec) -> tuple[Config, ...]:
    """Every candidate, in a fixed order, the default among them."""
    untuned, knobs = default(spec), _knobs(spec)
    own = dict(untuned)
    values = [sorted({own[name], *some}) for name, some in sorted(knobs.items())]
    every = (tuple(zip(sorted(knobs), chosen, strict=True)) for chosen in product(*values))
    return tuple(config for config in every if config == untuned or _sane(spec, dict(config)))


def _knobs(spec: KernelSpec) -> dict[str, tuple[int, ...]]:
    """Those that the spec has: a fact that is gone from it is no knob any more."""
    facts = dict(spec.facts)
    return {name: some for name, some in KNOBS.get(spec.template, {}).items() if name in facts or name == "units"}


def _sane(spec: KernelSpec, config: dict[str, int]) -> bool:
    if spec.template in ("decode", "spans"):
        return tile_bytes(spec, config) <= MOST
    if spec.template == "blocks":  # tiles never cross a listed one
        return tile_bytes(spec, config) <= MOST and not spec.number("tile") % config["block_n"]
    if spec.template == "prefill":
        listed = int(dict(spec.facts).get("listed", 0))  # tiles never cross a listed block
        return tile_bytes(spec, config) <= MOST and not (listed % config["block_m"] or listed % config["block_n"])
    if spec.template == "columns" and spec.number("window"):
        return config["block_q"] <= max(16, spec.number("block_q"))
    return True


def tile_bytes(spec: KernelSpec, config: dict[str, int]) -> int:
    """Bytes of the tiles that a program keeps under way: all stages but the one in use."""
    both = spec.template in ("decode", "prefill", "spans", "blocks")  # keys and values
    row = spec.number("head_dim") * ITEM[str(spec.fact("dtype"))] * (2 if both else 1)
    return config["block_n"] * row * max(1, config.get("stages", 2) - 1)


def space_digest(spec: KernelSpec) -> str:
    """Of the candidate list: a config of another list is not taken over."""
    return _digest(repr(space(spec)))


def facts_digest(spec: KernelSpec) -> str:
    """Of what the kernel is specialised on and of its formulas, without knobs and without `NUMBERS`."""
    knobs = KNOBS.get(spec.template, {})
    kept = [(name, _shape(name, value)) for name, value in spec.facts if name not in knobs]
    return _digest(repr((spec.template, kept, spec.holes)))


def _shape(name: str, value: object) -> object:
    """Whether there is a count, share or floor at all changes the kernel; how large it is does not."""
    if name == "fraction":
        return not str(value).endswith("/0")
    if name == "floor":
        return not str(value).startswith("0/")
    if name == "count":
        return int(str(value)) >= 0
    return None if name in NUMBERS else value


def kernel_digest(template: str) -> str:
    """Of a template's text with all that it includes."""
    return _digest("\n".join(_texts(f"{template}.py.jinja", set())))


def _texts(name: str, seen: set[str]) -> list[str]:
    if name in seen:
        return []
    seen.add(name)
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    found = re.findall(r'{%-?\s*(?:include|from)\s+"([^"]+)"', text)
    return [text, *(part for inner in found for part in _texts(inner, seen))]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_config(spec: KernelSpec, config: Config) -> KernelSpec:
    """The spec with a config's constants; the same one where they are its own, else with a name of its own."""
    facts = dict(spec.facts)
    facts |= {name: value for name, value in config if name in facts}
    if tuple(sorted(facts.items())) == spec.facts:
        return spec
    made = replace(spec, facts=tuple(sorted(facts.items())))
    return replace(made, tag="_".join(part for part in (spec.tag, made.digest()[:6]) if part))
