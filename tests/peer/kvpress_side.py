"""Runs kvpress presses on a saved model and writes what they kept; started by test_kvpress.py under another Python.

    python kvpress_side.py REQUEST.json ANSWER.json

The request names model folders, and per case a press, its parameters and prompt ids. Imports nothing of kvcompile.
"""

import json
import sys
from pathlib import Path

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def record(press, kept):
    """Replaces `press.compress` by one that also notes, per layer, which rows of the keys came through.

    Rows are found by equality of values: a press gathers, so what it keeps is bit for bit one row of what it was given
    (keys may have been rotated anew).
    AdaKVPress keeps all rows and lists those to mask in decode: they count as gone.
    """
    original = press.compress

    def compress(module, hidden_states, keys, values, attentions, kwargs):
        new_keys, new_values = original(module, hidden_states, keys, values, attentions, kwargs)
        heads = []
        for head in range(keys.shape[1]):
            same = (new_values[0, head][:, None] == values[0, head][None]).all(-1)
            if not bool((same.sum(1) == 1).all()):
                raise RuntimeError("a kept value is not exactly one of the original values")
            heads.append(set(same.int().argmax(1).tolist()))
        if getattr(module, "masked_key_indices", None) is not None:
            for _, head, place in zip(*(t.tolist() for t in module.masked_key_indices), strict=True):
                heads[head].discard(place)
        kept[module.layer_idx] = [sorted(head) for head in heads]
        return new_keys, new_values

    press.compress = compress


def run(model, case):
    """Kept positions [layer][KV head] of one case; "Outer(Inner)" wraps a press with its own parameters in another."""
    outer, _, inner = case["press"].rstrip(")").partition("(")
    params = dict(case["params"])
    if inner:
        press = getattr(kvpress, outer)(getattr(kvpress, inner)(**params.pop("inner")), **params)
    else:
        press = getattr(kvpress, outer)(**params)
    kept = {}
    # This wrapper hands each layer to the press inside, which compresses.
    record(press.press if outer == "PerLayerCompressionPress" else press, kept)
    with torch.no_grad(), press(model):
        model(torch.tensor([case["prompt"]]), past_key_values=DynamicCache())
    return [kept[layer] for layer in range(model.config.num_hidden_layers)]


def main(request_path, answer_path):
    torch.set_num_threads(1)
    request = json.loads(Path(request_path).read_text())
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        for name, folder in request["models"].items()
    }
    answer = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "kept": {case["name"]: run(models[case["model"]], case) for case in request["cases"]},
    }
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
