"""Drives an optimised model forward by forward, and the library policies with the oracle's rule for each.

A `Sample` is one policy with parameters small enough for short prompts, as the product takes it and as the oracle does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import kvcompile
from tests import oracle_policies as rules
from tests import oracle_states as stateful
from tests import oracle_systems as systems
from tests.models import random_model

BACKENDS = ("reference", "cpu")
ABSOLUTE, RELATIVE = 1e-4, 1e-5
# Scores nearer than this (relative) may be ordered differently by two backends: the language allows it.
NEAR_TIE = 1e-5

Positions = tuple[tuple[tuple[int, ...], ...], ...]  # [layer][KV head]


def examples(n: int):
    """Hypothesis with n fixed examples. Models are slow to build: no health checks, and no shrinking, since every
    draw is small already."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = [Phase.explicit, Phase.generate]
    return settings(
        max_examples=n, deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=quiet
    )


def some_slow(
    first: Sequence[object], second: Sequence[object], quick: Sequence[tuple[object, object]]
) -> list[object]:
    """All pairs as parameters of a test; those that are not among the quick ones are marked slow."""
    return [
        pytest.param(a, b, marks=[] if (a, b) in quick else [pytest.mark.slow], id=f"{a}-{b}")
        for a in first
        for b in second
    ]


# -- one policy with parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """policy, params for `optimize`; rule() for the oracle; mask [layer][KV head] where classes come from a table;
    changes to the model's configuration, where the policy means little without them; trained: the state that holds
    scores of `oracle_states.trained_heads`."""

    policy: str
    params: dict[str, object]
    rule: Callable[[], rules.KeepAll]
    mask: tuple[tuple[int, ...], ...] | None = None
    changes: dict[str, object] = field(default_factory=dict)
    trained: str | None = None

    def model(self, family: str = "llama64") -> PreTrainedModel:
        """A random model that the policy means something for."""
        return random_model(family, **self.changes)

    def options(self, folder: Path, family: str = "llama64") -> dict[str, object]:
        """Keyword arguments for `optimize` and `explain`; writes the mask as a table, or trained scores for a model of
        the family, into `folder`."""
        if self.trained is not None:
            config = self.model(family).config
            heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
            weights = stateful.trained_heads(config.num_hidden_layers, heads, group, config.head_dim)
            save_file(weights, folder / "trained.safetensors")
            return {**self.params, "tables": {self.trained: str(folder / "trained.safetensors")}}
        if self.mask is None:
            return dict(self.params)
        path = folder / "mask.tsv"
        path.write_text("\n".join("\t".join(map(str, row)) for row in self.mask) + "\n")
        return {**self.params, "tables": {"retrieval": str(path)}}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a sample is built from; hypothesis draws them, and each field shrinks to its simplest value."""

    budget: int = 16
    observe: int = 4
    pool: int = 5
    chunk: int = 8
    sink: int = 2
    percent: int = 50
    mask: tuple[tuple[int, ...], ...] = field(default=((1, 0), (0, 1), (0, 0)))


@st.composite
def sizes(draw: st.DrawFn, layers: int, heads: int = 2) -> Sizes:
    observe = draw(st.integers(1, 8))
    return Sizes(
        budget=observe + draw(st.integers(0, 24)),
        observe=observe,
        pool=draw(st.sampled_from([1, 3, 5, 7])),
        chunk=draw(st.integers(2, 20)),
        sink=draw(st.integers(0, 5)),
        percent=draw(st.sampled_from([10, 25, 30, 50, 75])),
        mask=tuple(tuple(draw(st.integers(0, 1)) for _ in range(heads)) for _ in range(layers)),
    )


def _share(s: Sizes) -> Fraction:
    return Fraction(s.percent, 100)


def _snap(s: Sizes) -> dict[str, int]:
    return {"budget": s.budget, "observe": s.observe, "pool": s.pool}


def _prulong(name: str, s: Sizes) -> Sample:
    params = {"n_sink": s.sink, "window": s.budget, "c": s.chunk}
    return Sample(name, params, lambda: rules.prulong(s.mask, s.sink, s.budget, s.chunk), s.mask)


LIBRARY: dict[str, Callable[[Sizes], Sample]] = {
    "keep_all": lambda s: Sample("keep_all", {}, rules.KeepAll),
    "streaming": lambda s: Sample(
        "streaming", {"n_sink": s.sink, "window": s.budget}, lambda: rules.Streaming(sink=s.sink, window=s.budget)
    ),
    "h2o": lambda s: Sample(
        "h2o",
        {"heavy": f"{s.percent}% of prompt", "local": "10% of prompt"},
        lambda: rules.H2O(heavy=_share(s), local=Fraction(1, 10)),
    ),
    "snapkv": lambda s: Sample("snapkv", _snap(s), lambda: rules.SnapKV(**_snap(s))),
    "snapkv_chunked": lambda s: Sample(
        "snapkv_chunked",
        {"ratio": f"{s.percent}%", "observe": s.observe, "pool": s.pool, "c": s.chunk},
        lambda: rules.SnapKVChunked(chunk=s.chunk, observe=s.observe, pool=s.pool, ratio=_share(s)),
    ),
    "tova": lambda s: Sample("tova", {"budget": s.budget}, lambda: rules.TOVA(budget=s.budget)),
    "pyramidkv": lambda s: Sample("pyramidkv", _snap(s), lambda: rules.PyramidKV(**_snap(s))),
    "adakv": lambda s: Sample("adakv", _snap(s), lambda: rules.AdaKV(**_snap(s))),
    "knorm": lambda s: Sample("knorm", {"budget": s.budget}, lambda: rules.KNorm(budget=s.budget)),
    "keydiff": lambda s: Sample("keydiff", {"budget": s.budget}, lambda: rules.KeyDiff(budget=s.budget)),
    "lagkv": lambda s: Sample(
        "lagkv",
        {"n_sink": s.sink, "lag": s.chunk, "ratio": f"{s.percent}%"},
        lambda: rules.LagKV(sink=s.sink, lag=s.chunk, ratio=_share(s)),
    ),
    "keyformer": lambda s: Sample(
        "keyformer",
        {"heavy": f"{s.percent}% of prompt", "local": "10% of prompt", "seed": s.sink},
        lambda: stateful.Keyformer(heavy=_share(s), local=Fraction(1, 10), seed=s.sink),
    ),
    "lazy": lambda s: Sample(
        "lazy",
        {"budget": s.budget, "window": min(s.observe, 3), "alpha": 0.05},
        lambda: stateful.Lazy(budget=s.budget, window=min(s.observe, 3), alpha=0.05),
    ),
    "r_kv": lambda s: Sample("r_kv", {**_snap(s), "buffer": 2}, lambda: stateful.RKV(**_snap(s), buffer=2)),
    "expected_attention": lambda s: Sample(
        "expected_attention",
        {"budget": s.budget + s.sink, "n_sink": s.sink, "observe": s.observe},
        lambda: stateful.ExpectedAttention(budget=s.budget + s.sink, sink=s.sink, observe=s.observe),
    ),
    "locret": lambda s: Sample(
        "locret",
        {"budget": s.budget, "stabilizers": s.observe, "c": s.chunk},
        lambda: stateful.Locret(budget=s.budget, stable=s.observe, chunk=s.chunk),
        trained="cis",
    ),
    "criticalkv": lambda s: Sample("criticalkv", _snap(s), lambda: stateful.CriticalKV(**_snap(s))),
    "streaming_compact": lambda s: Sample(
        "streaming_compact",
        {"n_sink": s.sink, "window": s.budget},
        lambda: systems.StreamingCompact(sink=s.sink, window=s.budget),
    ),
    "chunkkv": lambda s: Sample(
        "chunkkv",
        {"budget": s.budget, "observe": s.observe, "size": s.pool},
        lambda: systems.ChunkKV(budget=s.budget, observe=s.observe, size=s.pool),
    ),
    "windowkv": lambda s: Sample(
        "windowkv",
        {"budget": s.budget, "observe": s.observe, "w": s.pool, "beta": s.chunk},
        lambda: systems.WindowKV(budget=s.budget, observe=s.observe, size=s.pool, beta=s.chunk, layers_shared=8),
        changes={"num_hidden_layers": 9},  # two groups
    ),
    "prefixkv": lambda s: Sample(
        "prefixkv", {"budget": f"{s.percent}% of prompt"}, lambda: systems.PrefixKV(budget=_share(s))
    ),
    "d2o": lambda s: Sample(
        "d2o",
        {"budget": f"{s.percent}% of prompt", "n_sink": s.sink},
        lambda: systems.D2O(budget=_share(s), sink=s.sink),
        changes={"num_hidden_layers": 5},  # the first two and the last keep all
    ),
    "elastic": lambda s: Sample(
        "elastic",
        {"budget": f"{s.percent}% of prompt", "n_sink": s.sink, "window": s.observe},
        lambda: systems.Elastic(budget=_share(s), sink=s.sink, window=s.observe),
    ),
    "razor": lambda s: Sample(
        "razor",
        {"n_sink": s.sink, "least": s.observe + 2},
        lambda: systems.Razor(sink=s.sink, least=s.observe + 2),
        changes={"num_hidden_layers": 4, "max_position_embeddings": 256},  # 14 % of 8 heads; short probes
    ),
    "freqkv": lambda s: Sample(
        "freqkv",
        {"n_sink": s.sink, "size": s.budget + 12},
        lambda: systems.FreqKV(sink=s.sink, size=s.budget + 12),
    ),
    "prulong": lambda s: _prulong("prulong", s),
    "duo": lambda s: _prulong("duo", s),
}


# -- running the product ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of the model: logits [B, n, V], and after it the kept positions of each sequence."""

    logits: Tensor
    kept: tuple[Positions, ...]


def kept(cache: kvcompile.KvCache, layers: int, row: int = 0) -> Positions:
    return tuple(tuple(tuple(p.tolist()) for p in cache.positions(layer, row=row)) for layer in range(layers))


def call(model: PreTrainedModel, ids: Tensor, cache=None, mask: Tensor | None = None) -> tuple[Seen, kvcompile.KvCache]:
    """One forward of token ids [B, n] on `cache`; `mask` [B, all tokens so far] as generate() passes it."""
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    layers = model.config.num_hidden_layers
    return Seen(
        out.logits, tuple(kept(out.past_key_values, layers, row) for row in range(len(ids)))
    ), out.past_key_values


def drive(model: PreTrainedModel, *turns: Sequence[int]) -> list[Seen]:
    """Feeds one sequence: each turn is one call of the model on the same cache."""
    seen, cache = [], None
    for turn in turns:
        found, cache = call(model, torch.tensor([list(turn)]), cache)
        seen.append(found)
    return seen


def one_by_one(tokens: Sequence[int]) -> list[list[int]]:
    """Forced tokens as turns of one."""
    return [[token] for token in tokens]


def padded(prompts: Sequence[Sequence[int]], side: str, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids [B, n] and their attention mask [B, n], padded with 0 on the left or the right."""
    width = width or max(len(p) for p in prompts)
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[b, place], mask[b, place] = torch.tensor(list(prompt)), 1
    return ids, mask


def same(mine: Tensor, truth: Tensor, what: str) -> None:
    """Asserts logits equal to the issue's tolerance."""
    assert mine.shape == truth.shape, f"{what}: {tuple(mine.shape)} where {tuple(truth.shape)} is meant"
    off = (mine - truth).abs().max().item()
    assert off <= ABSOLUTE + RELATIVE * truth.abs().max().item(), f"{what}: logits off by {off:.2e}"
