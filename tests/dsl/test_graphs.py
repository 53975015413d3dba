"""Definitions that name each other: cycles, sizes when written out, and chains of any length."""

from __future__ import annotations

from kvcompile.dsl import ast
from kvcompile.dsl.graphs import cycles, extent, written_out
from kvcompile.dsl.parser import parse_value

NODE = ast.Name("x")


def edges(**uses: str) -> dict[str, list[tuple[str, ast.Node]]]:
    return {name: [(other, ast.Name(other)) for other in used.split()] for name, used in uses.items()}


def test_each_cycle_once_with_the_use_that_closes_it() -> None:
    found = cycles(edges(a="b c", b="c", c="b", d="a d"))
    assert sorted(path for path, _ in found) == [["c", "b", "c"], ["d", "d"]]
    assert all(isinstance(use, ast.Name) and use.id == path[-1] for path, use in found)
    assert cycles(edges(a="b c", b="c", c="")) == []


def test_long_chains_need_no_recursion() -> None:
    chain = {f"s{i}": [(f"s{i + 1}", NODE)] for i in range(20_000)}
    assert cycles(chain) == []
    own = dict.fromkeys([*chain, "s20000"], (1, 1))
    assert written_out(chain, own)["s0"] == (20_001, 20_001)
    chain["s20000"] = [("s0", NODE)]
    assert [len(path) for path, _ in cycles(chain)] == [20_002]


def test_written_out_counts_every_use_and_leaves_cycles_out() -> None:
    uses = edges(a="b b", b="c c", c="", d="d", e="d a")
    sizes = written_out(uses, dict.fromkeys(uses, (3, 2)))
    assert sizes == {"c": (3, 2), "b": (9, 4), "a": (21, 6)}
    assert list(sizes) == ["c", "b", "a"]


def test_extent() -> None:
    assert extent(parse_value("4")) == (1, 1)
    assert extent(parse_value("max(1, 2 + 3)")) == (5, 3)
