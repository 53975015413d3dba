"""Linear layers of a decode step by generated C++: out = x w' + bias, with each weight read once and by all threads.

Takes what `torch.nn.functional.linear` takes; gives the same to rounding, or None where the library's own is to run:
with many rows, small weights, one thread, or operands that C++ cannot read as they lie. Sums are float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kvcompile.kernels.choose import project_spec
from kvcompile.kernels.contexts_cpp import FEW
from kvcompile.kernels.cpp_backend.library import cpp_library
from kvcompile.kernels.plan import PolicyPlan

LEAST = 1 << 18  # bytes of weights below which a call is thought to cost what a second thread gains
_PLAIN = (Tensor, Parameter)  # what quantises or shards is a type of its own, with a dtype but without numbers in place
_address, _long = ctypes.c_void_p, ctypes.c_int64


class Project:
    """The kernel of one dtype, loaded."""

    __slots__ = ("_call", "_dtype")

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        call: Any = library.project
        call.argtypes = [_address] * 4 + [_long] * 3 + [ctypes.c_int]
        call.restype = None
        self._call, self._dtype = call, dtype

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """x [..., columns], weight [lines, columns], bias [lines] or None; gives [..., lines] or None."""
        if torch.compiler.is_compiling() or not self._reads(weight) or not self._reads(x):
            return None
        if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or weight.nbytes < LEAST:
            return None
        lines, columns = weight.shape
        if bias is not None and (not self._reads(bias) or bias.shape != (lines,)):  # torch spreads one number over all
            return None
        rows, threads = x.numel() // max(1, columns), torch.get_num_threads()
        if not 0 < rows <= FEW or threads == 1:
            return None
        out = x.new_empty((*x.shape[:-1], lines))
        at = None if bias is None else bias.data_ptr()
        self._call(x.data_ptr(), weight.data_ptr(), at, out.data_ptr(), rows, lines, columns, threads)
        return out

    def _reads(self, tensor: Tensor) -> bool:
        if type(tensor) not in _PLAIN or tensor.dtype is not self._dtype or tensor.layout is not torch.strided:
            return False
        return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


def project_of(plan: PolicyPlan) -> Project | None:
    """The kernel for a plan's dtype; None where it cannot be built here."""
    library = cpp_library(plan).find(project_spec)
    return None if library is None else Project(library, getattr(torch, plan.facts.dtype))
