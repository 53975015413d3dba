"""A trained retaining head: from an entry's own query, key and value to one score per KV head.

Takes weights by name, gives float32 scores. The head is two linear layers with a SiLU between them, as Locret
trains it (arXiv:2410.01805, section 4.1), one per decoder layer, over all heads of the token together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024  # tokens whose hidden values are held at a time


def parts(key: str, layer: int) -> tuple[str, str, str, str]:
    """Names of a layer's weights: w1 [hidden, in], b1 [hidden], w2 [kv_heads, hidden], b2 [kv_heads]."""
    return tuple(f"{key}:layers.{layer}.{part}" for part in ("w1", "b1", "w2", "b2"))  # type: ignore[return-value]


def retained(weights: Mapping[str, Tensor], key: str, layer: int, inputs: list[Tensor]) -> Tensor:
    """silu(x w1^T + b1) w2^T + b2, float32 [kv_heads, n]; b1 and b2 may be missing.

    inputs: each [kv_heads, group or 1, n, head_dim], in the order in which they are joined; heads in order.
    """
    w1, b1, w2, b2 = (weights.get(name) for name in parts(key, layer))
    assert w1 is not None and w2 is not None
    x = torch.cat([part.movedim(2, 0).flatten(1) for part in inputs], 1).float()
    blocks = [F.linear(F.silu(F.linear(block, w1, b1)), w2, b2) for block in x.split(BLOCK)]
    return torch.cat(blocks).transpose(0, 1)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A digest of names and values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
