"""Whether an attention mask in a Dynamo graph is the causal one, for every length that can be asked for.

Takes the mask's node; gives the reason why it is not, or None, and the nodes that only masks need. A mask must follow
from sizes, positions and stored tensors alone; it is carried out at several lengths, among them one beyond the reach
of every number that it is made with, and with all of every stored mask, and compared with the triangle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from kvcompile.passes.traced import VIEWS, Traced, called, changes_in_place, constants, is_number

FARTHEST = 4096  # numbers above this in a mask's source would take too large a triangle to try
LARGEST = 16384  # side of the largest stored mask that is looked at as a whole
LISTED = 1024  # elements of the largest stored tensor whose values may be such numbers
HIDDEN = -1e4  # a float mask that adds this or less to a logit hides the entry


def refusal(traced: Traced, mask: fx.Node) -> str | None:
    """Why a mask is not provably the causal one; None where it is."""
    nodes = mask_nodes(traced, mask)
    if traced.ids in nodes:
        return "depends on the token ids"
    outside = [n for n in nodes if n.op == "placeholder" and isinstance(traced.values[n], Tensor)]
    stored = [n for n in outside if n is not traced.positions]
    if any(changes_in_place(n) and n.args and n.args[0] in stored for n in nodes):
        return "is a stored tensor that the forward writes to"
    lengths = _lengths(traced, nodes, stored)
    if isinstance(lengths, str):
        return lengths
    now = int(traced.values[traced.ids].shape[1])
    longest = min((max(traced.values[n].shape) for n in stored if traced.values[n].numel() > 1), default=LARGEST)
    for n in lengths:
        try:
            found = _carry_out(traced, nodes, mask, n)
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError) as error:
            return f"could not be worked out for {n} tokens: {str(error).splitlines()[0]}"
        if not isinstance(found, Tensor) or found.ndim < 2 or found.shape[-2:] != (n, n):
            if n > max(longest, now):  # the stored mask ends before: so does the model
                continue
            return f"is no mask of {n} by {n} for {n} tokens"
        if not _is_triangle(found):
            return f"is not the causal mask for {n} tokens"
    return None


def mask_nodes(traced: Traced, mask: fx.Node) -> list[fx.Node]:
    """All that a mask is worked out from, and what writes to it before it is read, in the order of the graph."""
    order = {node: at for at, node in enumerate(traced.graph.nodes)}
    reader = min((order[user] for user in mask.users if called(user).startswith("scaled_dot")), default=len(order))
    found: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if not is_number(node):  # a size is a size, however the forward came by it
            waiting += [
                source for source in node.all_input_nodes if not is_number(source) and source is not _kind(node)
            ]
        if node.op != "placeholder":
            waiting += [writer for writer in _writers(node) if order[writer] < reader]
    return sorted(found, key=order.__getitem__)


def _kind(node: fx.Node) -> Any:
    """The argument of which a call takes the dtype and the device only; None where there is none."""
    if called(node) == "type_as":
        return node.args[1]
    return node.args[0] if called(node).startswith("new_") else None


def _writers(node: fx.Node) -> list[fx.Node]:
    """Calls that change a node's tensor in place, by itself or through a view of it."""
    found, aliases, seen = [], [node], {node}
    while aliases:
        alias = aliases.pop()
        for user in alias.users:
            if user in seen or not user.args or user.args[0] is not alias:
                continue
            seen.add(user)
            if changes_in_place(user):
                found.append(user)
            if changes_in_place(user) or called(user) in VIEWS:
                aliases.append(user)
    return found


def _lengths(traced: Traced, nodes: list[fx.Node], stored: list[fx.Node]) -> list[int] | str:
    """The lengths to try; a reason where there are none that would tell."""
    now = int(traced.values[traced.ids].shape[1])
    if isinstance(traced.tokens, int):  # this graph runs for no other length
        return [now]
    numbers = sorted(_numbers(traced, nodes), reverse=True)
    near = numbers[0] if numbers else 0
    if near > FARTHEST:
        return f"has the number {near} in it, too large to try whether it is a window"
    if len(numbers) > 1:  # so many blocks of so many tokens
        near = max(near, min(FARTHEST, numbers[0] * numbers[1]))
    sides = {side for node in stored for side in traced.values[node].shape if side > 1}
    if max(sides, default=0) > LARGEST:
        return f"is stored for {max(sides)} tokens, too many to look at"
    return sorted({now, now + 1, 2 * near + 2, 2 * now + 33, *sides})


def _numbers(traced: Traced, nodes: list[fx.Node]) -> Iterator[int]:
    """Sizes of the numbers in a mask's source and in the small tensors that are stored for it; each may be a window."""
    for node in nodes:
        found = list(constants((node.args, node.kwargs)))
        value = traced.values.get(node)
        if isinstance(value, Tensor) and node is not traced.positions and value.numel() <= LISTED:
            found += value.double().flatten().tolist()
        for number in found:
            if number == number and number > HIDDEN and abs(number) < 2**31 - 1:  # else it hides, or is no end
                yield int(abs(number))


def _carry_out(traced: Traced, nodes: list[fx.Node], mask: fx.Node, n: int) -> Any:
    """The mask for n tokens, worked out by the graph's own calls."""
    sizes = {**traced.symbols(), traced.tokens: n}
    device = traced.values[traced.ids].device
    known: dict[fx.Node, Any] = {}

    def argument(value: Any) -> Any:
        if not isinstance(value, fx.Node) or value in known:
            return known[value] if isinstance(value, fx.Node) else value
        example = value.meta["example_value"]
        return _size(example, sizes) if is_number(value) else torch.empty(0, dtype=example.dtype, device=device)

    with torch.no_grad():
        for node in nodes:
            if is_number(node):
                continue
            args, kwargs = map_aggregate(node.args, argument), map_aggregate(node.kwargs, argument)
            if node is traced.positions:
                batch = traced.values[traced.ids].shape[0]
                known[node] = torch.arange(n, device=device).expand(batch, n)
            elif node.op == "placeholder":
                known[node] = traced.values[node]
            elif node.op == "get_attr":
                known[node] = functools.reduce(getattr, str(node.target).split("."), traced.module)
            elif node.op == "call_method":
                method: Any = getattr(args[0], str(node.target))
                known[node] = method(*args[1:], **kwargs)
            else:
                function: Any = node.target
                known[node] = function(*args, **kwargs)
    return known[mask]


def _size(value: Any, sizes: dict[Any, int]) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.subs(sizes))
    if isinstance(value, (tuple, list)):
        return type(value)(_size(part, sizes) for part in value)
    return value


def _is_triangle(mask: Tensor) -> bool:
    n = mask.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == lower).all())
    return mask.is_floating_point() and bool(((mask == 0) == lower).all()) and bool((mask <= HIDDEN).eq(~lower).all())
