"""What every launcher takes: the paged pools, by the names of `layout.Site`, and their one error."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvcompile.kernels.errors import KvCompileError

NAMES = ("k", "v", "pos", "frozen", "state", "table", "length", "free", "top")


class PagedPools(Protocol):
    """Device tensors; `layout.Site` in its paged layout is one.

    k, v [slots, D]; pos int32 [slots]; frozen uint8 [slots]; state float32 [states, slots]; table int32
    [rows, pages]; length int32 [rows]; free int32 [pages], a stack of free pages; top int32 [1], its height.
    """

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def pos(self) -> Tensor: ...
    @property
    def frozen(self) -> Tensor: ...
    @property
    def state(self) -> Tensor: ...
    @property
    def table(self) -> Tensor: ...
    @property
    def length(self) -> Tensor: ...
    @property
    def free(self) -> Tensor: ...
    @property
    def top(self) -> Tensor: ...


def tensors(pools: PagedPools) -> dict[str, Tensor]:
    """The pools as keyword arguments of a launch."""
    return {name: getattr(pools, name) for name in NAMES}


def refuse_overrun(pools: PagedPools) -> None:
    """Raise if a kernel found no page for an entry. Reads one number back: call it between forwards, not in one."""
    if int(pools.top) < 0:
        raise KvCompileError("the KV pools were smaller than what the policy's plan asked for; entries were lost")
