"""A model in plain PyTorch, without transformers: its attentions are found in its graph, a session feeds it."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import kvcompile
from kvcompile.evaluation.tales import prompts

FOLDER = Path(__file__).parent / "recall_model"
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 128, 8, 4, 32


class Decoder(nn.Module):
    """Token ids and positions, both [batch, n], to logits. The names are those of the shipped weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(113, WIDTH)
        self.model["layers"] = nn.ModuleList(Layer() for _ in range(3))
        self.model["norm"] = nn.RMSNorm(WIDTH, eps=1e-6)
        self.lm_head = nn.Linear(WIDTH, 113, bias=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, positions)
        return self.lm_head(self.model["norm"](x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"q_proj": (WIDTH, 256), "k_proj": (WIDTH, 128), "v_proj": (WIDTH, 128), "o_proj": (256, WIDTH)}
        self.self_attn = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        sizes = {"gate_proj": (WIDTH, 192), "up_proj": (WIDTH, 192), "down_proj": (192, WIDTH)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.input_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        batch, n, _ = x.shape
        y = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{name}_proj"](y).view(batch, n, -1, HEAD_DIM).transpose(1, 2) for name in "qkv")
        q, k = turned(q, positions), turned(k, positions)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.self_attn["o_proj"](y.transpose(1, 2).reshape(batch, n, -1))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions."""
    speed = 10_000_000.0 ** (torch.arange(0, HEAD_DIM, 2) / -HEAD_DIM)
    angle = (positions[:, None, :, None] * speed).repeat(1, 1, 1, 2)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


def main() -> None:
    model, tokenizer = Decoder().eval(), AutoTokenizer.from_pretrained(FOLDER)
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    asked = prompts(1)[0]
    ids = tokenizer(asked.text, return_tensors="pt")["input_ids"]

    # The forward has an argument for positions, so that a session can go on where the prompt ended.
    kvcompile.optimize(model, "snapkv", budget=96, observe=16, positions="positions")
    session = kvcompile.session(model)
    logits = session(ids)
    answer = []
    for _ in range(8):
        answer.append(int(logits[0, -1].argmax()))
        logits = session(torch.tensor([[answer[-1]]]))
    print(f"... {asked.text[-60:]} -> {tokenizer.decode(answer)}   (right: {asked.answer})")
    print("kept per KV head", [len(positions) for positions in session.cache.positions(0)], "of", session.length)
    print(kvcompile.report(model))


if __name__ == "__main__":
    main()
