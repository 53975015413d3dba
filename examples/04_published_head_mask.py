"""Head classes from a published mask: a table of one score per KV head decides which heads stay whole.

Published tables (DuoAttention's, PruLong's) hold one row per layer and one tab-separated number in 0..1 per
KV head. This example writes such a table itself and gives it to a random Llama of the same shape; with a
real model, download its table, or learn one as `06_learn_heads.py` does, and name the file in `tables=`.
"""

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompile

LAYERS, KV_HEADS = 8, 4


def write_table(path: Path, seed: int = 0) -> None:
    """A table as published: 18 decimals, saturated at both ends, a few numbers a little below zero."""
    rng = random.Random(seed)
    rows = [[min(1.0, max(-1e-4, rng.gauss(0.4, 0.5))) for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    path.write_text("".join("\t".join(f"{score:.18e}" for score in row) + "\n" for row in rows))


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=KV_HEADS, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "full_attention_heads.tsv"
        write_table(table)
        # The library's prulong keeps the best 30 % of the heads whole: 9 of 32.
        options: dict[str, Any] = {"tables": {"retrieval": table}, "n_sink": 4, "window": 60, "c": 128}
        plan = kvcompile.explain("prulong", model, prompt=512, generate=7, **options)
        print(plan)
        for name, facts in plan.to_dict()["classes"].items():
            print(f"{name}: {facts['heads']} KV heads")

        kvcompile.optimize(model, "prulong", **options)
        prompt = torch.randint(2, 256, (1, 512))
        out = model.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        for layer in range(LAYERS):
            kept = [len(positions) for positions in out.past_key_values.positions(layer)]
            print(f"layer {layer}: entries kept per KV head {kept}")


if __name__ == "__main__":
    main()
