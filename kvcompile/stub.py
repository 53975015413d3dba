"""What traced code sees of the cache: nothing. Keys and values pass through, no length is ever guarded on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class StubCache(Cache):
    """A cache without content: the attention operator works on the site's own tensors."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @property
    def is_compileable(self) -> bool:
        return False
