"""Layers whose attention is off, beside a model that never had it: the cases of the benchmark of reads.

Takes sizes; gives sections of a decode step and of a prompt. The floor is a model of the other layers alone, optimised
in the same way, between whose layers the feed-forward halves of the missing ones run as plain modules: same weights,
same result, and nothing of an attention that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from _turns import Claim, Contestant, Section
from torch import Tensor, nn

import kvcompile

LAYERS, OFF = 4, (1, 3)
OFF_POLICY = "policy half():\n    layers 1, 3: off\n    rest: keep all\n"
ALL, HALF, FLOOR = "kvcompile, all layers", "kvcompile, every second layer off", "the other layers alone"
LIMIT = 1.03  # what costs nothing may still differ by this much, the spread of this machine


def model(layers: int, positions: int) -> Any:
    """A random Llama of hidden size 1024, 16/4 heads of 64, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=positions,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def floor(whole: Any, positions: int) -> Any:
    """The layers that are on, and behind each the feed-forward half of the one that is off."""
    short = model(LAYERS - len(OFF), positions)
    short.model.embed_tokens, short.model.norm, short.lm_head = (
        whole.model.embed_tokens,
        whole.model.norm,
        whole.lm_head,
    )
    on = [i for i in range(LAYERS) if i not in OFF]
    for place, index in enumerate(on):
        short.model.layers[place].load_state_dict(whole.model.layers[index].state_dict())
        short.model.layers[place].register_forward_hook(_then(whole.model.layers[index + 1]))
    return short


def _then(layer: nn.Module) -> Callable[..., Tensor]:
    def half(_module: nn.Module, _args: Any, hidden: Tensor) -> Tensor:
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return half


class Model:
    """An optimised model: a prompt from nothing, or one more token on a prompt's cache."""

    def __init__(self, built: Any, policy: str, tokens: Tensor) -> None:
        self.model, self.tokens, self.cache = kvcompile.optimize(built, policy), tokens, None

    def prompt(self) -> Tensor:
        out = self.model(self.tokens, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits: Tensor = out.logits
        return logits

    def step(self) -> Tensor:
        logits: Tensor = self.model(torch.tensor([[7]]), past_key_values=self.cache, use_cache=True).logits
        return logits


def whole_models(n: int) -> Iterator[Section]:
    """A prompt of n tokens and a step with half of the attentions off: what is left costs what it costs by itself."""
    tokens = torch.randint(3, 512, (1, n), generator=torch.Generator().manual_seed(1))
    made = {ALL: Model(model(LAYERS, 2 * n), "keep_all", tokens), HALF: Model(model(LAYERS, 2 * n), OFF_POLICY, tokens),
            FLOOR: Model(floor(model(LAYERS, 2 * n), 2 * n), "keep_all", tokens)}  # fmt: skip
    claims = (Claim(HALF, FLOOR, LIMIT),)
    for kind, slow in (("prompt", True), ("step", False)):  # the prompt leaves what steps go on with
        parts = [Contestant(ALL, getattr(made[ALL], kind)), Contestant(FLOOR, getattr(made[FLOOR], kind))]
        parts.append(Contestant(HALF, getattr(made[HALF], kind), like=FLOOR))
        title = f"Layers without attention, float32: {'a prompt of' if slow else 'a step behind'} {n} tokens"
        yield Section("off", title, {"dtype": "float32", "tokens": n, "of": kind}, ALL, parts, claims, {}, slow=slow)
