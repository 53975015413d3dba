"""Eviction in pieces as a dense mask: no cache, every forward runs all tokens so far, and a mask hides what is gone.

Takes an untouched Hugging Face model, a rule, a prompt in pieces and forced tokens; gives logits, alive entries and
the mask of what each query read, [layer][KV head]. The footprint is the number of marks in that mask.
Uses nothing of kvcompile, and nothing of `oracle`, which keeps rows of entries instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "test_dense_mask"


@dataclass(frozen=True, slots=True)
class Look:
    """What a rule sees of one KV head after a forward of the tokens start..stop-1.

    alive, frozen bool [stop]: before the decision; probs [group, stop + peeked, stop + peeked]: of all queries so far.
    """

    layer: int
    head: int
    start: int
    stop: int
    last: bool  # of its prompt, or a step
    step: bool
    alive: Tensor
    frozen: Tensor
    probs: Tensor

    @property
    def new(self) -> Tensor:
        """bool [stop]: the tokens of this forward."""
        return torch.arange(self.stop) >= self.start

    def recent(self, n: int) -> Tensor:
        """bool [stop]: the newest n positions."""
        return torch.arange(self.stop) >= self.stop - n


Rule = Callable[[Look], tuple[Tensor, Tensor]]  # alive and frozen afterwards, bool [stop] each


class Simulation:
    """Runs `model` under `rule`. model: untouched; it is left as it was."""

    def __init__(self, model: PreTrainedModel, rule: Rule, piece: int, peek: int = 0) -> None:
        config = model.config
        self.model, self.rule, self.piece, self.peek = model, rule, piece, peek
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.tokens: list[int] = []
        self.alive = torch.zeros(self.layers, self.heads, 0, dtype=torch.bool)
        self.frozen = self.alive.clone()
        self.read = torch.zeros(self.layers, self.heads, 0, 0, dtype=torch.bool)  # [query, key]
        self.pairs = torch.zeros(self.layers, self.heads, dtype=torch.int64)
        self.widest = torch.zeros_like(self.pairs)

    def feed(self, tokens: list[int], step: bool = False) -> Tensor:
        """Logits [n, vocabulary] of a prompt, which is cut into pieces, or of one step."""
        logits = []
        for first in range(0, len(tokens), self.piece):
            part = tokens[first : first + self.piece]
            last = first + len(part) == len(tokens)
            logits.append(self._forward(part, [] if last or not self.peek else tokens[-self.peek :], last, step))
        return torch.cat(logits)

    def footprint(self) -> Tensor:
        """float64 [layers, KV heads]: pairs that were read, peeked ones too, over those of the full triangle."""
        total = len(self.tokens)
        return self.pairs.double() / (total * (total + 1) / 2)

    def peak(self) -> Tensor:
        return self.widest.double() / len(self.tokens)

    def dense(self) -> Tensor:
        """Logits [T, vocabulary] of one forward of all tokens under the final mask."""
        return self._run(self.tokens, self.read)[0]

    def _forward(self, part: list[int], peek: list[int], last: bool, step: bool) -> Tensor:
        start, n, wide = len(self.tokens), len(part), len(part) + len(peek)
        stop = start + n
        mask = torch.zeros(self.layers, self.heads, start + wide, start + wide, dtype=torch.bool)
        mask[..., :start, :start] = self.read
        mask[..., start:, :start] = self.alive[:, :, None]
        mask[..., start:, start:] = torch.ones(wide, wide, dtype=torch.bool).tril()
        self.pairs += mask[..., start:, :].sum((2, 3))
        self.widest = torch.maximum(self.widest, self.alive.sum(2) + wide)
        logits, probs = self._run(self.tokens + part + peek, mask)
        self.tokens += part
        self.read = mask[..., :stop, :stop]
        self.alive = F.pad(self.alive, (0, n), value=True)
        self.frozen = F.pad(self.frozen, (0, n))
        for layer in range(self.layers):
            for head in range(self.heads):
                here = self.alive[layer, head], self.frozen[layer, head], probs[layer][head]
                look = Look(layer, head, start, stop, last, step, *here)
                self.alive[layer, head], self.frozen[layer, head] = self.rule(look)
        return logits[start:stop]

    def _run(self, tokens: list[int], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [T, vocabulary], and of each layer the probabilities [KV heads, group, T, T], under a mask
        [layers, KV heads, T, T]."""
        probs: list[Tensor] = []

        def attention(module, query, key, value, attention_mask, scaling, **kwargs):
            grouped = query[0].unflatten(0, (self.heads, -1))
            logits = torch.einsum("hgqd,hkd->hgqk", grouped, key[0]) * scaling
            found = logits.masked_fill(~mask[module.layer_idx][:, None], float("-inf")).softmax(-1)
            probs.append(found)
            out = torch.einsum("hgqk,hkd->hgqd", found, value[0])
            return out.flatten(0, 1).transpose(0, 1)[None], None

        before = self.model.config._attn_implementation
        AttentionInterface.register(ATTENTION, attention)
        self.model.set_attn_implementation(ATTENTION)
        try:
            with torch.no_grad():
                return self.model(torch.tensor([tokens]), use_cache=False).logits[0], probs
        finally:
            self.model.set_attn_implementation(before)


# -- rules ------------------------------------------------------------------------------------------------------------


def best(scores: Tensor, candidates: Tensor, n: int) -> Tensor:
    """bool: the n highest of the candidates, the older ones on ties."""
    places = candidates.nonzero().flatten()
    order = scores[places].sort(descending=True, stable=True).indices[: max(0, n)]
    return torch.zeros_like(candidates).index_fill(0, places[order], True)


def pooled(scores: Tensor, candidates: Tensor, width: int, kind: str) -> Tensor:
    """Scores of the candidates pooled among themselves; the others as they are."""
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    out = scores.clone()
    out[candidates] = pool(scores[candidates][None], width, 1, width // 2)[0]
    return out


def streaming(sink: int, window: int) -> Rule:
    def rule(look: Look) -> tuple[Tensor, Tensor]:
        kept = (torch.arange(look.stop) < sink) | look.recent(window)
        return look.alive & kept, look.frozen

    return rule


def prulong(full: set[tuple[int, int]], sink: int, window: int) -> Rule:
    local = streaming(sink, window)
    return lambda look: (look.alive, look.frozen) if (look.layer, look.head) in full else local(look)


def h2o(heavy: int, local: int) -> Rule:
    """Attention that an entry got from all queries so far, mean over the group."""

    def rule(look: Look) -> tuple[Tensor, Tensor]:
        recent = look.recent(local)
        acc = look.probs[:, : look.stop, : look.stop].sum(1).mean(0)
        return look.alive & (recent | best(acc, look.alive & ~recent, heavy)), look.frozen

    return rule


def snapkv_patched(percent: int, observe: int, pool: int) -> Rule:
    """Each piece is judged by the prompt's last tokens, which run along with it; the last one by its own."""

    def rule(look: Look) -> tuple[Tensor, Tensor]:
        if look.step:
            return look.alive, look.frozen
        rows = slice(look.stop - observe, look.stop) if look.last else slice(look.stop, look.stop + observe)
        scores = look.probs[:, rows, : look.stop].sum(1).mean(0)
        seen = look.new & look.recent(observe) if look.last else torch.zeros_like(look.new)
        open_ = look.new & ~seen
        n = percent * (look.stop - look.start) // 100 - int(seen.sum())
        won = seen | best(pooled(scores, open_, pool, "max"), open_, n)
        return look.frozen | won, look.frozen | won

    return rule


def snapkv_naive(percent: int, observe: int, pool: int) -> Rule:
    """Each piece is judged by its own last tokens, which stay; average pooling, as published."""

    def rule(look: Look) -> tuple[Tensor, Tensor]:
        if look.step:
            return look.alive, look.frozen
        scores = look.probs[:, look.stop - observe : look.stop, : look.stop].sum(1).mean(0)
        seen = look.recent(observe)
        open_ = look.new & ~seen
        n = percent * (look.stop - look.start) // 100 - observe
        won = seen | best(pooled(scores, open_, pool, "avg"), open_, n)
        return look.frozen | won, look.frozen | won

    return rule
