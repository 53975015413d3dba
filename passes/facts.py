"""Model facts: what a policy is bound to, from a Hugging Face model or its configuration.

Takes either, duck-typed; gives `ModelFacts`. Guarantees: transformers is not imported at module level; what is
missing or does not fit is a KvCompileError that names the attribute.
"""

from __future__ import annotations

from typing import Any

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ModelFacts

DTYPES = ("float32", "bfloat16", "float16")


def model_facts(source: Any) -> ModelFacts:
    """Facts of a model (it has `.config`) or of a configuration.

    A configuration's dtype is its own, float32 where it names none; its weights are counted on a model built
    without memory, 0 where transformers does not know the configuration.
    """
    model = source if hasattr(source, "config") and hasattr(source, "parameters") else None
    outer = model.config if model is not None else source
    config = outer.get_text_config() if hasattr(outer, "get_text_config") else outer
    layers, q_heads, hidden = (
        _number(config, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    head_dim = getattr(config, "head_dim", None) or hidden // q_heads
    if q_heads % kv_heads:
        raise KvCompileError(f"{q_heads} query heads cannot share {kv_heads} KV heads evenly")
    return ModelFacts(
        layers=layers,
        q_heads=q_heads,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        dtype=_dtype(model, config),
        hidden=hidden,
        weight_bytes=_weights(model) if model is not None else _weights_of_config(outer),
        family=str(getattr(config, "model_type", "")),
    )


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KvCompileError(
            f"{type(config).__name__} has no usable `{name}`: give a decoder such as Llama, or its configuration"
        )
    return value


def _dtype(model: Any, config: Any) -> str:
    dtype = next(model.parameters()).dtype if model is not None else getattr(config, "dtype", None)
    name = str(dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise KvCompileError(f"keys and values in {name} are not supported: load the model in {' or '.join(DTYPES)}")
    return name


def _weights(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _weights_of_config(config: Any) -> int:
    if not hasattr(config, "to_dict"):
        return 0
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, _dtype(None, config)))
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0  # a configuration of a kind that transformers has no causal model for
    return _weights(model)
