"""Trained scores: the weights of `learned(...)` from a file that nobody vouches for.

Takes a plan and the path of each file, gives float32 tensors by the names of `kernels.learned` and `kernels.gates`.
Guarantees: safetensors only, at most 1 GiB, and every tensor that the plan's layers need in the shape that they need;
what is wrong is a PolicyError (K615 unreadable, K616 does not fit) that names file and tensor. Gates: `gate_files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompile.dsl.diagnostics import PolicyError, fail, outside
from kvcompile.gate_files import read_gates
from kvcompile.kernels.learned import parts
from kvcompile.kernels.plan import Expr, ModelFacts, PolicyPlan
from kvcompile.passes.trained_gates import FLOATS, gates_in, opened

_SHOWN = 60  # characters of a wrong name that a message shows


def load_weights(plan: PolicyPlan, files: Mapping[str, Path], device: torch.device) -> dict[str, Tensor]:
    """All weights that a plan's trained scores read; empty where there are none. files: path by key of the score."""
    found: dict[str, Tensor] = {}
    for score in _trained(plan):
        key = str(score.value)
        found |= _load(key, files[key], plan.facts, _width(score, plan.facts), device)
    for key, (score, layers) in gates_in(plan).items():
        with opened(files[key], "pt") as file:
            gates = read_gates(file, files[key], key, score, layers, plan)
        found |= {name: tensor.to(device) for name, tensor in gates.items()}
    return found


def _trained(plan: PolicyPlan) -> list[Expr]:
    formulas = [s.init for s in plan.states]
    formulas += [e for u in plan.updates for e in (*(value for _, value in u.assigns), u.where) if e is not None]
    return list(dict.fromkeys(n for f in formulas for n in f.walk() if n.op == "learned"))


def _width(score: Expr, facts: ModelFacts) -> int:
    """How many numbers a score reads of each token: its fields, all heads of each."""
    heads = sum(facts.q_heads if field.op == "queries" else facts.kv_heads for field in score.args)
    return heads * facts.head_dim


def _load(key: str, path: Path, facts: ModelFacts, width: int, device: torch.device) -> dict[str, Tensor]:
    """One file's tensors, checked and moved; nothing is read before all names and shapes are right."""
    with opened(path, "pt") as file:
        names = set(file.keys())
        wanted = _wanted(file, names, path, facts, width)
        odd = sorted(names - set(wanted))
        if odd:
            raise _unfit(path, f"it holds `{odd[0][:_SHOWN]}`, which no layer of this model reads", width, facts)
        for name, shape in wanted.items():
            cut = file.get_slice(name)
            if tuple(cut.get_shape()) != shape or cut.get_dtype() not in FLOATS:
                seen = f"{cut.get_dtype()} {list(cut.get_shape())}"
                raise _unfit(path, f"`{name}` is {seen} where {list(shape)} floats are meant", width, facts)
        tensors = {}
        for name in wanted:
            tensor = file.get_tensor(name).float()
            if not bool(tensor.isfinite().all()):
                raise _unfit(path, f"`{name}` holds NaN or infinity", width, facts)
            tensors[f"{key}:{name}"] = tensor.to(device)
        return tensors


def _wanted(file: Any, names: set[str], path: Path, facts: ModelFacts, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that is there and read; the hidden size is each layer's own."""
    out: dict[str, tuple[int, ...]] = {}
    for layer in range(facts.layers):
        w1, b1, w2, b2 = (name.removeprefix(":") for name in parts("", layer))
        missing = [name for name in (w1, w2) if name not in names]
        if missing:
            raise _unfit(path, f"`{missing[0]}` is missing", width, facts)
        hidden = int((file.get_slice(w1).get_shape() or [0])[0])
        shapes = {w1: (hidden, width), b1: (hidden,), w2: (facts.kv_heads, hidden), b2: (facts.kv_heads,)}
        out |= {name: shape for name, shape in shapes.items() if name in names}
    return out


def _unfit(path: Path, reason: str, width: int, facts: ModelFacts) -> PolicyError:
    return fail(
        "K616", f"the trained scores do not fit this model: {reason}", outside(str(path)),
        f"layers.0 to layers.{facts.layers - 1} each need w1 [hidden, {width}] and w2 [{facts.kv_heads}, hidden], "
        f"and may have b1 [hidden] and b2 [{facts.kv_heads}]",
    )  # fmt: skip
