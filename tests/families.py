"""One tiny random model of every family that is supported, with weights under which each feature of its attention
matters, and how to take each feature away; one configuration of every family that is refused.

Takes a family's name, gives a float32 transformers model in eval mode, the same for the same name and seed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # The usual 0.02 makes attention almost uniform: features of it would change nothing.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ALTERNATE = ["sliding_attention", "full_attention"]

Change = dict[str, Any] | Callable[[PreTrainedModel], None]


@dataclass(frozen=True, slots=True)
class Family:
    """A title; a configuration; per feature of its attention what takes it away: other options, or a change to the
    model. `rope`: the kind of rotary embedding that its configuration names; `compact`: whether keys can be turned by
    place, else a word of the reason why not."""

    title: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Change] = field(default_factory=dict)
    compact: str | None = None


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


PLAIN = rope("default")
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONG = rope("longrope", original_max_position_embeddings=512, short_factor=[2.0] * 8, long_factor=[8.0] * 8, factor=1.0)
PARTIAL = rope("default", partial_rotary_factor=0.5)


def _without_norms(model: PreTrainedModel) -> None:
    for module in list(model.modules()):
        for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.Identity())


def _without_sinks(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data.fill_(float("-inf"))


def _without_positions(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(("wpe.weight", "embed_positions.weight")):
            weight.data.zero_()


def _without_biases(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            weight.data.zero_()


NORMS: dict[str, Change] = {"norms of queries and keys": _without_norms}
BIASES: dict[str, Change] = {"biases of queries, keys and values": _without_biases}
FEWER: dict[str, Change] = {"mixture of experts": {"num_experts_per_tok": 1}}
WIDE: dict[str, Change] = {"sliding window in all layers": {"sliding_window": 400}}
MIXED: dict[str, Change] = {"sliding window in some layers": {"sliding_window": 400}}
PARTLY: dict[str, Change] = {"part of the channels rotated": rope("default", partial_rotary_factor=1.0)}
SAME = {"num_key_value_heads": None}  # as many as query heads: such configurations do not have the number
SLIDING = {"sliding_window": 9}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2", "llama", PLAIN),
    "llama_linear": Family("Llama, linear scaling", "llama", rope("linear", factor=4.0), {"linear RoPE": PLAIN}),
    "llama_dynamic": Family(
        "Llama, dynamic scaling",
        "llama",
        {**rope("dynamic", factor=4.0), "max_position_embeddings": 24},
        {"dynamic RoPE": PLAIN},
        "change with the length",
    ),
    "llama_yarn": Family("Llama, YaRN", "llama", YARN, {"YaRN RoPE": PLAIN}),
    "llama3": Family("Llama 3", "llama", LLAMA3, {"llama3 RoPE": PLAIN}),
    "mistral": Family("Mistral", "mistral", {**PLAIN, "sliding_window": None}),
    "mistral_sliding": Family("Mistral, with a window", "mistral", {**PLAIN, **SLIDING}, WIDE),
    "mixtral": Family("Mixtral", "mixtral", {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2}, FEWER),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2", PLAIN, BIASES),
    "qwen2_sliding": Family(
        "Qwen2, with windows",
        "qwen2",
        {**PLAIN, **SLIDING, "use_sliding_window": True, "max_window_layers": 1},
        {**BIASES, **MIXED},
    ),
    "qwen2_moe": Family(
        "Qwen2-MoE",
        "qwen2_moe",
        {**PLAIN, **EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
        {**BIASES, **FEWER},
    ),
    "qwen3": Family("Qwen3", "qwen3", {**PLAIN, "head_dim": 32}, NORMS),
    "qwen3_moe": Family("Qwen3-MoE", "qwen3_moe", {**PLAIN, **EXPERTS, "head_dim": 32}, {**NORMS, **FEWER}),
    "gemma": Family("Gemma", "gemma", {**PLAIN, "head_dim": 32}),
    "gemma2": Family(
        "Gemma 2",
        "gemma2",
        {
            **PLAIN,
            **SLIDING,
            "head_dim": 32,
            "layer_types": ALTERNATE,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        },
        {
            **MIXED,
            "soft-capped logits": {"attn_logit_softcapping": None},
            "scale of its own": {"query_pre_attn_scalar": 64},
        },
    ),
    "gemma3": Family(
        "Gemma 3 (text)",
        "gemma3_text",
        {
            **SLIDING,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
        {
            **NORMS,
            **MIXED,
            "scale of its own": {"query_pre_attn_scalar": 64},
            "RoPE by kind of layer": {
                "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ALTERNATE}
            },
        },
        "by kind of layer",
    ),
    "phi": Family("Phi 1.5, Phi 2", "phi", PARTIAL, {**PARTLY, **BIASES}, "8 of 16 channels"),
    "phi3": Family("Phi-3", "phi3", {**PLAIN, "sliding_window": None}),
    "phi3_long": Family(
        "Phi-3, long context",
        "phi3",
        {**LONG, **SLIDING, "original_max_position_embeddings": 512},
        {**WIDE, "longrope RoPE": PLAIN},
        "change with the length",
    ),
    "gpt_oss": Family(
        "GPT-OSS",
        "gpt_oss",
        {
            **YARN,
            **SLIDING,
            "head_dim": 32,
            "layer_types": ALTERNATE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        {**MIXED, **FEWER, **BIASES, "sinks with a learned logit": _without_sinks, "YaRN RoPE": PLAIN},
    ),
    "granite": Family(
        "Granite",
        "granite",
        {**PLAIN, "attention_multiplier": 0.15, "residual_multiplier": 0.7, "logits_scaling": 2.0},
        {"scale of its own": {"attention_multiplier": 0.05}},
    ),
    "olmo2": Family("OLMo 2", "olmo2", PLAIN, NORMS),
    "olmo3": Family(
        "OLMo 3",
        "olmo3",
        {
            **SLIDING,
            "layer_types": ALTERNATE,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ALTERNATE},
        },
        {**NORMS, **MIXED},
        "by kind of layer",
    ),
    "glm": Family("GLM", "glm", {**PARTIAL, "head_dim": 16}, PARTLY, "8 of 16 channels"),
    "glm4": Family("GLM-4", "glm4", {**PARTIAL, "head_dim": 16}, PARTLY, "8 of 16 channels"),
    "cohere": Family("Cohere Command R", "cohere", {**PLAIN, "use_qk_norm": True}, NORMS, "channel c with c"),
    "cohere2": Family(
        "Cohere 2",
        "cohere2",
        {**PLAIN, **SLIDING, "head_dim": 16, "layer_types": ALTERNATE},
        {**MIXED, "layers without RoPE": {**SLIDING, "layer_types": ["sliding_attention"] * 2}},
        "channel c with c",
    ),
    "smollm3": Family(
        "SmolLM3",
        "smollm3",
        {**PLAIN, "no_rope_layers": [1, 0]},
        {"layers without RoPE": {"no_rope_layers": [1, 1]}},
        "does not turn its",
    ),
    "starcoder2": Family("StarCoder2", "starcoder2", {**PLAIN, **SLIDING, "use_bias": True}, {**WIDE, **BIASES}),
    "stablelm": Family(
        "StableLM",
        "stablelm",
        {**PARTIAL, "qk_layernorm": True, "use_qkv_bias": False},
        {**PARTLY, **NORMS},
        "8 of 16 channels",
    ),
    "gpt_neox": Family("GPT-NeoX, Pythia", "gpt_neox", {**PARTIAL, **SAME}, PARTLY, "8 of 16 channels"),
    "opt": Family(
        "OPT",
        "opt",
        {**SAME, "word_embed_proj_dim": 64, "ffn_dim": 96},
        {"learned positions": _without_positions},
        "no rotary",
    ),
    "gpt2": Family("GPT-2", "gpt2", SAME, {"learned positions": _without_positions}, "no rotary"),
}

REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "falcon": ("Falcon", "falcon", {"num_key_value_heads": None}, "attention in code of its own"),
    "bloom": ("BLOOM", "bloom", {}, "ALiBi"),
    "mpt": ("MPT", "mpt", {}, "ALiBi"),
    "gptj": ("GPT-J", "gptj", {"rotary_dim": 8}, "attention in code of its own"),
    "deepseek_v2": ("DeepSeek V2", "deepseek_v2", {}, "latent"),
    "deepseek_v3": ("DeepSeek V3", "deepseek_v3", {}, "latent"),
    "llama4": ("Llama 4 (text)", "llama4_text", {}, "chunk"),
    "gemma3n": (
        "Gemma 3n (text)",
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ALTERNATE * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 128,
        },
        "earlier layers",
    ),
    "jamba": ("Jamba", "jamba", {"num_hidden_layers": 4}, "running state"),
    "falcon_h1": ("Falcon-H1", "falcon_h1", {}, "running state"),
    "mamba": ("Mamba", "mamba", {}, "running state"),
}


def digest_of(name: str) -> str:
    """Of what defines a family's model: another digest is another model."""
    family = FAMILIES[name]
    return hashlib.sha256(repr((SIZES, family.kind, family.options)).encode()).hexdigest()[:16]


def config_of(kind: str, **options: Any) -> Any:
    """A tiny configuration of a transformers model type."""
    chosen = copy.deepcopy({**SIZES, **options})  # transformers writes into nested ones
    return CONFIG_MAPPING[kind](**{key: value for key, value in chosen.items() if value is not None or key in options})


def family_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The family's model with other options; its weights do not depend on them as long as their shapes do not."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = config_of(family.kind, **{**family.options, **changes})
    # transformers 5.17 takes SDPA for Gemma 2 unless told otherwise, which leaves its soft-cap out.
    own = {"attn_implementation": "eager"} if family.kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **own).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "norm" in parameter or ".ln_" in parameter:
                if parameter.endswith("weight"):
                    weight += torch.rand(weight.shape, generator=generator) - 0.5
            elif parameter.endswith("sinks"):
                weight.copy_(torch.rand(weight.shape, generator=generator) * 2)
            else:  # biases among them, which start at 0
                weight.copy_(torch.randn(weight.shape, generator=generator) * config_range(config))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def config_range(config: Any) -> float:
    return float(getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.2))


def without(name: str, feature: str) -> PreTrainedModel:
    """The family's model with one of its features taken away, its weights as they were."""
    change = FAMILIES[name].features[feature]
    if not callable(change):
        return family_model(name, **change)
    model = family_model(name)
    with torch.no_grad():
        change(model)
    return model


def prompt(n: int, seed: int = 0) -> list[int]:
    """n token ids from 3 upwards, none twice while there are enough."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rounds = [torch.randperm(VOCABULARY - 3, generator=generator) + 3 for _ in range(n // (VOCABULARY - 3) + 1)]
    return torch.cat(rounds)[:n].tolist()
