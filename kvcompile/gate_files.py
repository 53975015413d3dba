"""Files of trained block gates: safetensors that say of themselves what they were trained on.

Takes weights and facts; gives a file, and of a file that nobody vouches for float32 tensors by the names of
`kernels.gates`. Guarantees: what `passes.trained_gates` refuses is refused here, and so are numbers that are not
finite, with a PolicyError (K615 unreadable, K616 does not fit) that names file and tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.plan import Expr, PolicyPlan
from kvcompile.passes.masks import PROVENANCE
from kvcompile.passes.trained_gates import FORMAT, VERSION, Trained, header_of, unfit


def gate_bytes(tensors: Mapping[str, Tensor], trained: Trained, provenance: Mapping[str, Any]) -> bytes:
    """The bytes of a file. provenance: JSON values, where the gates come from."""
    from safetensors.torch import save

    told = {**provenance, "format": FORMAT, "version": VERSION, **trained.as_json()}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry only: several would be written in an order of chance, and equal gates in unequal bytes.
    return save(weights, {PROVENANCE: json.dumps(told, sort_keys=True)})


def read_gates(
    file: Any, path: Path, key: str, score: Expr, layers: frozenset[int], plan: PolicyPlan
) -> dict[str, Tensor]:
    """The tensors of an open file, checked against what a plan asks of them, by their names behind `key:`."""
    header = header_of(file, path, score, layers, plan)
    found: dict[str, Tensor] = {}
    for name in header.shapes:
        tensor = file.get_tensor(name).float()
        if not bool(tensor.isfinite().all()):
            raise unfit(path, f"`{name}` holds NaN or infinity", "train the gates again")
        found[f"{key}:{name}"] = tensor
    trained = header.trained
    for word, holds in (("pooled", trained.queries == "pooled"), ("raw", trained.keys == "raw.k")):
        if holds:
            found[f"{key}:{word}"] = torch.zeros(())
    return found
