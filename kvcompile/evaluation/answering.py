"""A suite's turns put to a model as it stands, optimised or not: prompt, question, answer, next question, on one cache.

Takes model, tokenizer, suite and samples; gives an `Outcome`: scores and texts, and what the cache held and cost.
Guarantees: what a sample gives does not depend on the others of its batch; nothing is tokenised twice, ids are joined;
greedy decoding, and what the model said stays in the cache, for later turns to read (a stop token that ends texts does
not). The tokens of all turns are part of T in footprint and peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvcompile.evaluation.samples import Sample, Suite, Turn
from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.facts import model_facts

FIGURES = ("footprint", "peak", "kept", "bytes_resident", "bytes_full", "bytes_peak")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What some samples gave. Lists are [sample][turn]; `nll` is in nats per token, None but for turns of kind text.

    `footprint` and `peak` are means over sequences, `kept` the part of all entries that is left at the end; bytes are
    per sequence. An untouched model holds everything: 1.0, and its keys and values.
    """

    scores: tuple[tuple[float, ...], ...]
    nll: tuple[tuple[float | None, ...], ...]
    produced: tuple[tuple[str, ...], ...]
    prompt_tokens: tuple[int, ...]
    footprint: float
    peak: float
    kept: float
    bytes_resident: float
    bytes_full: float
    bytes_peak: float
    seconds: float
    footprint_by_head: tuple[tuple[float, ...], ...] | None = None  # [layer][KV head], where the report gives it

    @property
    def score(self) -> float:
        """Mean over samples of the mean over their turns."""
        return fmean(fmean(turns) for turns in self.scores)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A turn in token ids: what is fed, and for kind text what is fed after it and predicted."""

    turn: Turn
    ask: list[int]
    text: list[int]


def answer(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    samples: Sequence[Sample],
    *,
    batch: int = 16,
    tick: Callable[[int], None] | None = None,
    fed: int | None = None,
) -> Outcome:
    """Run `samples` in batches of `batch` prompts, all turns of each; `tick` is told how many are done.

    fed: tokens of a prompt in one forward, counted from its first; None: all of them. A last piece of one token is a
    step, as it is wherever a policy runs.

    Raises KvCompileError where there is nothing to ask, or a sample is longer than the model's positions.
    """
    if not samples:
        raise KvCompileError(f"suite {suite.name} gave no sample: ask for at least one")
    if batch < 1:
        raise KvCompileError(f"a batch of {batch} samples: give at least 1")
    prompts = [tokenizer(sample.prompt)["input_ids"] for sample in samples]
    asked = [[_asked(tokenizer, suite, turn) for turn in sample.turns] for sample in samples]
    _check_lengths(model, suite, prompts, asked)
    stops = stop_tokens(model, tokenizer)
    said: list[list[_Said]] = []
    figures: list[tuple[int, dict[str, Any]]] = []
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(samples), batch):
            talk = _Talk(model, prompts[first : first + batch], _padding(tokenizer), fed)
            said += _run(talk, tokenizer, asked[first : first + batch], stops)
            count = len(talk.seen)
            figures.append((count, talk.figures()))
            if tick is not None:
                tick(count)
    seconds = time.perf_counter() - start
    scores = []
    for sample, turns in zip(samples, said, strict=True):
        pairs = zip(sample.turns, turns, strict=True)
        scores.append(tuple(s.score if t.kind == "text" else float(suite.score(t, s.produced)) for t, s in pairs))
    return Outcome(
        tuple(scores),
        tuple(tuple(s.nll for s in turns) for turns in said),
        tuple(tuple(s.produced for s in turns) for turns in said),
        tuple(map(len, prompts)),
        **_mean(figures),
        seconds=seconds,
    )


# -- one batch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Said:
    """What a turn gave: the text; for kind text its likeliest tokens, the part of them that is right, and the nll."""

    produced: str
    score: float = 0.0
    nll: float | None = None


class _Talk:
    """A batch on its cache: takes a piece of ids per sequence, some of them empty, and holds each one's newest logits.

    An untouched model sees padding in masks and positions, an optimised one drops it.
    """

    def __init__(self, model: Any, prompts: list[list[int]], padding: int, fed: int | None = None) -> None:
        self.model, self.padding = model, padding
        self.cache: Any = None
        self.seen = [0] * len(prompts)
        self.optimised = "_kvcompile" in vars(model)
        self.mask = torch.zeros(len(prompts), 0, dtype=torch.int64)
        self.newest: Tensor | None = None  # [batch, vocabulary]
        longest = max(map(len, prompts))
        for start in range(0, longest, fed or longest):
            self.feed([prompt[start : start + (fed or longest)] for prompt in prompts])

    def feed(self, pieces: list[list[int]], everywhere: bool = False) -> Tensor:
        """Logits after each sequence's last token, [batch, vocabulary]; `everywhere`: after all columns of the pieces,
        right-aligned, [batch, columns, vocabulary]. Where a sequence brings no token they mean nothing."""
        width = max(map(len, pieces))
        ids = torch.tensor([[self.padding] * (width - len(piece)) + piece for piece in pieces])
        mask = torch.tensor([[0] * (width - len(piece)) + [1] * len(piece) for piece in pieces])
        self.mask = torch.cat([self.mask, mask], dim=1)
        device = next(self.model.parameters()).device
        options: dict[str, Any] = {"attention_mask": mask}  # on the host: there it is looked at for single tokens too
        if not self.optimised:
            positions = (torch.tensor(self.seen)[:, None] + mask.cumsum(1) - 1).clamp(min=0)
            options = {"attention_mask": self.mask.to(device), "position_ids": positions.to(device)}
        out = self.model(
            input_ids=ids.to(device), past_key_values=self.cache, use_cache=True,
            logits_to_keep=0 if everywhere else 1, **options,
        )  # fmt: skip
        self.cache = out.past_key_values
        self.seen = [n + len(piece) for n, piece in zip(self.seen, pieces, strict=True)]
        last = out.logits[:, -1]
        fresh = mask[:, -1:].bool().to(last.device)
        self.newest = last if self.newest is None else torch.where(fresh, last, self.newest)
        return out.logits if everywhere else last

    def figures(self) -> dict[str, Any]:
        """The report's figures of this batch, bytes per sequence."""
        count = len(self.seen)
        if self.optimised:
            from kvcompile.reporting import report

            found = report(self.model).to_dict()
        else:
            facts = model_facts(self.model)
            held = sum(self.seen) * facts.layers * facts.kv_heads * facts.entry_bytes
            found = {"footprint": 1.0, "peak": 1.0, "kept": 1.0}
            found |= dict.fromkeys(("bytes_resident", "bytes_full", "bytes_peak"), held)
        out = {key: found[key] / count if key.startswith("bytes") else found[key] for key in FIGURES}
        return out | {"footprint_by_head": found.get("footprint_by_head")}


def _run(talk: _Talk, tokenizer: Any, asked: list[list[_Asked]], stops: frozenset[int]) -> list[list[_Said]]:
    said: list[list[_Said]] = [[] for _ in asked]
    pending: list[list[int]] = [[] for _ in asked]  # chosen by the model and not fed yet
    for number in range(max(map(len, asked))):
        turns = [turns[number] if number < len(turns) else None for turns in asked]
        pieces = [rest + turn.ask if turn else [] for rest, turn in zip(pending, turns, strict=True)]
        if any(pieces):
            talk.feed(pieces)
        pending = [[] if turn else rest for rest, turn in zip(pending, turns, strict=True)]
        assert talk.newest is not None
        newest = talk.newest  # of texts: generating for other sequences goes on from here
        chosen = _generate(talk, [t if t and t.turn.kind != "text" else None for t in turns], stops)
        read = _read(talk, newest, [t.text if t and t.turn.kind == "text" else [] for t in turns])
        for b, turn in enumerate(turns):
            if turn is None:
                continue
            if turn.turn.kind == "text":
                best, right, nll = read[b]
                said[b].append(_Said(_decoded(tokenizer, best), right, nll))
                pending[b] = turn.text[-1:]
            else:
                said[b].append(_Said(_decoded(tokenizer, chosen[b])))
                pending[b] = [token for token in chosen[b][-1:] if token not in stops]
    return said


def _generate(talk: _Talk, turns: list[_Asked | None], stops: frozenset[int]) -> list[list[int]]:
    """The likeliest tokens of each sequence that has a turn, until it stops; the last one is chosen, not fed."""
    chosen: list[list[int]] = [[] for _ in turns]
    going = [turn is not None and turn.turn.tokens > 0 for turn in turns]
    while any(going):
        assert talk.newest is not None
        best = talk.newest.argmax(-1).tolist()
        for b, turn in enumerate(turns):
            if turn is None or not going[b]:
                continue
            chosen[b].append(best[b])
            going[b] = len(chosen[b]) < turn.turn.tokens and best[b] not in stops
        if any(going):
            talk.feed([row[-1:] if goes else [] for row, goes in zip(chosen, going, strict=True)])
    return chosen


def _read(talk: _Talk, newest: Tensor, texts: list[list[int]]) -> list[tuple[list[int], float, float]]:
    """Feed texts, each as one piece without its last token: likeliest tokens, the part that is right, mean nll."""
    if not any(texts):
        return [([], 0.0, 0.0)] * len(texts)
    pieces = [text[:-1] for text in texts]
    logits = talk.feed(pieces, everywhere=True) if any(pieces) else newest[:, None]
    found: list[tuple[list[int], float, float]] = []
    for b, text in enumerate(texts):
        if not text:
            found.append(([], 0.0, 0.0))
            continue
        after = logits[b, logits.shape[1] - len(pieces[b]) :] if pieces[b] else newest[:0]
        rows = torch.cat([newest[b : b + 1], after]).float()
        wanted = torch.tensor(text, device=rows.device)
        best = rows.argmax(-1)
        nll = torch.nn.functional.cross_entropy(rows, wanted)
        found.append((best.tolist(), float((best == wanted).double().mean()), float(nll)))
    return found


# -- tokens and means -------------------------------------------------------------------------------------------------


def _asked(tokenizer: Any, suite: Suite, turn: Turn) -> _Asked:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    text = ids(turn.answer) if turn.kind == "text" else []
    if turn.kind == "text" and not text:
        raise KvCompileError(f"suite {suite.name} gave a turn of kind text without text to predict")
    return _Asked(turn, ids(turn.ask), text)


def _check_lengths(model: Any, suite: Suite, prompts: list[list[int]], asked: list[list[_Asked]]) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, (prompt, turns) in enumerate(zip(prompts, asked, strict=True)):
        if not prompt or not turns:
            what = "prompt" if not prompt else "turn"
            raise KvCompileError(f"sample {number} of suite {suite.name} has no {what}")
        longest = len(prompt) + sum(len(turn.ask) + max(len(turn.text), turn.turn.tokens) for turn in turns)
        if most is not None and longest > most:
            raise KvCompileError(
                f"sample {number} of suite {suite.name} takes up to {longest} tokens with its answers, and the model "
                f"has {most} positions: ask for shorter prompts (--length)"
            )


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and what the model's generation settings name."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(given if isinstance(given, list | tuple) else (given,))}
    return frozenset(token for token in found if token is not None)


def _padding(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _mean(batches: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Figures of batches as figures of all samples; `kept` weighs each entry alike."""
    total = sum(count for count, _ in batches)
    out: dict[str, Any] = {}
    for key in FIGURES:
        weights = [count * (found["bytes_full"] if key == "kept" else 1) for count, found in batches]
        values = [found[key] for _, found in batches]
        out[key] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    grids = [found["footprint_by_head"] for _, found in batches]
    if all(grid is not None for grid in grids):
        stacked = torch.tensor(grids, dtype=torch.float64)
        weight = torch.tensor([count / total for count, _ in batches], dtype=torch.float64)[:, None, None]
        out["footprint_by_head"] = tuple(tuple(row) for row in (stacked * weight).sum(0).tolist())
    return out
