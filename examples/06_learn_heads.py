"""Learns which heads look far back, by PruLong's gates on the shipped model, and runs a policy with what was found.

The data are tales whose questions are asked long after the facts; only the answers are predicted. It takes less than a
minute. `--out` names the folder for `masks.tsv`; without it the table is gone when the example ends.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.evaluation import tales
from kvcompile.learning.data import NO_LABEL, Sequence

FOLDER = Path(__file__).parent / "recall_model"
LOCAL: dict[str, Any] = {"n_sink": 4, "window": 16}  # what a local head keeps


def sequence(rng: random.Random) -> Sequence:
    words, weights = tales.training_text(rng, length=128, n_facts=8)
    ids = tales.encode(words)
    following = zip([*ids[1:], 0], [*weights[1:], 0.0], strict=True)
    return Sequence(ids, [token if weight == tales.ANSWER else NO_LABEL for token, weight in following])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    model, rng = AutoModelForCausalLM.from_pretrained(FOLDER), random.Random(0)
    data = [sequence(rng) for _ in range(480)]
    learned = kvcompile.learn(model, "prulong", data, steps=240, batch=2, keep="25%", progress=True, **LOCAL)
    for layer, row in enumerate(learned.scores.values):
        print(f"layer {layer}: scores of its KV heads {[round(score, 2) for score in row]}")
    print(f"kept whole (layer, KV head): {sorted(learned.scores.chosen('25%'))}")
    with tempfile.TemporaryDirectory() as folder:
        path = (out or Path(folder)) / "masks.tsv"
        learned.save(path)
        print(f"saved: {path}\n{path.read_text()}")
        kvcompile.optimize(model, "prulong", tables={"retrieval": path}, c=128, **LOCAL)
    asked = tales.prompts(1)[0]
    ids = AutoTokenizer.from_pretrained(FOLDER)(asked.text, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]
    print(f"... {asked.text[-60:]} -> {tales.VOCABULARY[answer]}   (right: {asked.answer})")
    print(kvcompile.report(model))


if __name__ == "__main__":
    main()
