"""The truth that the product is measured against: a plain simulation of what a policy means.

Takes a Hugging Face model, one prompt without padding and a forced continuation, a rule of `oracle_policies` and, where
queries do not read all that is there, one of `oracle_reads`. Keeps every key and value for ever and a resident flag per
(layer, KV head, position); masks what is not resident, and what a query does not read.
Gives the logits and the kept positions after each forward, and the KV footprint counted from the flags.
Uses nothing of kvcompile, so a mistake in the product cannot hide here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "test_oracle"
Kind = Literal["prefill", "step"]
Kept = tuple[tuple[tuple[int, ...], ...], ...]  # [layer][KV head] -> sorted original positions


@dataclass(slots=True)
class Folded:
    """An entry without position: key, value [D], and the tokens that it stands for."""

    key: Tensor
    value: Tensor
    count: float


@dataclass(slots=True)
class Row:
    """One (layer, KV head): all that it ever saw, and what of it is still resident.

    keys, values [T, D]; queries [G, T, D]; resident, frozen bool [T]; acc float32 [T]; reads: probabilities
    [G, n, T + peeked] of the newest forward's queries, 0 where nothing was read; judged: units decided so far;
    states: what the rule's `starts` names, float32 [T] each; count: tokens that each entry stands for, float32 [T];
    folded: what `fold mean` made of dropped entries. Where positions are compact, keys and queries are before RoPE.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    resident: Tensor
    frozen: Tensor
    acc: Tensor
    reads: Tensor
    judged: int = 0
    states: dict[str, Tensor] = field(default_factory=dict)
    count: Tensor = field(default_factory=lambda: torch.zeros(0))
    folded: Folded | None = None

    def positions(self) -> list[int]:
        return self.resident.nonzero().flatten().tolist()

    def __len__(self) -> int:
        """Entries of the row, the one without position among them."""
        return len(self.positions()) + (self.folded is not None)


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward, as the rules see it: `tokens` real ones from position `start`, then `peeked` ones."""

    kind: Kind
    start: int
    tokens: int
    peeked: int
    last: bool  # of its prefill
    prompt: int  # logical length at the newest prefill.end, or what it will be

    @property
    def now(self) -> int:
        return self.start + self.tokens - 1

    @property
    def step(self) -> int:
        """Steps since prefill.end, this one included; 0 during a prefill."""
        return self.now + 1 - self.prompt if self.kind == "step" else 0

    def fires(self, *triggers: str) -> bool:
        """Whether one of chunk, prefill.end, step fires after this forward."""
        on = {"step"} if self.kind == "step" else {"chunk", "prefill.end"} if self.last else {"chunk"}
        return bool(on.intersection(triggers))


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward gave. logits [tokens, vocabulary]; before: entries per [layer][KV head] at its start."""

    piece: Piece
    logits: Tensor
    before: tuple[tuple[int, ...], ...]
    kept: Kept


class Oracle:
    """Runs `model` under `rule`. The model must be one that nothing else has rewritten; it is left as it was."""

    def __init__(self, model: PreTrainedModel, rule, reader=None) -> None:
        config = model.config
        self.model, self.rule, self.reader = model, rule, reader
        self.layers = config.num_hidden_layers
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.group = config.num_attention_heads // self.heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rows = [
            [
                Row(
                    keys=torch.zeros(0, dim),
                    values=torch.zeros(0, dim),
                    queries=torch.zeros(self.group, 0, dim),
                    resident=torch.zeros(0, dtype=torch.bool),
                    frozen=torch.zeros(0, dtype=torch.bool),
                    acc=torch.zeros(0),
                    reads=torch.zeros(self.group, 0, 0),
                )
                for _ in range(self.heads)
            ]
            for _ in range(self.layers)
        ]
        self.length = 0
        self.prompt = 0
        self.scaling = 1.0
        self.forwards: list[Forward] = []
        self.closest = math.inf  # smallest relative distance between a kept and a dropped score, exact ties apart

    @property
    def off(self) -> frozenset[int]:
        """Layers without attention, which hold nothing."""
        return self.reader.off if self.reader else frozenset()

    def reach(self, layer: int) -> int:
        """How many of the newest tokens, its own included, a query of the layer can read; 0: all."""
        return 0

    # -- feeding tokens -------------------------------------------------------------------------------------------

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """One call of the model by its user; returns the logits of all `tokens`, [n, vocabulary]."""
        tokens = list(tokens)
        if len(tokens) == 1 and self.prompt > 0:
            return self._forward(tokens, [], Piece("step", self.length, 1, 0, False, self.prompt)).logits
        self.prompt = self.length + len(tokens)
        size = self.rule.chunk or len(tokens)
        logits = []
        for at in range(0, len(tokens), size):
            part = tokens[at : at + size]
            last = at + size >= len(tokens)
            peek = [] if last or not self.rule.peek else tokens[-self.rule.peek :]
            piece = Piece("prefill", self.length, len(part), len(peek), last, self.prompt)
            logits.append(self._forward(part, peek, piece).logits)
        return torch.cat(logits)

    def run(self, prompt: Sequence[int], forced: Sequence[int] = ()) -> list[Tensor]:
        """Logits of the prompt [n, V], then of each forced token [1, V]."""
        return [self.feed(prompt), *(self.feed([token]) for token in forced)]

    def _forward(self, tokens: list[int], peek: list[int], piece: Piece) -> Forward:
        before = tuple(tuple(len(row) for row in layer) for layer in self.rows)
        self.piece = piece
        ids = torch.tensor([tokens + peek])
        places = torch.arange(piece.start, piece.start + ids.shape[1])[None]
        places = torch.zeros_like(places) if self.rule.compact else places
        with torch.no_grad(), _reading(self):
            out = self.model(input_ids=ids, position_ids=places, use_cache=False)
        self.length += piece.tokens
        self.rule.decide_all(self, piece)
        done = Forward(piece, out.logits[0, : piece.tokens].float(), before, self.kept())
        self.forwards.append(done)
        return done

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one layer: query [Hq, n, D], key and value [Hkv, n, D] of this forward -> [n, Hq, D]."""
        self.scaling = scaling
        piece, n = self.piece, query.shape[1]
        there = [row.positions() for row in self.rows[layer]]
        fresh = [(query[h * self.group : (h + 1) * self.group], key[h], value[h]) for h in range(self.heads)]
        for row, new in zip(self.rows[layer], fresh, strict=True):
            self._insert(row, *new, range(piece.tokens))
        sets = self._sets(layer, fresh) if self.reader else None
        outputs = []
        for head in range(self.heads):
            row, past = self.rows[layer][head], there[head]
            columns = past + list(range(piece.start, piece.start + n))
            keys = self.turned(torch.cat([row.keys[past], key[head]]), 0)
            values = torch.cat([row.values[past], value[head]])
            asking = self.turned(query[head * self.group : (head + 1) * self.group], len(past))
            row.reads = torch.zeros(self.group, n, piece.start + n)
            output = torch.zeros(self.group, n, value.shape[2])
            for j in range(n):
                readable = len(past) + j + 1
                logit = (asking[:, j] @ keys[:readable].T).float() * scaling
                asked = logit
                if sets is not None:
                    logit = logit.masked_fill(~marks(sets[head][j], columns[:readable]), -math.inf)
                probabilities, rest = self.shares(row, logit, asking[:, j])
                # Peeked queries are asked as queries are that are asked again: what they might read.
                seen = probabilities if j < piece.tokens else self.shares(row, asked, asking[:, j])[0]
                row.reads[:, j, columns[:readable]] = seen
                output[:, j] = probabilities.to(values.dtype) @ values[:readable]
                if row.folded is not None:
                    output[:, j] += rest[:, None] * row.folded.value
            outputs.append(output)
            for j in range(piece.tokens):
                self.rule.on_read(row, row.reads[:, j, : piece.start + piece.tokens])
                self.rule.on_query(self, layer, head, piece.start + j)
        return torch.cat(outputs).transpose(0, 1)

    def _sets(self, layer: int, fresh: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[list[list[set[int]]]]:
        """What this forward's queries read, [KV head][query][query head]; peeked ones see each other's entries."""
        sets = self.reader.sets(self, layer)
        if self.piece.peeked:
            whole = self.rows[layer]
            self.rows[layer] = [replace(row, states=dict(row.states)) for row in whole]
            for row, new in zip(self.rows[layer], fresh, strict=True):
                self._insert(row, *new, range(self.piece.tokens, self.piece.tokens + self.piece.peeked))
            sets = [mine + more for mine, more in zip(sets, self.reader.peeked(self, layer), strict=True)]
            self.rows[layer] = whole
        return sets

    def _insert(self, row: Row, query: Tensor, key: Tensor, value: Tensor, which: range) -> None:
        """The entries of some tokens of this forward."""
        n, part = len(which), slice(which.start, which.stop)
        row.keys = torch.cat([row.keys, key[part].float()])
        row.values = torch.cat([row.values, value[part].float()])
        row.queries = torch.cat([row.queries, query[:, part].float()], dim=1)
        row.resident = torch.cat([row.resident, torch.ones(n, dtype=torch.bool)])
        row.frozen = torch.cat([row.frozen, torch.zeros(n, dtype=torch.bool)])
        row.acc = torch.cat([row.acc, torch.zeros(n)])
        row.count = torch.cat([row.count, torch.ones(n)])
        places = torch.arange(len(row.acc) - n, len(row.acc), dtype=torch.float32)
        for name, start in self.rule.starts().items():
            first = places if start is None else torch.full((n,), float(start))
            row.states[name] = torch.cat([row.states.get(name, torch.zeros(0)), first])

    def logits(self, row: Row, place: int) -> tuple[list[int], Tensor]:
        """What the row's query at position `place` may read of what is resident now: positions, logits [G, of them]."""
        columns = [p for p in row.positions() if p <= place]
        return columns, (self.query(row, place) @ self.turned(row.keys[columns], 0).T) * self.scaling

    def logarithms(self, layer: int, head: int, place: int) -> Tensor:
        """Logits [G, T] of a query over all that it may read of what is resident, -inf elsewhere."""
        row = self.rows[layer][head]
        columns, logit = self.logits(row, place)
        out = torch.full((self.group, len(row.resident)), -math.inf)
        out[:, columns] = logit
        return out

    def attention(self, layer: int, head: int, place: int) -> Tensor:
        """The same as probabilities, 0 elsewhere."""
        row = self.rows[layer][head]
        columns, logit = self.logits(row, place)
        out = torch.zeros(self.group, len(row.resident))
        out[:, columns] = self.shares(row, logit, self.query(row, place))[0]
        return out

    def query(self, row: Row, place: int) -> Tensor:
        """The row's query at position `place`, [G, D], as it reads what is resident now."""
        return self.turned(row.queries[:, place : place + 1], sum(p < place for p in row.positions()))[:, 0]

    def turned(self, x: Tensor, first: int) -> Tensor:
        """Where positions are compact: x [.., n, D] rotated by the places first, first + 1, ...; elsewhere x itself."""
        if not self.rule.compact:
            return x
        angles = torch.outer(torch.arange(first, first + x.shape[-2]).float(), self.model.model.rotary_emb.inv_freq)
        real, imaginary = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)

    def shares(self, row: Row, logit: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [G, n] of entries with logits [G, n], and of the entry without position [G] (0: none)."""
        if row.folded is None:
            return torch.softmax(logit, 1), torch.zeros(len(logit))
        weighted = (query @ row.folded.key) * self.scaling + math.log(row.folded.count)
        both = torch.softmax(torch.cat([logit, weighted[:, None]], 1), 1)
        return both[:, :-1], both[:, -1]

    def last_reads(self, row: Row, width: int) -> Tensor:
        """Probabilities [G, w, T] of the row's newest queries over what is resident now and not newer than they."""
        total = len(row.resident)
        first = max(0, total - width)
        reads = torch.zeros(self.group, total - first, total)
        for place in range(first, total):
            columns, logit = self.logits(row, place)
            reads[:, place - first, columns] = self.shares(row, logit, self.query(row, place))[0]
        return reads

    # -- what came of it ------------------------------------------------------------------------------------------

    def kept(self) -> Kept:
        """Positions in each row; an entry without position does not show."""
        return tuple(tuple(tuple(row.positions()) for row in layer) for layer in self.rows)

    def lengths(self) -> list[list[int]]:
        """Entries of each row, [layer][KV head], those without position among them."""
        return [[len(row) for row in layer] for layer in self.rows]

    def footprint(self) -> float:
        """Sum over forwards of n(n+1)/2 + nP, over T(T+1)/2, mean over KV heads; peeked tokens count in n only."""
        total = sum(f.piece.tokens for f in self.forwards)
        pairs = 0
        for f in self.forwards:
            n = f.piece.tokens + f.piece.peeked
            here = [layer for i, layer in enumerate(f.before) if i not in self.off]
            pairs += sum(n * (n + 1) // 2 + n * p for layer in here for p in layer)
        return pairs / (self.layers * self.heads) / (total * (total + 1) / 2)

    def peak(self) -> float:
        """Largest, over forwards, of the KV-head mean of P + n, over T."""
        total = sum(f.piece.tokens for f in self.forwards)
        rows = self.layers * self.heads
        sizes = [
            sum(p + f.piece.tokens + f.piece.peeked for layer in f.before for p in layer) / rows for f in self.forwards
        ]
        return max(sizes) / total

    # -- choosing, shared by the rules ----------------------------------------------------------------------------

    def best(self, scored: list[tuple[float, int, int]], n: int) -> list[tuple[int, int]]:
        """The n best of (score, position, head), higher first; ties to the older position, then the lower head;
        NaN loses. Returns (position, head). Notes how close the last winner and the first loser were."""
        order = sorted(scored, key=lambda s: (math.isnan(s[0]), -s[0] if not math.isnan(s[0]) else 0.0, s[1], s[2]))
        n = max(0, n)
        if 0 < n < len(order):
            self.near(order[n - 1][0], order[n][0])
        return [(place, head) for _, place, head in order[:n]]

    def near(self, a: float, b: float) -> None:
        """Notes how close two numbers were that a decision told apart; equal ones and NaN are no matter of rounding."""
        if a != b and not math.isnan(a) and not math.isnan(b):
            self.closest = min(self.closest, abs(a - b) / max(abs(a), abs(b)))


def marks(sets: Sequence[set[int]], columns: Sequence[int]) -> Tensor:
    """Which columns are in each of the sets: bool [sets, columns]."""
    return torch.tensor([[p in chosen for p in columns] for chosen in sets])


_ACTIVE: list[Oracle] = []


class _reading:
    """Makes the model's attention call back into one oracle, and puts the model's own attention back. Layers that are
    off add nothing to the residual stream."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.off = [oracle.model.model.layers[layer].self_attn for layer in oracle.off]

    def __enter__(self) -> None:
        self.before = self.oracle.model.config._attn_implementation
        self.oracle.model.set_attn_implementation(ATTENTION)
        _ACTIVE.append(self.oracle)
        for module in self.off:
            module.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)

    def __exit__(self, *exc: object) -> None:
        for module in self.off:
            del module.forward
        _ACTIVE.pop()
        self.oracle.model.set_attn_implementation(self.before)


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    if attention_mask is not None:
        raise AssertionError("the oracle takes one unpadded sequence")
    return _ACTIVE[-1].read(module.layer_idx, query[0], key[0], value[0], scaling)[None], None


AttentionInterface.register(ATTENTION, _attention)
