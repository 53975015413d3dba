"""Finds the attention sites of a Hugging Face decoder: one per layer, each with the layer that holds it.

Takes a model, gives its sites in layer order; a model that cannot be rewritten is refused here, by name
and with the reason, before anything is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kvcompile.kernels.errors import KvCompileError


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer: its index, its module, the decoder layer around it, the layer's qualified name."""

    index: int
    attention: nn.Module
    layer: nn.Module
    name: str


def find_sites(model: nn.Module) -> tuple[AttentionSite, ...]:
    """All attention sites of a causal decoder, in layer order.

    Raises KvCompileError for what cannot be rewritten: no attention backend interface, a layer without
    exactly one attention, or attention with features that no kernel has yet.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_attention_backend", False):
        raise KvCompileError(
            f"{type(model).__name__} has no attention that can be rewritten: kvcompile needs a Hugging Face causal "
            "language model that calls transformers' attention interface (Llama, Qwen3, Mistral without a window, ...)"
        )
    if not hasattr(model, "generate") or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise KvCompileError(f"{type(model).__name__} has no language model head: give the causal model that holds it")
    _check_config(config.get_text_config() if hasattr(config, "get_text_config") else config, type(model).__name__)
    found: dict[int, AttentionSite] = {}
    for list_name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for position, layer in enumerate(layers):
            name = f"{list_name}.{position}"
            for attention in _attentions(layer):
                if getattr(attention, "sinks", None) is not None:
                    raise KvCompileError(f"{name}: attention sinks with learned logits are not supported yet")
                index = int(attention.layer_idx)  # type: ignore[arg-type]
                if index in found:
                    raise KvCompileError(f"layer {index} has two attentions: in {found[index].name} and in {name}")
                found[index] = AttentionSite(index, attention, layer, name)
    expected = int((config.get_text_config() if hasattr(config, "get_text_config") else config).num_hidden_layers)
    missing = [i for i in range(expected) if i not in found]
    if missing:
        raise KvCompileError(
            f"{type(model).__name__}: no rewritable attention found in layer {missing[0]} of {expected} "
            "(a module with `layer_idx`, `scaling` and grouped KV heads inside a ModuleList)"
        )
    return tuple(found[i] for i in range(expected))


def _attentions(layer: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in layer.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and hasattr(m, "scaling")
        and hasattr(m, "num_key_value_groups")
    ]


def _check_config(config: object, family: str) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds or (window and not kinds and getattr(config, "use_sliding_window", True)):
        raise KvCompileError(f"{family}: sliding-window layers are not supported yet (sliding_window={window})")
    if kinds - {"full_attention", "sliding_attention"}:
        raise KvCompileError(f"{family}: layers of kind {sorted(kinds - {'full_attention'})} are not supported yet")
    unsupported = {
        "attn_logit_softcapping": "soft-capped attention logits",
        "kv_lora_rank": "latent attention",
    }
    for attribute, what in unsupported.items():
        if getattr(config, attribute, None):
            raise KvCompileError(f"{family}: {what} is not supported yet ({attribute}={getattr(config, attribute)})")
