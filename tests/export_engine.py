"""Runs linalg text on the CPU through torch-mlir's execution engine: scalar loops, for meaning and not for speed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

# Out of tensors into memory, out of memory into loops, out of loops into LLVM. Results become arguments on the way.
PIPELINE = (
    "func.func(refback-generalize-tensor-pad)",
    "func.func(refback-generalize-tensor-concat)",
    "one-shot-bufferize{copy-before-write bufferize-function-boundaries "
    "function-boundary-type-conversion=identity-layout-map}",
    "buffer-results-to-out-params{modify-public-functions}",
    "func.func(refback-munge-memref-copy)",
    "func.func(convert-linalg-to-loops)",
    "func.func(lower-affine)",
    "convert-scf-to-cf",
    "func.func(refback-expand-ops-for-llvm)",
    "func.func(arith-expand)",
    "func.func(convert-math-to-llvm)",
    "convert-math-to-libm",
    "expand-strided-metadata",
    "lower-affine",
    "finalize-memref-to-llvm",
    "func.func(convert-arith-to-llvm)",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "reconcile-unrealized-casts",
)


def run(text: str, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """Call `policy_step` of a linalg module; `results` give shape and dtype of what it returns."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.execution_engine import ExecutionEngine
    from torch_mlir.passmanager import PassManager
    from torch_mlir.runtime import get_ranked_memref_descriptor

    with ir.Context() as context:
        torch_dialect.register_dialect(context)
        module = ir.Module.parse(text)
        for function in module.body:
            function.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        PassManager.parse(f"builtin.module({','.join(PIPELINE)})").run(module.operation)
        engine = ExecutionEngine(module)
        given = [t.contiguous().numpy() for t in inputs]
        made = [torch.zeros(t.shape, dtype=t.dtype).numpy() for t in results]
        pointers = [ctypes.pointer(ctypes.pointer(get_ranked_memref_descriptor(a))) for a in (*given, *made)]
        engine.invoke("policy_step", *pointers)
    return [torch.from_numpy(a) for a in made]
