"""Decoders in plain PyTorch, as they are written without transformers, with weights wide enough for peaked attention.

`Llama` computes what transformers' Llama computes with the same weights, so that its caches can be held against those.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvcompile

VOCABULARY = 256


class Gpt(nn.Module):
    """nanoGPT's way: fused projections, learned positions, tied head, logits of the last token with a loss of None.

    `positions` None counts from 0 inside. dropout: in attention while training, as nanoGPT does it.
    """

    def __init__(
        self, layers: int = 2, heads: int = 4, width: int = 64, block: int = 512, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(block, width)
        self.blocks = nn.ModuleList(GptBlock(heads, width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, idx: Tensor, pos: Tensor | None = None, targets: Tensor | None = None) -> tuple[Tensor, None]:
        if pos is None:
            pos = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, [-1]])), None


class GptBlock(nn.Module):
    def __init__(self, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.size()
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (t.view(batch, n, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, n, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def repeat_interleaved(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1)


def expanded(x: Tensor, times: int) -> Tensor:
    batch, heads, n, width = x.shape
    return x[:, :, None].expand(batch, heads, times, n, width).reshape(batch, heads * times, n, width)


def expanded_early(x: Tensor, times: int) -> Tensor:
    """Repeated while tokens still come before heads."""
    y = x.transpose(1, 2)
    batch, n, heads, width = y.shape
    return y.unsqueeze(3).expand(batch, n, heads, times, width).reshape(batch, n, heads * times, width).transpose(1, 2)


def tiled(x: Tensor, times: int) -> Tensor:
    """Heads one after the other and again: query head h reads KV head h modulo their number."""
    return x.repeat(1, times, 1, 1)


def causal_flag(n: int, positions: Tensor) -> dict[str, object]:
    return {"is_causal": True}


def lower_triangle(n: int, positions: Tensor) -> dict[str, object]:
    return {"attn_mask": torch.ones(n, n, dtype=torch.bool).tril()}


def added_infinities(n: int, positions: Tensor) -> dict[str, object]:
    bias = torch.zeros(n, n)
    bias.masked_fill_(torch.ones(n, n, dtype=torch.bool).tril().logical_not(), float("-inf"))
    return {"attn_mask": bias}


def by_positions(n: int, positions: Tensor) -> dict[str, object]:
    return {"attn_mask": (positions[:, None, :, None] >= positions[:, None, None, :])}


def wide_window(n: int, positions: Tensor) -> dict[str, object]:
    """The causal mask for prompts of up to 300 tokens only."""
    i = torch.arange(n)
    return {"attn_mask": (i[:, None] >= i) & (i[:, None] - i < 300)}


def no_mask(n: int, positions: Tensor) -> dict[str, object]:
    return {"is_causal": False}


class Llama(nn.Module):
    """RMS norm, rotary positions from an argument, grouped heads. repeat: how KV heads are repeated, None:
    enable_gqa; mask: what the attention is told, from n and positions."""

    def __init__(self, layers: int = 3, heads: int = 4, kv_heads: int = 2, repeat=None, mask=causal_flag) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.layers = nn.ModuleList(LlamaLayer(heads, kv_heads, repeat, mask) for _ in range(layers))
        self.norm = nn.RMSNorm(128, eps=1e-6)
        self.lm_head = nn.Linear(128, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)
        angles = torch.cat([angles, angles], -1)[:, None]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), positions)
        return self.lm_head(self.norm(x))


class LlamaLayer(nn.Module):
    def __init__(self, heads: int, kv_heads: int, repeat, mask) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.repeat, self.mask = heads, kv_heads, repeat, mask
        self.input_norm, self.post_norm = nn.RMSNorm(128, eps=1e-6), nn.RMSNorm(128, eps=1e-6)
        self.q, self.o = nn.Linear(128, heads * 64, bias=False), nn.Linear(heads * 64, 128, bias=False)
        self.k, self.v = nn.Linear(128, kv_heads * 64, bias=False), nn.Linear(128, kv_heads * 64, bias=False)
        self.gate, self.up = nn.Linear(128, 160, bias=False), nn.Linear(128, 160, bias=False)
        self.down = nn.Linear(160, 128, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        batch, n, _ = x.shape
        y = self.input_norm(x)
        q = turned(self.q(y).view(batch, n, self.heads, 64).transpose(1, 2), cos, sin)
        k = turned(self.k(y).view(batch, n, self.kv_heads, 64).transpose(1, 2), cos, sin)
        v = self.v(y).view(batch, n, self.kv_heads, 64).transpose(1, 2)
        if self.repeat is not None:
            k, v = (self.repeat(t, self.heads // self.kv_heads) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.repeat is None, **self.mask(n, positions))
        x = x + self.o(y.transpose(1, 2).reshape(batch, n, -1))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def gpt(seed: int = 0, **options) -> Gpt:
    torch.manual_seed(seed)
    model = Gpt(**options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.25)
    return model


def llama(**options) -> Llama:
    """With the weights of `tests.models.random_model("llama64")`, where the sizes are its own."""
    from tests.models import random_model

    model = Llama(**options).eval()
    sizes = {"num_hidden_layers": len(model.layers), "num_attention_heads": model.layers[0].heads}
    theirs = random_model("llama64", num_key_value_heads=model.layers[0].kv_heads, **sizes).state_dict()
    names = {
        "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm",
        **{name: f"self_attn.{name}_proj" for name in "qkvo"},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }  # fmt: skip
    mine = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "lm_head.weight": "lm_head.weight"}  # fmt: skip
    for index in range(len(model.layers)):
        mine |= {f"layers.{index}.{own}.weight": f"model.layers.{index}.{name}.weight" for own, name in names.items()}
    model.load_state_dict({own: theirs[name] for own, name in mine.items()})
    return model


class Small(nn.Module):
    """One attention without positions: the shortest decoder, of which each test changes one thing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 64)
        self.conv = nn.Conv1d(32, 32, 3)
        self.register_buffer("table", torch.randn(128, 32))
        self.register_buffer("triangle", torch.ones(1, 1, 128, 128).tril())

    def enter(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.enter(ids)
        batch, n, width = x.shape
        q, k, v = (t.view(batch, n, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.head(x + self.attend(q, k, v).transpose(1, 2).reshape(batch, n, width))


def small(enter=None, attend=None) -> Small:
    """A `Small` whose embedding or attention is another function of it and its arguments."""
    members = {"enter": enter or Small.enter, "attend": attend or Small.attend}
    return type("Small", (Small,), members)().eval()


def places(ids: Tensor) -> Tensor:
    """Positions of token ids, int64 [batch, n]."""
    return torch.arange(ids.shape[1]).expand(ids.shape)


def logits_of(out: Tensor | tuple[Tensor, None]) -> Tensor:
    """The logits of what a forward returned."""
    return out[0] if isinstance(out, tuple) else out


def fed(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last token of a prompt and of each that follows as a step, [1, n, vocabulary]."""
    session = kvcompile.session(model)
    out = [logits_of(session(ids[:, :prompt]))[:, -1:]]
    out += [logits_of(session(ids[:, i : i + 1])) for i in range(prompt, ids.shape[1])]
    return torch.cat(out, 1)
