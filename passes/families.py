"""What is known of model families by name or configuration, and which of them no policy can be carried out in.

Takes configurations, duck-typed; gives facts or refuses. Guarantees: nothing is imported for it, and a refusal names
the family, the true reason and the way out. Sources: the modelling files of transformers 5.17 and 5.23.
"""

from __future__ import annotations

from typing import Any

from kvcompile.kernels.errors import KvCompileError

SINKS = ("gpt_oss",)  # families whose softmax has a learned logit per query head
SOFTCAPS = ("gemma2", "vaultgemma")  # families that soften logits; others have the number and leave it unused
UNSCALED = ("OPTAttention", "BioGptAttention")  # these scale their queries themselves, and ask for a scale of 1
# Layers that hand on to their attention none of the arguments that they do not know; this one they hand on unread.
CARRIERS = {"StableLmDecoderLayer": "position_ids"}
PREFIXED = ("paligemma", "colpali")  # wrappers that let every token of a prompt read every other
OWN_ATTENTION = {
    "bloom": "adds a bias by distance (ALiBi) to its logits, in attention code of its own",
    "codegen": "computes attention in code of its own",
    "falcon": "computes attention in code of its own, where asked with a bias by distance (ALiBi)",
    "gptj": "computes attention in code of its own",
    "mpt": "adds a bias by distance (ALiBi) to its logits, in attention code of its own",
}
_STATE = "a running state takes the place of keys and values, so there are no entries to drop"
ODD_LAYERS = {
    "chunked_attention": "queries read only the chunk of positions that they stand in",
    "linear_attention": _STATE,
    "mamba": _STATE,
    "conv": _STATE,
    "recurrent": _STATE,
    "hybrid": "a state-space model with a running state of its own runs beside attention in every layer",
}
WAY_OUT = "Run the model untouched, or take one that docs/models.md lists as supported"


def refuse_family(config: Any, family: str) -> None:
    """KvCompileError for a configuration of which it is clear without weights that no policy can be carried out."""
    reason = _reason(config)
    if reason is not None:
        raise KvCompileError(f"{family}: {reason}. {WAY_OUT}")


def own_attention(config: Any) -> str | None:
    """How a family computes attention past transformers' interface; None where it is not known to."""
    return OWN_ATTENTION.get(str(getattr(config, "model_type", "")))


def _reason(config: Any) -> str | None:
    if getattr(config, "model_type", "") in PREFIXED:
        return "prompts are read in both directions (a prefix, image and text), and a cache only has earlier tokens"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder with a decoder is not supported, only decoders alone are"
    if getattr(config, "cross_attention_layers", None):
        return (
            f"layers {list(config.cross_attention_layers)} read images by cross attention, not the tokens before them"
        )
    if getattr(config, "kv_lora_rank", None):
        return (
            f"latent attention (kv_lora_rank={config.kv_lora_rank}) is not supported: all heads share one latent per "
            "token, so no head's entries can be dropped without dropping them for all heads"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        return (
            f"its last {config.num_kv_shared_layers} layers read the keys and values of earlier layers "
            "(num_kv_shared_layers), so one row of the cache would have to follow the decisions of several layers"
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "queries read later tokens, too (use_bidirectional_attention), and a cache only has earlier ones"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention"}
    if kinds:
        kind = min(kinds)
        return f"layers of kind {kind!r} are not supported: {ODD_LAYERS.get(kind, 'a kind that plans do not know')}"
    return None
