"""What a forward of an optimised model refuses before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.cache import KvCache
from kvcompile.compiled import ATTENTION
from kvcompile.cuts import is_aligned
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.multimodal import beside
from kvcompile.padding import Columns


def check_positions(cache: KvCache, columns: Columns, position_ids: Tensor | None) -> None:
    """Positions are the sequence's own count; others would contradict the policy, which tests them."""
    if position_ids is None or not position_ids.is_cpu:
        return
    if position_ids.ndim == 3 and bool((position_ids == position_ids[:1]).all()):  # several axes that say the same
        position_ids = position_ids[0]
    given = position_ids.tolist() if position_ids.ndim == 2 else None
    if given is not None and len(given) == 1:  # the same for every sequence
        given *= len(columns)
    for b, (cols, seq) in enumerate(zip(columns, cache.sequences.each, strict=True)):
        expected = list(range(seq.seen, seq.seen + len(cols)))
        if given is None or [given[b][c] for c in cols if c < len(given[b])] != expected:
            raise KvCompileError(
                f"position_ids of sequence {b} are not {seq.seen} to {seq.seen + len(cols) - 1}, which its tokens are: "
                "positions of one's own come by kvcompile.Spans alone; generate() with a cache takes the whole "
                f"conversation so far ({cache.columns} columns are in this cache) and at least one new token behind "
                "it, with an attention_mask of 1 for what it has written, padding behind a finished answer included"
            )


def refuse_empty(tokens: Tensor) -> None:
    if not tokens.shape[1] or not tokens.shape[0]:
        raise KvCompileError(
            f"there is no token to run: the input is {list(tokens.shape)}; a text needs at least one new token behind "
            "what its cache has seen"
        )


def wants_hidden_states(model: Any, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("output_hidden_states")
    return bool(model.config.output_hidden_states if wanted is None else wanted)


def refuse_pieces(plan: PolicyPlan, columns: Columns, width: int) -> None:
    cut = plan.chunk is not None and any(len(c) > plan.chunk for c in columns)
    if cut or not is_aligned(columns, width):
        raise KvCompileError("output_hidden_states is not supported for prompts that are cut or padded on the right")


def refuse_beside(plan: PolicyPlan, columns: Columns, width: int, kwargs: dict[str, Any]) -> None:
    """Inputs beside the tokens: a prompt that is cut would part them from their tokens."""
    found = beside(kwargs)
    if not found:
        return
    cut = plan.chunk is not None and any(len(c) > plan.chunk for c in columns)
    if cut or not is_aligned(columns, width):
        raise KvCompileError(
            f"other inputs ({', '.join(found)}) beside a prompt that is cut into pieces or padded on the right are not "
            "supported: pad on the left, and choose a policy without `at chunk(n)` or with larger pieces"
        )


def refuse_unsupported(model: Any, config: Any, kwargs: dict[str, Any]) -> None:
    """config: the language model's own."""
    found = config._attn_implementation
    if found != ATTENTION:
        raise KvCompileError(
            f"the attention implementation was changed to {found!r} after optimize: "
            "restore the model, change it, then optimise again"
        )
    if model.training and torch.is_grad_enabled():
        raise KvCompileError("an optimised model is for inference: call model.eval(), or restore it before training")
    if kwargs.get("output_attentions"):
        raise KvCompileError("output_attentions is not supported: no attention matrix exists; restore the model first")
