"""What a result depends on besides the policy: weights, words, samples, versions, each as a short text.

Takes a model, a tokenizer, samples; gives SHA-256 digests and plain dictionaries fit for JSON.
Guarantees: equal weights, configuration and words give equal digests wherever they lie; names of folders do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import kvcompile

# Of a configuration: where it came from, and how attention is run, which `optimize` decides.
_PASSING = frozenset({"_name_or_path", "_attn_implementation", "attn_implementation", "transformers_version"})


def digest(value: Any) -> str:
    """SHA-256 of plain data, by its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_digest(model: Any) -> str:
    """SHA-256 of the bytes of all weights, with their names, shapes and dtypes, and of the configuration."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            found.update(memoryview(flat.view(torch.uint8).numpy()))
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PASSING}
    found.update(digest(config).encode())
    return found.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's words and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([rules, tokenizer.special_tokens_map])


def samples_digest(samples: Iterable[Any]) -> str:
    """SHA-256 of samples: what is asked, and what should follow."""
    return digest([asdict(sample) for sample in samples])


def versions() -> dict[str, str]:
    """Of what results depend on."""
    triton = {}
    if torch.cuda.is_available():
        triton["triton"] = version("triton")
    return {
        "kvcompile": kvcompile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **triton,
    }


def machine(model: Any) -> dict[str, Any]:
    """Where it ran: what times depend on."""
    device = next(model.parameters()).device
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
    }
