"""Attention of a piece by generated C++: with a past or without, each KV head with its own first entries and window.

Takes q [B, Hq, M, D] and k, v [B, Hkv, M, D] of one dtype, the last dimension contiguous; gives [B, M, Hq, D].
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kvcompile.kernels.cpp_backend.build import load
from kvcompile.kernels.cpp_backend.library import built
from kvcompile.kernels.cpp_backend.site import c_site
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.render import Header, render
from kvcompile.kernels.roofline import Traffic
from kvcompile.kernels.spec import KernelSpec

_POINTERS = ("q", "k", "v", "out", "lse", "first", "window", "sink")
_NUMBERS = ("batch", "kv_heads", "columns", "reach")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Piece(ctypes.Structure):
    """`struct Piece` of templates/prefill.cpp.jinja, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in "qkv"),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    ]


@cache
def standalone(group: int, head_dim: int, dtype: str, variant: frozenset[str] = frozenset()) -> ctypes.CDLL:
    """The kernel of a shape without a plan; variant: softcap, sinks, sliding.

    Raises:
        NoCompiler: there is none.
    """
    facts: dict[str, int | str] = {"group": group, "head_dim": head_dim, "dtype": dtype}
    spec = KernelSpec.of("prefill", None, "_".join(sorted(variant)), **facts, **dict.fromkeys(sorted(variant), True))
    header = Header("none", "any layer of this shape", (), Traffic(()), ())
    return load(render(spec, header, "cpp"), built())


def read(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    site: Site | None = None,
    first: Tensor | None = None,
    window: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float = 0.0,
    reach: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """One call of a kernel, zeros where no token is. Without a site all columns are tokens, from position 0 on.

    first, window int32 [B * Hkv]: a row's queries read positions below `first` and the `window` newest up to their
    own; window 0, or None: all. sink float32 [Hq], cap and reach as the kernel's variant has them.
    lse float32 [B, Hq, M], contiguous, is filled: of each query's logits, natural.
    """
    batch, heads, columns, size = q.shape
    out = q.new_zeros(batch, columns, heads, size)
    given = {"lse": lse, "first": first, "window": window, "sink": sink}
    piece = piece_of(q, k, v, out, scale, cap=cap, reach=reach, **given)
    past = None if site is None else ctypes.byref(c_site(site, k.shape[1]))
    clock = None if site is None else ctypes.c_void_p(site.clock.data_ptr())
    library.prefill(ctypes.byref(piece), past, clock, torch.get_num_threads())
    return out


def piece_of(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, *, cap: float = 0.0, reach: int = 0,
    **beside: Tensor | None,
) -> Piece:  # fmt: skip
    """A call's tensors by address, `beside` those of `read`; it owns nothing."""
    given = {"q": q, "k": k, "v": v, "out": out, **beside}
    at = {name: None if t is None else t.data_ptr() for name, t in given.items()}
    strides = {f"{n}_strides": (ctypes.c_int64 * 3)(*t.stride()[:3]) for n, t in (("q", q), ("k", k), ("v", v))}
    sizes = {"batch": q.shape[0], "kv_heads": k.shape[1], "columns": q.shape[2]}
    return Piece(**at, **strides, **sizes, reach=reach, scale=scale, cap=cap)


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, window: Tensor, scale: float) -> Tensor:
    """Causal attention whose KV heads each read their own part: [B, n, Hq, D] in q's dtype.

    q [B, Hq, n, D]; k, v [B, Hkv, n, D]; sink, window int32 [Hkv]: the query at p reads positions below `sink` and
    those beyond p - window, up to its own; window 0: all. Dense heads stay here: they take 0.7 of flash attention's
    time in torch (one thread, 2048 tokens, head_dim 64 and 128, float32 and bfloat16).

    Raises:
        NoCompiler: there is none.
        KvCompileError: the shapes do not fit, or the dtypes or devices.
    """
    batch, heads, n, size = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads or sink.shape != (kv_heads,) or window.shape != (kv_heads,):
        raise KvCompileError(
            f"{heads} query heads, {kv_heads} KV heads, sink {list(sink.shape)} and window {list(window.shape)} do not"
            " fit: give one sink and one window for each KV head, and a multiple of them as query heads"
        )
    shape = (batch, kv_heads, n, size)
    if k.shape != shape or v.shape != shape or q.dtype not in _DTYPES or any(t.dtype != q.dtype for t in (k, v)):
        told = ", ".join(f"{name} {list(t.shape)} of {t.dtype}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise KvCompileError(f"{told} do not fit: k and v have to be {list(shape)}, all of one of {_DTYPES}")
    if any(t.device.type != "cpu" for t in (q, k, v, sink, window)):
        raise KvCompileError("the C++ kernel reads tensors in the CPU's memory: move them there with .cpu()")
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    library = standalone(heads // kv_heads, size, str(q.dtype).removeprefix("torch."))
    first, near = (t.to(torch.int32).repeat(batch) for t in (sink, window))
    return read(library, q, k, v, scale, first=first, window=near)
