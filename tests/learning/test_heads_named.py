"""The heads that learning, quick scores and probes name on the shipped model are those that ablation names.

The truth is computed here: one KV head alone made local, by a mask in a plain forward, and the rise of the answers'
loss. What learning keeps is then judged by the same forward with all other heads local.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from kvcompile.evaluation import tales
from kvcompile.learning.data import NO_LABEL, Sequence
from kvcompile.learning.learn import learn
from kvcompile.learning.masks import HeadScores
from kvcompile.learning.quick import probe_scores, quick_scores
from kvcompile.passes.facts import model_facts
from kvcompile.passes.learning import compile_learn

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "recall_model"
MATERIAL = 0.1  # of the largest rise: heads that matter
KEEP = Fraction(1, 4)  # 3 of 12

Head = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """Texts of `length` tokens with `facts` facts, and what a local head reads of them."""

    length: int
    facts: int
    window: int
    sink: int = 4

    @property
    def params(self) -> dict[str, int]:
        return {"n_sink": self.sink, "window": self.window}

    def texts(self, count: int, seed: object) -> list[Sequence]:
        """Tales; the answers to their questions are predicted and compared."""
        rng, found = random.Random(f"heads {seed}"), []
        for _ in range(count):
            words, weights = tales.training_text(rng, self.length, self.facts)
            ids = tales.encode(words)
            answers = [weight == tales.ANSWER for weight in weights[1:]] + [False]
            following = zip([*ids[1:], NO_LABEL], answers, strict=True)
            found.append(Sequence(ids, [token if answer else NO_LABEL for token, answer in following], answers))
        return found


SHORT, LONG = Setting(128, 8, 16), Setting(256, 16, 60)


class Truth:
    """The shipped model with heads made local by masks, over texts that no training here sees."""

    def __init__(self, setting: Setting) -> None:
        ablation = _ablation()
        assert setting.sink == ablation.SINK
        self.model, self.width = ablation.load(FOLDER), setting.sink + setting.window
        texts = setting.texts(32, "truth")
        self.ids, self.labels = (torch.tensor([getattr(text, name) for text in texts]) for name in ("ids", "labels"))
        self.heads = [(i, j) for i in range(3) for j in range(4)]
        base = self.with_local(set())[0]
        self.rise = {head: self.with_local({head})[0] - base for head in self.heads}
        most = max(self.rise.values())
        self.material = {head for head, rise in self.rise.items() if rise > MATERIAL * most}

    @torch.no_grad()
    def with_local(self, local: set[Head]) -> tuple[float, float]:
        """Loss of the answers, nats, and the part that is right, where some heads are local in the whole forward."""
        mask = torch.tensor([[(i, j) in local for j in range(4)] for i in range(3)])
        logits = self.model(self.ids, use_cache=False, local_heads=mask, local_width=self.width).logits
        there = self.labels != NO_LABEL
        wanted = self.labels[there]
        right = (logits[there].argmax(-1) == wanted).float().mean().item()
        return functional.cross_entropy(logits[there], wanted).item(), right

    def with_whole(self, heads: frozenset[Head]) -> float:
        """The part of right answers where all heads but these are local."""
        return self.with_local(set(self.heads) - heads)[1]


def _ablation() -> Any:
    spec = importlib.util.spec_from_file_location("ablation", EXAMPLES / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def short() -> Truth:
    return Truth(SHORT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def check_named(truth: Truth, scores: HeadScores) -> None:
    """The kept heads hold all that ablation names, the first of them first, and carry the answers by themselves."""
    chosen = scores.chosen(KEEP)
    assert len(chosen) == 3
    assert truth.material <= chosen
    assert scores.chosen(Fraction(1, 12)) == {max(truth.rise, key=truth.rise.__getitem__)}
    assert truth.with_whole(chosen) >= 0.95


def test_the_truth_is_sharp(short: Truth) -> None:
    """What the other tests stand on: few heads matter, and without any the answers are lost."""
    ranked = sorted(short.rise.values(), reverse=True)
    assert 1 <= len(short.material) <= 3
    assert ranked[len(short.material) - 1] > 10 * max(ranked[len(short.material)], 0)
    assert short.with_whole(frozenset(short.heads)) >= 0.99
    assert short.with_whole(frozenset()) <= 0.35


def test_prulong_names_the_heads_of_the_ablation(short: Truth, model: Any) -> None:
    found = learn(model, "prulong", SHORT.texts(480, 0), steps=240, batch=2, keep=KEEP, **SHORT.params)
    check_named(short, found.scores)


def test_duo_names_the_heads_of_the_ablation(short: Truth, model: Any) -> None:
    found = learn(model, "duo", SHORT.texts(80, 0), steps=40, batch=2, keep=KEEP, **SHORT.params)
    check_named(short, found.scores)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_longer_texts_and_trainings_of_other_seeds_name_the_same(model: Any, seed: int) -> None:
    truth = Truth(LONG)
    for policy, steps in (("prulong", 300), ("duo", 110)):
        texts = LONG.texts(2 * steps, seed)
        found = learn(model, policy, texts, steps=steps, batch=2, seed=seed, keep=KEEP, **LONG.params)
        check_named(truth, found.scores)


@pytest.mark.parametrize("seed", range(3))
def test_quick_scores_put_the_head_of_the_ablation_first(short: Truth, model: Any, seed: int) -> None:
    """Random tokens, no training; the heads behind the first differ from learning's."""
    plan = compile_learn("prulong", model_facts(model), **SHORT.params)
    scores = quick_scores(model, plan, tokens=256, seed=seed)
    assert scores.chosen(Fraction(1, 12)) == {max(short.rise, key=short.rise.__getitem__)}
    assert short.material <= scores.chosen(KEEP)
    assert short.with_whole(scores.chosen(KEEP)) >= 0.95


def test_quick_scores_of_texts_name_the_heads_too(short: Truth, model: Any) -> None:
    plan = compile_learn("prulong", model_facts(model), **SHORT.params)
    texts = torch.tensor([text.ids for text in SHORT.texts(16, "quick")])
    scores = quick_scores(model, plan, texts)
    assert short.material <= scores.chosen(KEEP) and short.with_whole(scores.chosen(KEEP)) >= 0.95


def test_the_echo_probe_names_them_the_induction_probe_does_not_see_them(short: Truth, model: Any) -> None:
    """A question ends with the name itself, so the head that answers looks for an equal token, not for its follower."""
    echo, induction = (probe_scores(model, kind) for kind in ("echo", "induction"))
    chosen = echo.chosen(KEEP)
    assert short.material <= chosen and short.with_whole(chosen) >= 0.95
    ranked = sorted((value for row in echo.values for value in row), reverse=True)
    assert ranked[2] > 4 * ranked[3]
    assert max(value for row in induction.values for value in row) < ranked[2] / 4
