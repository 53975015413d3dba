"""The experiment's models: small Llamas that learn two kinds of long memory here, from nothing.

Takes how many are wanted; trains seed after seed, and keeps those that have learned both facts and topics. A model that
is in the work folder already is not trained again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompile.evaluation import tales
from kvcompile.evaluation.answering import answer
from kvcompile.evaluation.samples import suite

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_recall_model import GIVE_UP, Stage, new_tokenizer, train

LENGTH = 256  # tokens of a prompt in the experiment
GOOD = 0.95  # of the questions of either kind
TRIES = 12  # seeds

CURRICULUM = (
    Stage(14, 72, (2, 2), 0.95, 0, GIVE_UP),
    Stage(32, 32, (2, 2), 0.95, 50, GIVE_UP, 1.0, (0, 1)),
    Stage(64, 24, (2, 6), 0.96, 50, GIVE_UP, 1.0, (0, 1)),
    Stage(128, 16, (4, 12), 0.97, 100, 600, 1.0, (0, 2)),
    Stage(256, 8, (4, 24), 0.98, 100, 400, 0.7, (0, 2)),
    Stage(288, 8, (4, 24), 0.99, 100, 400, 0.2, (0, 2)),
)


def trained(count: int, work: Path) -> dict[int, Path]:
    """Folders of the first `count` seeds that have learned, by seed."""
    found: dict[int, Path] = {}
    for seed in range(TRIES):
        if len(found) == count:
            return found
        folder, failed = work / f"model-{seed}", work / f"model-{seed}-did-not-learn"
        if not folder.exists() and not failed.exists():
            print(f"training the model of seed {seed}", file=sys.stderr)
            start = time.perf_counter()
            right = _train(seed, folder)
            print(f"  {time.perf_counter() - start:.0f} s; right: {right}", file=sys.stderr)
            if not folder.exists():
                failed.write_text(f"{right}\n")
        if folder.exists():
            found[seed] = folder
    raise SystemExit(f"only {len(found)} of {TRIES} seeds learned, and {count} are wanted")


def _train(seed: int, folder: Path) -> dict[str, float]:
    """Train one seed, and keep it if it answers; how often it did, by suite."""
    model = train(seed, lambda *_: None, CURRICULUM, tales.WITH_TOPICS)
    if model is None:
        return {"recall": 0.0}
    tokenizer = new_tokenizer(tales.WITH_TOPICS)
    right = {}
    for name in ("recall", "topic"):
        asked = suite(name)
        right[name] = answer(model, tokenizer, asked, asked.samples(64, LENGTH, 99, tokenizer), batch=32).score
    if min(right.values()) >= GOOD:
        aside = folder.with_suffix(".part")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(folder)
    return right


def load(folder: Path) -> tuple[torch.nn.Module, object]:
    """A trained model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
