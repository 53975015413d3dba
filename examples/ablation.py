"""Which KV heads carry the memory: each one alone is made local, and the rise of the answers' loss is its score.

Takes a model folder; writes one score in [0, 1] per KV head, a row per layer, tab between heads: the layout
that a head class reads with `table("heads.tsv", top=...)`. Nothing is evicted here: a plain forward gets one
attention mask per KV head, so the table does not depend on the compiler that later uses it.

    python examples/ablation.py --model examples/recall_model --out examples/recall_model/heads.tsv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from kvcompile.evaluation import tales as data

SINK, WINDOW = 4, 60  # what a local head reads: the first tokens and the newest


def head_mask_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    local_heads: torch.Tensor,
    local_width: int = SINK + WINDOW,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in which the KV heads marked in `local_heads` [layers, KV heads] read sink and window only.

    Query [batch, heads, n, channels], key and value with KV heads; returns [batch, n, heads, channels].
    A window of `local_width - SINK` counts the query itself.
    """
    local = local_heads[module.layer_idx]
    if not local.any():
        mask = None
    else:
        position = torch.arange(query.shape[2])
        causal = position[None, :] <= position[:, None]
        near = (position[None, :] > position[:, None] - (local_width - SINK)) | (position[None, :] < SINK)
        mask = causal & (near | ~local.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None])
    out = functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def load(folder: Path) -> PreTrainedModel:
    """The model of `folder`, with attention that takes `local_heads` and `local_width` as forward arguments."""
    AttentionInterface.register("head_mask", head_mask_attention)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="head_mask").eval()


@torch.no_grad()
def recall(
    model: PreTrainedModel, asked: list[data.Prompt], local_heads: torch.Tensor, local_width: int = SINK + WINDOW
) -> tuple[float, float]:
    """Mean loss of the answer (nats) and share of right answers, with the marked heads local in the whole forward."""
    loss, right = 0.0, 0
    for prompt in asked:
        ids = torch.tensor([data.encode([data.BOS, *prompt.text.split()])])
        out = model(ids, use_cache=False, logits_to_keep=1, local_heads=local_heads, local_width=local_width)
        logits = out.logits[0, -1]
        answer = data.INDEX[prompt.answer]
        loss += functional.cross_entropy(logits, torch.tensor(answer)).item()
        right += int(logits.argmax() == answer)
    return loss / len(asked), right / len(asked)


def main() -> None:
    here = Path(__file__).parent / "recall_model"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=here)
    parser.add_argument("--out", type=Path, default=here / "heads.tsv")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=640)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.model)
    asked = data.prompts(options.prompts, options.length, seed=2)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    none = torch.zeros(layers, heads, dtype=torch.bool)
    base, right = recall(model, asked, none)
    print(f"all heads whole: loss {base:.4f}, right {right:.3f}")
    rise = torch.zeros(layers, heads, dtype=torch.float64)
    for layer, head in track([(i, j) for i in range(layers) for j in range(heads)], description="one head local"):
        one = none.clone()
        one[layer, head] = True
        loss, right = recall(model, asked, one)
        rise[layer, head] = max(0.0, loss - base)
        print(f"layer {layer} KV head {head} local: loss {loss:.4f}, right {right:.3f}")
    loss, right = recall(model, asked, ~none)
    print(f"all heads local: loss {loss:.4f}, right {right:.3f}")
    scores = rise / rise.max()
    options.out.write_text("".join("\t".join(f"{x:.6f}" for x in row) + "\n" for row in scores.tolist()))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
