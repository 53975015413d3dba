"""Learns which blocks the shipped model's heads should read, and runs a policy that reads no others.

The gates are those of SeerAttention-R: two small maps per layer, distilled from the model's own attention over tales.
It takes less than a minute. `--out` names the folder for `gates.safetensors`; without it the gates are gone at the end.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import kvcompile
from kvcompile.evaluation import tales
from kvcompile.learning.data import Sequence

FOLDER = Path(__file__).parent / "recall_model"
POLICY = """
policy gated(size=8, n=2, near=8):
    unit block(size) with hi = max[i] raw.k, lo = min[i] raw.k, c = mean[i] raw.k
    score live = softmax[u] learned("gates.safetensors", q, hi, lo, c)
    attend recent(near) | top(n) blocks by live per head
    at step

learn live for gated:
    gate z = query_gate(width=32) per head
    loss attention_kl
    freeze weights

policy random_tokens(size=8, n=2, near=8):
    attend recent(near) | random(n * size, 1)
    at step
"""


def answered(name: str, tables: dict[str, Path]) -> str:
    """How many of 12 questions over 256 words are answered rightly, the last word of each read as a step."""
    model, right = AutoModelForCausalLM.from_pretrained(FOLDER), 0
    kvcompile.optimize(model, POLICY, name=name, tables=tables)
    for asked in tales.prompts(12, length=256):
        ids = torch.tensor([tales.encode([tales.BOS, *asked.text.split()])])
        with torch.no_grad():
            cache = model(ids[:, :-1]).past_key_values
            answer = model(ids[:, -1:], past_key_values=cache).logits[0, -1].argmax()
        right += int(answer) == tales.INDEX[asked.answer]
    return f"{name}: {right} of 12 right, reading 24 of 256 tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out, rng = parser.parse_args().out, random.Random(0)
    data = [Sequence(tales.encode(tales.training_text(rng, length=256, n_facts=12)[0])) for _ in range(120)]
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    gates = kvcompile.learn(model, POLICY, data, name="gated", steps=60, batch=2, lr=0.01, progress=True)
    for entry in (gates.history[0], gates.history[-1]):
        print(f"step {entry['step']}: divergence {entry['loss']:.2f}, best blocks found {entry['recall']:.0%}")
    with tempfile.TemporaryDirectory() as folder:
        path = gates.save((out or Path(folder)) / "gates.safetensors")
        print(answered("gated", {"live": path}))
    print(answered("random_tokens", {}))


if __name__ == "__main__":
    main()
