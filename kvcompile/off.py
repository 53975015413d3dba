"""Layers whose attention is off (`layers 21..27: off`): the branch adds nothing, and none of it runs.

Takes the sites of a model and the layers that a plan takes out; gives what was put in place, and how to undo it.
Guarantees: only instances change, all parameters stay where they are; a layer of which it is not known what belongs
to its attention is refused by name. LLM-Drop (arXiv 2406.15786) takes the norm before attention out with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.sites import AttentionSite
from kvcompile.replacing import Replaced, replace

_BEFORE = ("input_layernorm",)
_AROUND = ("input_layernorm", "post_attention_layernorm")
# Norms whose only reader, or only input, is the attention of their layer. A norm without a bias leaves 0 as it is, so
# one behind the attention can go as well. None: the layer's feed-forward part reads the same norm, which has to run.
_NORMS: dict[str, tuple[str, ...] | None] = {
    "LlamaDecoderLayer": _BEFORE,
    "MistralDecoderLayer": _BEFORE,
    "MixtralDecoderLayer": _BEFORE,
    "Qwen2DecoderLayer": _BEFORE,
    "Qwen2MoeDecoderLayer": _BEFORE,
    "Qwen3DecoderLayer": _BEFORE,
    "Qwen3MoeDecoderLayer": _BEFORE,
    "GemmaDecoderLayer": _BEFORE,
    "Gemma2DecoderLayer": _AROUND,
    "Gemma3DecoderLayer": _AROUND,
    "PhiDecoderLayer": None,
    "Phi3DecoderLayer": _BEFORE,
    "GptOssDecoderLayer": _BEFORE,
    "GraniteDecoderLayer": _BEFORE,
    "Olmo2DecoderLayer": ("post_attention_layernorm",),
    "Olmo3DecoderLayer": ("post_attention_layernorm",),
    "GlmDecoderLayer": _BEFORE,
    "Glm4DecoderLayer": ("input_layernorm", "post_self_attn_layernorm"),
    "CohereDecoderLayer": None,
    "Cohere2DecoderLayer": None,
    "SmolLM3DecoderLayer": _BEFORE,
    "Starcoder2DecoderLayer": _BEFORE,
    "StableLmDecoderLayer": _BEFORE,
    "GPTNeoXLayer": _BEFORE,
    "OPTDecoderLayer": ("self_attn_layer_norm",),
    "GPT2Block": ("ln_1",),
}


def refuse_off(sites: Sequence[AttentionSite], off: tuple[int, ...]) -> None:
    """KvCompileError for layers of a kind of which it is not known what belongs to their attention."""
    if off and len(off) == len(sites):
        raise KvCompileError("every layer is off, so no token would read any other: leave one layer on at least")
    for site in sites:
        kind = type(site.layer).__name__
        if site.index in off and kind not in _NORMS:
            raise KvCompileError(
                f"layer {site.index} cannot be off: what of a {kind} belongs to its attention is not known. Leave "
                f"`off` out of the policy, or take a model that docs/models.md lists as supported"
            )


def silence(sites: Iterable[AttentionSite], off: tuple[int, ...]) -> list[Replaced]:
    """Put forwards that do nothing into the attentions of these layers, and into the norms that only they need."""
    found = []
    for site in sites:
        if site.index not in off:
            continue
        replaced: list[tuple[nn.Module, Any]] = [(site.attention, nothing)]
        replaced += [(norm, unchanged) for norm in _norms(site.layer)]
        for module, ours in replaced:
            found.append(replace(module, ours))
    return found


def _norms(layer: nn.Module) -> list[nn.Module]:
    names = _NORMS[type(layer).__name__] or ()
    if getattr(layer, "do_layer_norm_before", True) is False:  # OPT 350m: the norm is of the whole stream
        names = ()
    if type(layer).__name__ == "StableLmDecoderLayer" and getattr(layer, "use_parallel_residual", False):
        names = ()
    return [getattr(layer, name) for name in names]


# One function for all layers: compiled code holds on to it.
def nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """In place of an attention's forward: [..., hidden] in, as many zeros out, without memory of their own."""
    return hidden_states.new_zeros(()).expand(hidden_states.shape), None


def unchanged(hidden_states: Tensor) -> Tensor:
    """In place of a norm's forward."""
    return hidden_states
