"""Product and oracle side by side on policies with `attend`: small samples of the systems, and what each must be.

A `Case` is one policy, as the product takes it, with what keeps and what reads in the oracle. Library policies go by
their name with numbers small enough for short prompts.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import kvcompile
from kvcompile.dsl import library
from tests import oracle_gates as trained
from tests import oracle_reads as reads
from tests.driving import BACKENDS, NEAR_TIE, Positions, drive, one_by_one, same
from tests.following import policy
from tests.models import random_model, tokens
from tests.oracle import Oracle
from tests.oracle_policies import KeepAll

# Scores of units are products of 64 or more channels: two ways to add them up differ by more than those of attention.
NEAR_READ = 1e-4


class NearTie(AssertionError):
    """No tokens were found with which every choice is clear."""


Turns = list[list[int]]
Answer = tuple[Tensor, Positions]
Told = tuple[Turns, list[Answer]]


def some(names: Sequence[str], quick: Sequence[str] = (), backends: Sequence[str] = ("cpu",)) -> list[object]:
    """Parameters (name, backend) of a test: the quick ones run by default on `backends`, the others are slow; those of
    library policies are recorded all the same."""
    params = []
    for name in names:
        for backend in BACKENDS:
            marks = [pytest.mark.slow, pytest.mark.recorded] if name in library.names() else [pytest.mark.slow]
            fast = name in quick and backend in backends
            params.append(pytest.param(name, backend, marks=[] if fast else marks, id=f"{name}-{backend}"))
    return params


@dataclass(frozen=True, slots=True)
class Case:
    """policy: a library policy's name or a text; params for `optimize`; reader() and rule() for the oracle; changes to
    the model's configuration; prompt: tokens of a first prompt that is long enough for some entry not to be read;
    gates: random ones, of which each model gets a file."""

    policy: str
    reader: Callable[[], reads.Reader]
    params: dict[str, object] = field(default_factory=dict)
    rule: Callable[[], KeepAll] = KeepAll
    changes: dict[str, object] = field(default_factory=dict)
    prompt: int = 37
    gates: trained.Gates | None = None

    def model(self, family: str = "llama64") -> PreTrainedModel:
        return random_model(family, **self.changes)

    def oracle(self, family: str = "llama64") -> Oracle:
        return Oracle(self.model(family), self.rule(), self.reader())

    def optimized(self, backend: str, family: str = "llama64", **options: object) -> PreTrainedModel:
        given = {"compile": "off", **self.options(family), **options}
        return kvcompile.optimize(self.model(family), self.policy, backend=backend, **given)

    def options(self, family: str = "llama64") -> dict[str, object]:
        """Keyword arguments for `optimize` and `explain`."""
        if self.gates is None:
            return dict(self.params)
        return {**self.params, "tables": {"live": str(self.gate_file(family))}}

    def gate_file(self, family: str = "llama64") -> Path:
        config = self.model(family).config
        heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        return _gate_file(self.gates, config.num_hidden_layers, heads, group, config.head_dim)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """One of this process, which goes when it ends."""
    return tempfile.TemporaryDirectory()


@functools.cache
def _gate_file(gates: trained.Gates, *shape: int) -> Path:
    path = Path(_folder().name) / f"{len(list(Path(_folder().name).iterdir()))}.safetensors"
    save_file(trained.weights(gates, *shape), path, gates.metadata())
    return path


FEW = {"hidden_size": 64, "num_hidden_layers": 14}  # tidal picks in layers 2 and 13
MANY = {"hidden_size": 64, "num_hidden_layers": 28}  # llmdrop leaves out the last seven of 28
BLOCK_GATES, QUERY_GATES = trained.Gates(), trained.Gates(pooled=False, joined=True, normed=True)

LIBRARY: dict[str, Case] = {
    "powerattention": Case(
        "powerattention",
        lambda: reads.everywhere(reads.PowerAttention(size=4, sink=2, window=3)),
        {"size": 4, "n_sink": 2, "window": 3},
    ),
    "bigbird": Case(
        "bigbird",
        lambda: reads.everywhere(reads.BigBird(block=2, n=192, seed=3)),
        {"block": 2, "seed": 3},
        changes={"num_hidden_layers": 2, "hidden_size": 64},
        prompt=215,  # of which 192 are drawn
    ),
    "quest": Case(
        "quest",
        lambda: reads.in_layers(2, reads.Quest(page=4, budget=12)),
        {"page": 4, "budget": 12},
        changes={"num_hidden_layers": 3},
    ),
    "tidal": Case("tidal", lambda: reads.in_layers(2, reads.Tidal(n=6)), {"n": 6}, changes=FEW),
    "moba": Case("moba", lambda: reads.everywhere(reads.MoBA(size=4, n=3)), {"size": 4, "n": 3}),
    "infllm_v2": Case("infllm_v2", lambda: reads.everywhere(reads.InfLLMV2(n=2)), {"n": 2}),
    "sampleattention": Case(
        "sampleattention",
        lambda: reads.everywhere(reads.SampleAttention(mass=Fraction(7, 10), rows=Fraction(1, 5))),
        {"mass": "70%", "rows": "20%"},
    ),
    "seerattention": Case(
        "seerattention",
        lambda: reads.everywhere(reads.Seer(size=4, tau=0.02), reads.Dense()),
        {"size": 4, "tau": 0.02},
    ),
    "seerattention_r": Case(
        "seerattention_r", lambda: reads.everywhere(reads.SeerR(size=4, budget=12)), {"size": 4, "budget": 12}
    ),
    "seerattention_gated": Case(
        "seerattention_gated",
        lambda: reads.everywhere(trained.Threshold(gates=BLOCK_GATES, tau=0.08), reads.Dense()),
        {"size": 4, "tau": 0.08},
        gates=BLOCK_GATES,
    ),
    "seerattention_r_gated": Case(
        "seerattention_r_gated",
        lambda: reads.everywhere(trained.Best(gates=QUERY_GATES, budget=12)),
        {"size": 4, "budget": 12},
        gates=QUERY_GATES,
    ),
    "sparse_transformer": Case(
        "sparse_transformer", lambda: reads.everywhere(reads.Fixed(size=5, start=1)), {"size": 5}
    ),
    "vertical": Case(
        "vertical",
        lambda: reads.everywhere(reads.Vertical(sink=2, window=4, n=6, observe=8, alone=True), reads.Dense()),
        {"n_sink": 2, "window": 4, "n": 6, "observe": 8},
    ),
    "llmdrop": Case(
        "llmdrop", lambda: reads.Reader(lambda layer, head: (), off=frozenset(range(21, 28))), changes=MANY
    ),
}

INFLLM = (
    "unit kernel(4, stride=2) with c = mean[i] k",
    "unit block(8)",
    "score s = sum[g] softmax[u] dot(q, c)",
    "attend sink(3) | recent(5) | top(2) blocks by s per head",
    "at chunk, step",
)
TIDAL = (
    "layers 0: attend all",
    "layers 1, 3:",
    "    pick t = top(5) by logit per query_head",
    "    attend all",
    "attend t",
    "at step",
)

TEXTS: dict[str, Case] = {
    "bigbird, few": Case(
        policy("attend sink(2) | recent(3) | random(5, 7)"),
        lambda: reads.everywhere(reads.BigBird(block=2, window=3, n=5, seed=7)),
    ),
    "fixed": Case(
        policy("unit block(4)", "attend own block | stride(4)"), lambda: reads.everywhere(reads.Fixed(size=4))
    ),
    "window": Case(
        policy("attend sink(2) | recent(6)"), lambda: reads.everywhere(reads.Window(sink=2, window=6))
    ),
    "infllm_v2, small": Case(
        policy(*INFLLM), lambda: reads.everywhere(reads.InfLLMV2(n=2, sink=3, window=5, kernel=4, stride=2, block=8))
    ),
    "tidal, five layers": Case(
        policy(*TIDAL), lambda: reads.in_layers(1, reads.Tidal(n=5, pickers=(1, 3))), changes={"num_hidden_layers": 5}
    ),
    "vertical, one choice of a group": Case(
        policy("score s = sum[q in last(8)] attn", "attend sink(2) | recent(4) | top(6) by s per head", "at chunk"),
        lambda: reads.everywhere(reads.Vertical()),
    ),
}  # fmt: skip
CASES = LIBRARY | TEXTS


def turns_of(seed: int, first: int = 37, steps: int = 10) -> list[list[int]]:
    """A prompt, steps, a second prompt on the same cache, and steps again."""
    return [
        tokens(first, seed=10 * seed + 1),
        *one_by_one(tokens(steps, seed=10 * seed + 2)),
        tokens(6, seed=10 * seed + 3),
        *one_by_one(tokens(3, seed=10 * seed + 4)),
    ]


TURNS = turns_of(0)


def clear(run: Callable[[Turns], tuple[Oracle, list[Answer]]], first: int, steps: int) -> Told:
    """Turns in which no choice is a near tie, and what `run`, an oracle, answers to each: logits, kept positions."""
    best, told = 0.0, None
    for seed in range(6):
        turns = turns_of(seed, first, steps)
        truth, answers = run(turns)
        if truth.closest > best:
            best, told = truth.closest, (turns, answers)
        if best > NEAR_READ:
            break
    if told is None or best <= NEAR_TIE:
        raise NearTie(f"a near tie, {best:.1e}, whatever the tokens")
    return told


def answers(truth: Oracle, turns: Turns) -> tuple[Oracle, list[Answer]]:
    return truth, [(truth.feed(turn), truth.kept()) for turn in turns]


def agrees(case: Case, backend: str, family: str = "llama64", first: int = 0, steps: int = 10) -> None:
    """Asserts the oracle's logits and kept positions after each turn; first: of the first prompt, 0: the case's."""
    turns, told = clear(lambda turns: answers(case.oracle(family), turns), first or case.prompt, steps)
    seen = drive(case.optimized(backend, family), *turns)
    for i, (found, (logits, kept)) in enumerate(zip(seen, told, strict=True)):
        same(found.logits[0], logits, f"call {i}")
        assert found.kept[0] == kept, f"kept positions after call {i}"


def dense(model: PreTrainedModel, ids: Sequence[int], mask: Tensor) -> Tensor:
    """The untouched model's logits [n, V] where query i reads mask[i], bool [n, n], in all layers."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), attention_mask=mask[None, None], use_cache=False).logits[0]
