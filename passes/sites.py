"""Finds the attention sites of a Hugging Face decoder: one per layer, each with the layer that holds it.

Takes a model, gives its sites in layer order, with the scale of each one's logits. Guarantees: a model that cannot be
rewritten is refused here, by name and with the reason, before anything is changed; all layers have one scale.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.facts import text_config
from kvcompile.passes.families import UNSCALED, WAY_OUT, own_attention, refuse_family

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what the forward of a module names that calls transformers' attention interface


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer: its index, its module, the decoder layer around it, the layer's qualified name, the factor
    of its logits."""

    index: int
    attention: nn.Module
    layer: nn.Module
    name: str
    scale: float

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return int(getattr(self.attention, "num_key_value_groups", 1))


def find_sites(model: nn.Module) -> tuple[AttentionSite, ...]:
    """All attention sites of a causal decoder, in layer order.

    Raises KvCompileError for what cannot be rewritten: attention of its own, latent or shared keys and values, layers
    without attention, layers of different scales, a layer without exactly one attention, no language model head.
    """
    family, outer = type(model).__name__, getattr(model, "config", None)
    if outer is None:
        raise KvCompileError(f"{family} is no Hugging Face model: it has no configuration")
    config = text_config(outer)
    for each in (outer, config):
        refuse_family(each, family)
    if not hasattr(model, "generate") or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise KvCompileError(f"{family} has no language model head: give the causal model that holds it")
    decoder: Any = decoder_of(model)
    if decoder is not model and hasattr(decoder, "generate") and decoder.get_output_embeddings() is not None:
        name = next(name for name, module in model.named_modules() if module is decoder)
        raise KvCompileError(f"{family} lets its language model generate by itself: optimise that one, model.{name}")
    found: dict[int, AttentionSite] = {}
    for site in _candidates(model):
        if site.index in found:
            there = found[site.index].name
            raise KvCompileError(f"layer {site.index} has two attentions: in {there} and in {site.name}. {WAY_OUT}")
        found[site.index] = site
    expected = int(config.num_hidden_layers)
    if not found:
        reason = own_attention(config) or "does not call it in any layer"
        raise KvCompileError(
            f"{family} has no attention that can be rewritten: kvcompile needs a causal language model that calls "
            f"transformers' attention interface, and this one {reason}. {WAY_OUT}"
        )
    missing = [i for i in range(expected) if i not in found]
    if missing:
        raise KvCompileError(
            f"{family}: no attention that calls transformers' attention interface found in layer {missing[0]} of "
            f"{expected}. {WAY_OUT}"
        )
    sites = tuple(found[i] for i in range(expected))
    _check_alike(sites, family)
    return sites


def decoder_of(model: Any) -> nn.Module:
    """The language model inside a multimodal one; a plain decoder itself."""
    decoder: nn.Module = model if text_config(model.config) is model.config else model.get_decoder()
    return decoder


def _candidates(model: nn.Module) -> list[AttentionSite]:
    """Modules in the layers of the decoder that know their layer and call transformers' attention interface."""
    found: dict[int, AttentionSite] = {}  # by module: a list may stand in a layer of another
    inside = {id(module) for module in decoder_of(model).modules()}
    for list_name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or id(layers) not in inside:
            continue
        for position, layer in enumerate(layers):
            for module in layer.modules():
                index = getattr(module, "layer_idx", None)
                if isinstance(index, int) and _calls_interface(type(module)):
                    name = f"{list_name}.{position}"
                    found.setdefault(id(module), AttentionSite(index, module, layer, name, _scale(module)))
    return list(found.values())


def _calls_interface(module: type[nn.Module]) -> bool:
    forwards = [vars(base)["forward"] for base in module.__mro__ if "forward" in vars(base)]
    codes = [getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards]
    return any(code is not None and INTERFACE in code.co_names for code in codes)


def _scale(attention: Any) -> float:
    """The factor of a module's logits, as it asks the attention interface for it; checked again when it asks."""
    if type(attention).__name__ in UNSCALED:
        return 1.0
    scale = getattr(attention, "scaling", None)
    return float(attention.head_dim**-0.5 if scale is None else scale)


def _check_alike(sites: tuple[AttentionSite, ...], family: str) -> None:
    """What one decision for all layers takes for granted."""
    first = sites[0]
    for site in sites:
        if site.scale != first.scale:
            raise KvCompileError(
                f"{family}: the attention of {site.name} scales its logits by {site.scale:.6g}, that of {first.name} "
                f"by {first.scale:.6g}: layers of different scales are not supported, since the evictions of a step "
                f"are decided for all layers together. {WAY_OUT}"
            )
        for name, what in (("head_dim", "channels a head"), ("group", "query heads to a KV head")):
            mine, theirs = (getattr(s if name == "group" else s.attention, name, None) for s in (site, first))
            if mine != theirs:
                raise KvCompileError(
                    f"{family}: the attention of {site.name} has {mine} {what}, that of {first.name} {theirs}: layers "
                    f"of different shapes are not supported. {WAY_OUT}"
                )
