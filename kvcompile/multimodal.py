"""Images of a multimodal model: its wrapper merges them into embeddings once, which then run as any prompt does.

Takes a call's tokens and what was given beside them; gives embeddings and the arguments that remain. Guarantees: the
wrapper's own code runs up to its language model, and no layer of that; images that a causal cache cannot hold are
refused by name before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.sites import decoder_of

KINDS = ("token_type_ids", "mm_token_type_ids")  # which tokens are images; all zero: none
WAY_OUT = "give text alone, or restore the model"


class Inputs(NamedTuple):
    """Tokens int64 [batch, n], or their embeddings [batch, n, hidden], and a forward's other arguments."""

    tokens: Tensor
    embedded: bool
    others: dict[str, Any]


class _Reached(Exception):
    """The wrapper calls its language model, with these arguments."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


def beside(kwargs: dict[str, Any]) -> list[str]:
    """The arguments that hold tensors, sorted."""
    held = {key for key, value in kwargs.items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))}
    return sorted(held - {"cache_position"})


def with_images(model: Any, forward: Callable[..., Any], inputs: Inputs) -> Inputs:
    """A multimodal model's inputs, images merged into embeddings where some are given.

    forward: the wrapper's own. Raises KvCompileError for images that are read in both directions, stand at positions
    of several axes, or reach the language model otherwise than as embeddings.
    """
    others = dict(inputs.others)
    for key in KINDS:  # not read of a single token: it is a step, which must not wait for a device
        if isinstance(others.get(key), Tensor) and (inputs.tokens.shape[1] == 1 or not bool(others[key].any())):
            del others[key]
    images = beside(others)
    if not images:
        return inputs._replace(others=others)
    name, decoder = type(model).__name__, decoder_of(model)
    if any(hasattr(module, "mrope_section") for module in decoder.modules()):
        raise KvCompileError(
            f"{name} puts images ({', '.join(images)}) at positions of several axes, and a policy's cache counts "
            f"tokens: {WAY_OUT}"
        )
    for key in KINDS:
        if key in images:
            raise KvCompileError(
                f"{name} reads images in both directions ({key}), and a policy's cache is causal: {WAY_OUT}"
            )
    merged = _merged(name, decoder, forward, inputs.tokens, inputs.embedded, others)
    return Inputs(merged, True, {key: value for key, value in others.items() if key not in images})


def _merged(
    name: str, decoder: nn.Module, forward: Callable[..., Any], tokens: Tensor, embedded: bool, others: dict[str, Any]
) -> Tensor:
    """What the wrapper hands its language model for these tokens, [batch, n, hidden]."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(kwargs)

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    given: dict[str, Any] = {}
    try:
        forward(**{"inputs_embeds" if embedded else "input_ids": tokens}, use_cache=False, **others)
    except _Reached as reached:
        given = reached.given
    finally:
        hook.remove()
    embeddings = given.pop("inputs_embeds", None)
    if not isinstance(embeddings, Tensor) or embeddings.shape[:2] != tokens.shape[:2]:
        raise KvCompileError(f"{name} does not merge images into its language model's embeddings: {WAY_OUT}")
    if _counts(given.get("position_ids"), tokens.shape[1]):
        del given["position_ids"]
    odd = beside(given)
    if odd:
        raise KvCompileError(
            f"{name} hands its language model {', '.join(odd)} beside the embeddings, which a prompt that runs in "
            f"pieces would be parted from: {WAY_OUT}"
        )
    return embeddings.to(tokens.device)


def _counts(positions: Any, n: int) -> bool:
    """Whether positions are 0 to n - 1 in every row."""
    if not isinstance(positions, Tensor) or positions.shape[-1] != n:
        return False
    return bool((positions == torch.arange(n, device=positions.device)).all())
