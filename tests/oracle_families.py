"""The oracle for models whose attention has windows, soft-caps, sinks or scales of its own: transformers' eager code.

Takes a model as `Oracle` does, and the windows of its layers. A layer's attention is the model's own
`eager_attention_forward` over every key that ever was, under a mask of what is resident and inside the window; what no
later query can read is no longer resident. Windows are measured on the model's own masks. Uses nothing of kvcompile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tests.families import family_model, prompt
from tests.oracle import Forward, Kept, Oracle, Piece, Row, marks

ATTENTION = "test_family_oracle"
MASKED = torch.finfo(torch.float32).min


def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **asked: Any) -> tuple[Tensor, Tensor]:
    """The model's own attention: output [1, n, Hq, D], probabilities [1, Hq, n, T]."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    asked = {**asked, "dropout": 0.0}
    return own(module, query, key, value, mask, **asked)


@functools.cache
def windows_of(name: str, **changes: Any) -> tuple[int, ...]:
    """The sliding window of each layer of a family, 0: none, as its own masks show it for 64 tokens."""
    model, found = family_model(name, **changes), {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any) -> Any:
        found[module.layer_idx] = 0 if mask is None else int((mask[0, 0, -1] == 0).sum())
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        model(torch.tensor([prompt(64)]), use_cache=False)
    return tuple(found[i] % 64 for i in range(model.config.num_hidden_layers))


class FamilyOracle(Oracle):
    """Runs `model` under `rule`. The model is left with the oracle's attention."""

    def __init__(self, model: PreTrainedModel, rule: Any, windows: Sequence[int], reader: Any = None) -> None:
        super().__init__(model, rule, reader)
        self.windows = windows
        self.left: list[list[bool]] = []  # whether a row's oldest entry has left the window with the newest query
        self.asked: dict[int, tuple[Any, dict[str, Any]]] = {}  # of each layer: its module, what it asks for
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        model.set_attn_implementation(ATTENTION)

    def _forward(self, tokens: list[int], peek: list[int], piece: Piece) -> Forward:
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        assert not peek, "no rule of these tests peeks"
        self.piece = piece
        places = torch.arange(piece.start, piece.start + len(tokens))[None]
        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([tokens]), position_ids=places, use_cache=False)
        self.length += piece.tokens
        self.left = [[False] * self.heads for _ in self.windows]
        for layer, window in enumerate(self.windows):
            for head, row in enumerate(self.rows[layer]):
                if window:
                    oldest = piece.now + 1 - window
                    self.left[layer][head] = oldest >= 0 and bool(row.resident[oldest])
                    row.resident[: max(0, oldest + 1)] = False
        self.rule.decide_all(self, piece)
        return Forward(piece, out.logits[0].float(), (), self.kept())

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        layer, n = int(module.layer_idx), query.shape[2]
        start = self.piece.start
        self.asked[layer] = module, asked
        before = [row.resident.clone() for row in self.rows[layer]]
        for head, row in enumerate(self.rows[layer]):
            self._insert(
                row, query[0, head * self.group : (head + 1) * self.group], key[0, head], value[0, head], range(n)
            )
        resident = [torch.cat([old, torch.ones(n, dtype=torch.bool)]) for old in before]
        sets = self.reader.sets(self, layer) if self.reader else None
        output, probs = self._read(layer, query, torch.arange(start, start + n), resident, sets)
        for head, row in enumerate(self.rows[layer]):
            row.reads = probs[0, head * self.group : (head + 1) * self.group]
            for j in range(n):
                self.rule.on_read(row, row.reads[:, j])
        return output, None

    def reach(self, layer: int) -> int:
        return self.windows[layer]

    def attention(self, layer: int, head: int, place: int) -> Tensor:
        query = torch.cat([row.queries[:, place : place + 1] for row in self.rows[layer]])[None]
        resident = [row.resident for row in self.rows[layer]]
        _, probs = self._read(layer, query, torch.tensor([place]), resident)
        return probs[0, head * self.group : (head + 1) * self.group, 0]

    def logarithms(self, layer: int, head: int, place: int) -> Tensor:
        """As those of `Oracle`, but for a number that all entries share."""
        return self.attention(layer, head, place).log()

    def _read(
        self, layer: int, query: Tensor, places: Tensor, resident: list[Tensor], sets: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries [1, Hq, n, D] at places [n] to what is resident of each KV head; sets: positions that
        each reads of it, [KV head][query][query head of the group]."""
        rows, window = self.rows[layer], self.windows[layer]
        module, asked = self.asked[layer]
        at = torch.arange(len(rows[0].keys))
        seen = at <= places[:, None]
        if window:
            seen &= at > places[:, None] - window
        readable = torch.stack([seen & here for here in resident]).repeat_interleave(self.group, 0)
        if sets is not None:
            chosen = [torch.stack([marks(each, range(len(at))) for each in head], 1) for head in sets]
            readable = readable & torch.cat(chosen)
        mask = torch.where(readable, 0.0, MASKED)[None]
        keys, values = (torch.stack([getattr(row, name) for row in rows])[None] for name in ("keys", "values"))
        output, probs = eager(module, query, keys, values, mask, **asked)
        return output, torch.where(readable, probs, 0.0)  # of a query that reads nothing the softmax would be even

    def last_reads(self, row: Row, width: int) -> Tensor:
        """As `Oracle.last_reads`, by the model's own attention; over what the newest query read, so also over the entry
        that has left the window with it."""
        places = [(i, j) for i, rows in enumerate(self.rows) for j, other in enumerate(rows) if other is row]
        [(layer, head)] = places
        total = len(row.resident)
        newest = torch.arange(max(0, total - width), total)
        query = torch.cat([r.queries[:, newest] for r in self.rows[layer]])[None]
        resident = [r.resident.clone() for r in self.rows[layer]]
        for other, left in zip(resident, self.left[layer], strict=True):
            if left:
                other[total - self.windows[layer]] = True
        _, probs = self._read(layer, query, newest, resident)
        return probs[0, head * self.group : (head + 1) * self.group]

    def readable(self, kept: Kept, length: int) -> Kept:
        """Positions kept after `length` tokens that the next query can read: a cache may hold others for a while."""
        first = [window and length + 1 - window for window in self.windows]
        return tuple(
            tuple(tuple(p for p in head if p >= start) for head in heads)
            for start, heads in zip(first, kept, strict=True)
        )
