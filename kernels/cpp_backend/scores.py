"""Calls what follows the attention of a piece in generated C++: columns, keys, pooling, winners.

Takes some rows of one layer as `evaluate.Rows` has them, one batch whose heads they are; gives torch tensors.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

Library = ctypes.CDLL
_POINTERS = ("q", "k", "pos", "qpos", "sink", "lse", "out")
_NUMBERS = ("batch", "kv_heads", "n", "queries", "parts", "reach")
_SIZES = ctypes.c_int64 * 3


class _Columns(ctypes.Structure):
    """`struct Columns` of templates/columns.cpp.jinja, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_strides", _SIZES) for name in "qk"),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    ]


def columns(
    library: Library, q: Tensor, k: Tensor, pos: Tensor, qpos: Tensor, scale: float, *, cap: float = 0.0,
    sink: Tensor | None = None, reach: int = 0,
) -> Tensor:  # fmt: skip
    """float32 [B, Hkv, N]: what the queries say about every entry.

    q [B, Hq, W, D] and k [B, Hkv, N, D]; pos int32 [B, Hkv, N], -1 where no entry is; qpos int32 [B, W], -1 where no
    query is; cap, reach and sink float32 [Hq] as the kernel's variant has them.
    """
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    pos, qpos, sink = pos.contiguous(), qpos.contiguous(), None if sink is None else sink.float().contiguous()
    (batch, heads, queries, _), (_, kv_heads, n, _), threads = q.shape, k.shape, torch.get_num_threads()
    parts = -(-4 * threads // (batch * kv_heads))
    lse, out = torch.empty(batch, heads, parts, queries), torch.empty(batch, kv_heads, n)
    given = {"q": q, "k": k, "pos": pos, "qpos": qpos, "sink": sink, "lse": lse, "out": out}
    call = _Columns(
        **{name: None if t is None else t.data_ptr() for name, t in given.items()},
        q_strides=_SIZES(*q.stride()[:3]), k_strides=_SIZES(*k.stride()[:3]), batch=batch, kv_heads=kv_heads, n=n,
        queries=queries, parts=parts, reach=reach, scale=scale, cap=cap,
    )  # fmt: skip
    library.columns(ctypes.byref(call), threads)
    return out


def keys(library: Library, k: Tensor, pos: Tensor) -> Tensor:
    """float32 [B, Hkv, N]: the score of every key. k [B, Hkv, N, D]; pos int32 [B, Hkv, N]."""
    k, pos = k if k.stride(3) == 1 else k.contiguous(), pos.contiguous()
    batch, kv_heads, n, _ = k.shape
    out = torch.empty(batch, kv_heads, n)
    library.keys(
        _at(k), ctypes.byref(_SIZES(*k.stride()[:3])), _at(pos), _at(out), *_long(batch, kv_heads, n),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def pool(library: Library, score: Tensor, pos: Tensor, candidates: Tensor) -> Tensor:
    """float32 [R, N]: the row's stage of a score, 0 outside `candidates`.

    score float32, pos int32, candidates bool or uint8, all [R, N], columns in position order.
    """
    score, pos, candidates = (t.contiguous() for t in (score, pos, candidates))
    out = torch.empty_like(score)
    library.pool(_at(score), _at(pos), _at(candidates), _at(out), *_long(*score.shape), torch.get_num_threads())
    return out


def select(library: Library, scores: Tensor, candidates: Tensor, pos: Tensor, wanted: Tensor, heads: Tensor) -> Tensor:
    """The winners of each group: bool [R, N].

    scores float32, candidates bool, pos int32, all [R, N]; wanted int64 [R]: how many, per head; heads int32
    [groups, HEADS]: which rows decide together, -1 where there are fewer. Rows that no group names win nothing.
    """
    scores, candidates, pos, wanted, heads = (t.contiguous() for t in (scores, candidates, pos, wanted, heads))
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    library.select_best(
        *map(_at, (scores, candidates, pos, wanted, heads, keep)), *_long(1, *scores.shape, len(heads)),
        torch.get_num_threads(),
    )  # fmt: skip
    return keep


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
