"""What is known of a Dynamo graph of a whole forward: its inputs with their values, sizes, places in the source.

Takes an `fx.Graph` with `example_value` in every node's meta, as Dynamo leaves it, and the tensors of its first
call. Gives `Traced`; sizes compare as expressions, so that asking never adds a guard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_ROOT = re.compile(r"^L\['\w+'\](\.__self__)?\.?")  # how Dynamo names the model that it traces
_FILLED = ("full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like", "empty_like")
VIEWS = (
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand",
    "expand_as", "broadcast_to", "getitem", "narrow", "select", "contiguous", "diagonal", "view_as",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph and its first call: `values` of every placeholder, `ids` int64 [batch, n], `positions` where it has them.

    tokens: the expression of n, a plain int where the graph holds for one length only.
    """

    module: fx.GraphModule
    values: dict[fx.Node, Any]
    ids: fx.Node
    positions: fx.Node | None

    @classmethod
    def of(cls, module: fx.GraphModule, inputs: Sequence[Any], ids: Tensor, positions: Tensor) -> Traced:
        """inputs: what the graph is called with, among them the very objects `ids` and `positions`."""
        values = dict(zip(placeholders(module.graph), inputs, strict=True))
        found = {name: [n for n, v in values.items() if v is t] for name, t in (("ids", ids), ("pos", positions))}
        if not found["ids"]:
            raise LookupError("the graph does not read its token ids")
        return cls(module, values, found["ids"][0], next(iter(found["pos"]), None))

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def batch(self) -> Any:
        return dims(self.ids)[0]

    @property
    def tokens(self) -> Any:
        return dims(self.ids)[1]

    def symbols(self) -> dict[Any, int]:
        """Every size that is free in the graph, with its value in the first call."""
        found: dict[Any, int] = {}
        for node, value in self.values.items():
            example = node.meta.get("example_value")
            if isinstance(value, Tensor) and isinstance(example, Tensor):
                found |= {e: s for e, s in zip(dims(node), value.shape, strict=True) if getattr(e, "is_symbol", False)}
            elif isinstance(example, torch.SymInt) and isinstance(value, int):
                found[example.node.expr] = value
        return found

    def follows_ids(self) -> set[fx.Node]:
        """Nodes that are worked out from the token ids or the positions: they differ from call to call."""
        found = {self.ids} | ({self.positions} if self.positions is not None else set())
        for node in self.graph.nodes:
            if not is_number(node) and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def dims(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a node's tensor: ints, and expressions where they are free. Empty where it is no tensor."""
    example = node.meta.get("example_value")
    if not isinstance(example, Tensor):
        return ()
    return tuple(_size(size) for size in example.shape)


def _size(size: int | torch.SymInt) -> Any:
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expression) if getattr(expression, "is_Integer", False) else expression  # the graph has fixed it


def is_number(node: fx.Node) -> bool:
    """Whether a node is a size, or sizes: nothing that holds data."""
    return _numbers(node.meta.get("example_value"))


def _numbers(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_numbers(part) for part in value)
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def called(node: Any) -> str:
    """The name of the function or method that a node calls; empty for anything else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def changes_in_place(node: fx.Node) -> bool:
    """Whether a call writes to its first argument."""
    name = called(node)
    wrote = name.endswith("_") and not name.endswith("__")
    return wrote or name in ("setitem", "iadd", "imul", "isub", "iand", "ior") or node.kwargs.get("out") is not None


def is_filled(node: fx.Node) -> bool:
    """Whether a call makes a tensor of one value all over."""
    return called(node).removeprefix("new_") in _FILLED


def constants(value: Any) -> Iterator[int | float]:
    """Plain numbers anywhere inside of an argument."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, slice):
        yield from constants((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from constants(part)
    elif isinstance(value, dict):
        yield from constants(tuple(value.values()))


def where(node: fx.Node) -> str:
    """The module and the line of source that a node comes from, as far as Dynamo noted them."""
    parts = []
    stack = node.meta.get("nn_module_stack")
    if stack:
        parts.append(_ROOT.sub("", str(next(reversed(stack.values()))[0])) or "the model")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    code = [line for line in lines if line and not line.startswith("File ") and line.strip("^~ ")]
    if code:
        parts.append(f"`{code[-1]}`")
    return ", ".join(parts) or f"node {node.name}"
