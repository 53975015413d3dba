"""Definitions that name each other, as a graph: cycles, and how much they are when written out.

Takes for each name the names that it uses, with the node of each use, and its own size; gives findings' material.
Guarantees: linear in what it is given, and never recursive, however long the chains are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcompile.dsl import ast

Edges = Mapping[str, Sequence[tuple[str, ast.Node]]]


def cycles(edges: Edges) -> list[tuple[list[str], ast.Node]]:
    """Each cycle that closes, as its names with the first one again at the end, and the use that closes it."""
    found: list[tuple[list[str], ast.Node]] = []
    done: set[str] = set()
    for start in edges:
        path: dict[str, int] = {}
        pending: list[tuple[str, int, ast.Node | None]] = [(start, 0, None)]
        while pending:
            name, depth, use = pending.pop()
            while len(path) > depth:
                path.popitem()
            if name in path and use is not None:
                found.append(([*list(path)[path[name] :], name], use))
            elif name not in done:
                done.add(name)
                path[name] = depth
                pending += [(other, depth + 1, node) for other, node in edges.get(name, ())]
    return found


def extent(node: ast.Node) -> tuple[int, int]:
    """How many nodes an expression has, and how many levels."""
    size = depth = 0
    level = [node]
    while level:
        size, depth = size + len(level), depth + 1
        level = [child for parent in level for child in parent.children()]
    return size, depth


def written_out(edges: Edges, own: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Size and depth of each definition with all names in it replaced by what they mean; those that others use come
    first. `own` is a definition's own extent. Names on a cycle, and those that use one, are left out."""
    users: dict[str, list[str]] = {}
    waiting = dict.fromkeys(own, 0)
    for name in own:
        for other, _ in edges.get(name, ()):
            users.setdefault(other, []).append(name)
            waiting[name] += 1
    total = {name: list(size) for name, size in own.items()}
    deepest = dict.fromkeys(own, 0)
    ready = [name for name, left in waiting.items() if not left]
    out: dict[str, tuple[int, int]] = {}
    while ready:
        name = ready.pop()
        size, depth = total[name][0], total[name][1] + deepest[name]
        out[name] = size, depth
        for user in users.get(name, ()):
            total[user][0] += size
            deepest[user] = max(deepest[user], depth)
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return out
