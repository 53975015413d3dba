"""Model facts: what a policy is bound to, from a Hugging Face model or its configuration.

Takes either, duck-typed; gives `ModelFacts`, the same from both. Guarantees: transformers is not imported at module
level; what is missing, does not fit or is of a family that cannot be supported is a KvCompileError that names it.
"""

from __future__ import annotations

from typing import Any

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes.families import SINKS, SOFTCAPS, WAY_OUT, own_attention, refuse_family

DTYPES = ("float32", "bfloat16", "float16")


def model_facts(source: Any) -> ModelFacts:
    """Facts of a model (it has `.config`) or of a configuration.

    A configuration's dtype is its own, float32 where it names none; its weights are counted on a model built
    without memory, 0 where transformers does not know the configuration.
    """
    model = source if hasattr(source, "config") and hasattr(source, "parameters") else None
    outer = model.config if model is not None else source
    config = text_config(outer)
    for each in (outer, config):
        refuse_family(each, type(each).__name__)
    if model is None and own_attention(config):
        raise KvCompileError(f"{type(config).__name__}: the family {own_attention(config)}. {WAY_OUT}")
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
        windows=_windows(config, layers),
        softcap=_softcap(config),
        sinks=_sinks(model, config),
    )


def text_config(config: Any) -> Any:
    """The configuration of the language model inside a multimodal one; a plain one itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _windows(config: Any, layers: int) -> tuple[int, ...]:
    """The sliding window of every layer, 0 where it has none; empty where no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = [bool(window) and getattr(config, "use_sliding_window", True)] * layers
    else:
        slides = [kind == "sliding_attention" for kind in kinds]
    if not any(slides):
        return ()
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise KvCompileError(f"{type(config).__name__} has sliding layers and sliding_window={window!r}")
    return tuple(window * slide for slide in slides)


def _softcap(config: Any) -> float:
    """What logits are softened to, 0 where they are as they are."""
    capped = getattr(config, "model_type", "") in SOFTCAPS
    return float(getattr(config, "attn_logit_softcapping", None) or 0.0) if capped else 0.0


def _sinks(model: Any, config: Any) -> bool:
    """Whether attention has sink logits; of a configuration alone it is known by the family."""
    if model is None:
        return getattr(config, "model_type", "") in SINKS
    return any(getattr(module, "sinks", None) is not None for module in model.modules())


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
    """Bytes that a decode step reads: of a multimodal model its language model and the head."""
    whole = text_config(model.config) is model.config
    read = [model] if whole else [model.get_decoder(), model.get_output_embeddings() or model.get_decoder()]
    weights = {id(p): p.numel() * p.element_size() for module in read for p in module.parameters()}
    return sum(weights.values())


def _weights_of_config(config: Any) -> int:
    if not hasattr(config, "to_dict"):
        return 0
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=getattr(torch, _dtype(None, config)))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        return _weights(model)
    return 0  # a configuration of a kind that transformers has no such model for
