"""Whether a step passes between host and device: every operator that would wait for a GPU, watched on the CPU.

The interpreter reads its arguments on the host, so a kernel's launch is not looked into; all else of a step is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from kvcompile.kernels import ops

# Each gives the host a value, or a shape that follows from values.
_READS = frozenset(
    {
        "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::nonzero_static",
        "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
        "aten::bincount", "aten::repeat_interleave.Tensor", "aten::allclose", "aten::isin",
    }
)  # fmt: skip
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class HostRead(AssertionError):
    """A captured step would fail here."""


class NoHostReads(TorchDispatchMode):
    """Raises `HostRead` at an operator that a CUDA graph cannot hold; looks into our own operators as well."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled layers run under this mode as they are."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        full = f"{name}.{func._schema.overload_name}" if func._schema.overload_name else name
        if name in _READS or full in _READS:
            raise HostRead(f"{full} gives the host a device value")
        if name in _INDEXED and any(_masks(index) for index in args[1]):
            raise HostRead(f"{full} by a mask: its shape follows from values")
        if name == "aten::_to_copy" and (kwargs or {}).get("device") is not None:
            raise HostRead(f"{full} passes between host and device")
        if name == "aten::lift_fresh":
            raise HostRead("torch.tensor hands the device numbers of the host")
        if name.startswith("kvc::"):
            with self:
                return ops._SCHEMAS[name.removeprefix("kvc::")][1](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _masks(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _refused(name: str) -> Any:
    def read(*_: Any, **__: Any) -> None:
        raise HostRead(f"Tensor.{name} gives the host device values")

    return read


# These reach no operator where the tensor is on the host already.
_METHODS = ("tolist", "numpy", "cpu", "__array__")


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Inside, `HostRead` is raised wherever a step would wait for a device or hand it something from the host."""
    launch = GridExecutor.__call__

    def unwatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _methods(_OWN), _disable_current_modes():
            return launch(self, *args, **kwargs)

    GridExecutor.__call__ = unwatched  # type: ignore[method-assign]
    try:
        with _methods({name: _refused(name) for name in _METHODS}), NoHostReads():
            yield
    finally:
        GridExecutor.__call__ = launch  # type: ignore[method-assign]


_OWN = {name: getattr(Tensor, name) for name in _METHODS}


@contextmanager
def _methods(some: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(Tensor, name) for name in some}
    try:
        for name, method in some.items():
            setattr(Tensor, name, method)
        yield
    finally:
        for name, method in before.items():
            setattr(Tensor, name, method)
