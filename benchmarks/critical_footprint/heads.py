"""Which heads keep everything: PruLong, DuoAttention and RazorAttention asked about one model.

Takes a model folder; gives, per method and part of the heads to keep, the file of a head table. PruLong learns one
table per target, as published, on plain text that holds both skills; DuoAttention learns once, on questions about
planted facts alone, as its synthetic passkeys are; RazorAttention probes. Tables that exist are not learned again.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import kvcompile
from kvcompile.evaluation import tales
from kvcompile.learning.data import Sequence
from kvcompile.learning.quick import probe_scores

SINK, WINDOW = 4, 16  # tokens that a local head keeps
LENGTH = 256  # tokens of a text
TEXTS = 512
STEPS = {"prulong": 400, "duo": 200}
BATCH = 4

CLASSES = f"""
heads retrieval = table("heads.tsv", top=50%)
heads local = rest

policy mixed(n_sink={SINK}, window={WINDOW}, c=32):
    retrieval: keep all
    local: keep sink(n_sink) | recent(window)
    at chunk(c), step
"""
PRULONG = """
learn retrieval for mixed:
    gate z = hard_concrete(init=4.0) per head
    mix z * retrieval + (1 - z) * local
    loss next_token + lagrange(mean(z), target={keep}%, ramp=80%)
    freeze weights
"""
DUO = """
learn retrieval for mixed:
    gate z = clamp01(init=1) per head
    mix z * retrieval + (1 - z) * local
    loss hidden_mse(answer_tokens) + 0.05 * mean(z)
    freeze weights
"""


def plain_texts(seed: int) -> list[Sequence]:
    """Tales with facts and topics, every next word a label: what a language model is trained on."""
    rng = random.Random(f"plain {seed}")
    out = []
    for _ in range(TEXTS):
        words, _ = tales.training_text(rng, LENGTH, rng.randint(4, 24), rng.randint(0, 2))
        out.append(Sequence(tales.encode(words)))
    return out


def passkeys(seed: int) -> list[Sequence]:
    """Tales with facts alone, in which only the answers are compared: DuoAttention's kind of data."""
    rng = random.Random(f"passkeys {seed}")
    out = []
    for _ in range(TEXTS):
        words, weights = tales.training_text(rng, LENGTH, rng.randint(4, 24))
        # The state that predicts a word is that of the word before.
        out.append(Sequence(tales.encode(words), answers=[w == tales.ANSWER for w in weights[1:]] + [False]))
    return out


def prulong(model: Any, keep: int, seed: int, folder: Path) -> Path:
    """A 0/1 table with `keep` per cent of the heads, learned for that target."""
    path = folder / f"prulong-{keep}.tsv"
    if not path.exists():
        text = CLASSES + PRULONG.format(keep=keep)
        found = kvcompile.learn(
            model, text, plain_texts(seed), steps=STEPS["prulong"], batch=BATCH, seed=seed, progress=True
        )
        found.scores.save(path.with_suffix(".safetensors"), found.keep)
        found.save(path)
    return path


def duo(model: Any, seed: int, folder: Path) -> Path:
    """The gates' values, to be ranked."""
    path = folder / "duo.safetensors"
    if not path.exists():
        found = kvcompile.learn(
            model, CLASSES + DUO, passkeys(seed), steps=STEPS["duo"], batch=BATCH, seed=seed, progress=True
        )
        found.scores.save(path)
    return path


def razor(model: Any, kind: str, folder: Path) -> Path:
    """Scores by one of RazorAttention's probes, `induction` (14 of its 15 % of the heads) or `echo`, to be ranked."""
    path = folder / f"razor-{kind}.safetensors"
    if not path.exists():
        probe_scores(model, kind).save(path)
    return path
