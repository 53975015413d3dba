"""Whether a traced forward counts positions by itself, so that it would start from 0 in each of several calls.

Takes a traced forward; gives the place in the source, or None. What it cannot
see (positions made from the ids' own values) is left to a trial run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from kvcompile.passes.traced import VIEWS, Traced, called, dims, is_filled, is_number, where


def counts_positions(traced: Traced, unread: Collection[fx.Node]) -> str | None:
    """The call that makes positions, or takes stored ones, from the number of tokens alone; None where there is none.

    unread: nodes that do not run, such as those of masks that have gone.
    """
    if isinstance(traced.tokens, int):
        return None
    follows = traced.follows_ids()
    for node in traced.graph.nodes:
        if node.op not in ("call_function", "call_method") or node in follows or node in unread or not dims(node):
            continue
        takes = called(node) == "getitem" or called(node) not in VIEWS
        if takes and not is_filled(node) and any(_asks(part, traced) for part in (node.args, node.kwargs.values())):
            return where(node)
    return None


def _asks(value: Any, traced: Traced) -> bool:
    """Whether an argument has the number of tokens in it."""
    if isinstance(value, fx.Node):
        example = value.meta.get("example_value")
        expression = getattr(getattr(example, "node", None), "expr", None)
        return is_number(value) and traced.tokens in getattr(expression, "free_symbols", ())
    if isinstance(value, slice):
        return any(_asks(part, traced) for part in (value.start, value.stop, value.step))
    return not isinstance(value, (str, bytes)) and hasattr(value, "__iter__") and any(_asks(p, traced) for p in value)
