"""Who carries out attention, and how much torch.compile does behind the graph pass.

Takes what was asked for and the device on which attention runs; gives names. KvCompileError where they do not fit.
"""

from __future__ import annotations

import os

import torch

from kvcompile.compiled import INNER
from kvcompile.kernels.cpp_backend.build import tell
from kvcompile.kernels.errors import NO_TRITON, KvCompileError
from kvcompile.kernels.offline import has_triton

BACKENDS = ("auto", "reference", "cpu", "triton")
# docs/architecture.md has the figures behind these; `triton` has not been measured yet.
AUTO = {"reference": "off", "cpu": "off", "triton": "eager"}
# What runs inside a captured step.
GRAPHED = {"cudagraph": "eager", "cudagraph+inductor": "inductor"}


def backend_for(backend: str, device: torch.device) -> str:
    """The backend that carries out attention on a device: what was asked for, or what `auto` means there."""
    if backend not in BACKENDS:
        raise KvCompileError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cuda" and not has_triton():
            tell(f"backend 'auto' runs the reference, which is slow: {NO_TRITON}")
            return "reference"
        return "triton" if device.type == "cuda" else "cpu"
    if backend == "triton" and not has_triton():
        raise KvCompileError(f"backend 'triton': {NO_TRITON}")
    if backend == "cpu" and device.type != "cpu":
        raise KvCompileError(f"backend 'cpu' with a model on {device}: use 'triton' or 'reference'")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise KvCompileError(
            "backend 'triton' with a model on cpu: use 'cpu', move the model to a GPU, or set TRITON_INTERPRET=1 "
            "to run its kernels slowly on Triton's interpreter"
        )
    return backend


def inner_for(compile: str, backend: str) -> str:
    """torch.compile's inner backend, one of `compiled.INNER`, for what was asked for."""
    known = ("auto", *INNER, *GRAPHED)
    if compile not in known:
        raise KvCompileError(f"unknown compile={compile!r}: one of {', '.join(known)}")
    if compile == "auto":
        return AUTO[backend]
    return GRAPHED.get(compile, compile)
