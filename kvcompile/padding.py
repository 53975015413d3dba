"""Padding, kept out of the cache: which columns of a padded batch are tokens, and how they line up on the right."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError
from kvcompile.sequences import Piece

Columns = list[list[int]]  # per sequence, the columns of its real tokens, in order


def columns_of(tokens: Tensor, attention_mask: Tensor | None) -> Columns:
    """Columns of the real tokens of this call. The mask [batch, n] may also cover what was seen before.

    Raises KvCompileError for masks of more dimensions: they would hide tokens from some queries only.
    """
    batch, n = tokens.shape[:2]
    # On a device a step's one column is taken to be real: to look would mean to wait for it.
    if attention_mask is None or (n == 1 and attention_mask.device.type != "cpu"):
        return [list(range(n)) for _ in range(batch)]
    if attention_mask.ndim != 2:
        raise KvCompileError(
            f"attention_mask has {attention_mask.ndim} dimensions; only a padding mask [batch, tokens] is supported"
        )
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < n:
        raise KvCompileError(f"attention_mask {tuple(attention_mask.shape)} does not fit tokens {(batch, n)}")
    valid = attention_mask[:, -n:].bool().tolist()
    return [[i for i, real in enumerate(row) if real] for row in valid]


def gather_columns(tokens: Tensor, columns: Columns, width: int) -> Tensor:
    """Each sequence's columns side by side at the right edge, [batch, width, ...]; padding repeats column 0."""
    index = torch.zeros(len(columns), width, dtype=torch.int64)
    for b, cols in enumerate(columns):
        if cols:
            index[b, width - len(cols) :] = torch.tensor(cols)
    index = index.to(tokens.device)
    return tokens[torch.arange(len(columns), device=tokens.device)[:, None], index]


def scatter_columns(logits: Tensor, parts: Columns, pieces: list[Piece], into: Tensor | None, n: int) -> Tensor:
    """Logits [batch, width, vocabulary] of a right-aligned piece, back at their own columns: [batch, n, vocabulary]."""
    out = logits.new_zeros(logits.shape[0], n, logits.shape[2]) if into is None else into
    for b, (cols, piece) in enumerate(zip(parts, pieces, strict=True)):
        stop = logits.shape[1] - piece.peek
        if cols:
            out[b, torch.tensor(cols)] = logits[b, stop - piece.new : stop]
    return out
