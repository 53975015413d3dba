"""The linear layers of an optimised model on the CPU: in a forward of few rows by generated C++, else as they were.

Takes a model's decoder layers and its output layer; puts a forward into each `nn.Linear` among them, which `restore`
takes away again. Guarantees: weights stay where and what they are; a layer that somebody else has changed, by a type,
a forward or accelerate's hooks of its own, is left alone; what is watched or is to have gradients runs as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kvcompile.compiled import no_copies
from kvcompile.kernels.cpp_backend.project import Project
from kvcompile.replacing import Replaced, replace


class Projections:
    """The kernel of a model's linear layers, and whether a forward of the model runs that may take it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.on = False

    @contextmanager
    def during(self, on: bool) -> Iterator[None]:
        """A forward; on: nothing watches it."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def put_into(self, modules: Iterable[nn.Module]) -> list[Replaced]:
        """Forwards for the linear layers among these modules and their parts."""
        found = dict.fromkeys(part for module in modules for part in module.modules() if _is_plain(part))
        return [replace(module, _Projection(self, module)) for module in found]


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module) and not hasattr(module, "_hf_hook")


class _Projection:
    """Stands in a linear layer's `forward`."""

    __slots__ = ("module", "plain", "projections")

    def __init__(self, projections: Projections, module: nn.Module) -> None:
        self.projections, self.module, self.plain = projections, module, module.forward

    def __call__(self, input: Tensor) -> Tensor:
        if self.projections.on and not torch.is_grad_enabled():
            module: Any = self.module
            out = self.projections.project(input, module.weight, module.bias)
            if out is not None:
                return out
        return self.plain(input)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()
