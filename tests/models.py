"""Small random models for the tests: grouped heads, head_dim 64 and 128, weights wide enough for peaked attention."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 256
_SIZES = {
    "llama64": (LlamaConfig, LlamaForCausalLM, {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64}),
    "llama128": (LlamaConfig, LlamaForCausalLM, {"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 128}),
    "qwen64": (Qwen3Config, Qwen3ForCausalLM, {"num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 64}),
    "qwen128": (Qwen3Config, Qwen3ForCausalLM, {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 128}),
}
FAMILIES = tuple(_SIZES)


def random_model(family: str = "llama64", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model in eval mode with two KV heads, the same for the same arguments; never stops at a token."""
    config_class, model_class, sizes = _SIZES[family]
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # The usual 0.02 makes attention almost uniform: scores would be near ties and selections mean nothing.
        "initializer_range": 0.12,
        "attn_implementation": "sdpa",
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **sizes,
        **changes,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # ones would give all keys of Qwen3 one length
                weight.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tokens(n: int, *, seed: int = 0) -> list[int]:
    """n token ids from 3 upwards (0 pads), fixed by the seed; none twice while there are enough, because equal tokens
    have first-layer keys of equal length, and which of them wins would be chance."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rounds = [torch.randperm(VOCABULARY - 3, generator=generator) + 3 for _ in range(n // (VOCABULARY - 3) + 1)]
    return torch.cat(rounds)[:n].tolist()
