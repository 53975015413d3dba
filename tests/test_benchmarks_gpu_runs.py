"""How the GPU benchmarks run: what fails costs its own row, short runs come first, a resumed one goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[1] / "benchmarks" / "gpu"

CHILD = """
import os, sys, time
sys.path.insert(0, {here!r})
import apart

def measure(part, cell):
    print("what a library says")
    if cell["does"] == "dies":
        os._exit(7)
    if cell["does"] == "hangs":
        time.sleep(60)
    return {{"process": os.getpid()}}, "measured"

lost = []
well = lambda: not lost
def both(part, cell):
    lost.extend(["device"] if cell["does"] == "loses the device" else [])
    return measure(part, cell)
apart.serve(both, well, sys.stdin)
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts' own modules, found while a test runs."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(HERE))
    yield
    for name in set(sys.modules) - before:
        if str(HERE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def command(folder: None) -> ModuleType:
    """`python benchmarks/gpu`, imported."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_benchmarks", HERE / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_that_dies_hangs_or_loses_the_device_costs_no_other(folder: None) -> None:
    import apart  # type: ignore[import-not-found]

    rows = apart.Apart([sys.executable, "-c", CHILD.format(here=str(HERE))])
    ask = lambda does, seconds=30.0: rows.row("decode", {"does": does}, seconds)  # noqa: E731
    try:
        first, second = ask("runs"), ask("runs")
        assert first == second and first[1] == "measured", "one process serves row after row"
        assert ask("dies") == (None, "failed: its process ended with status 7")
        third = ask("runs")
        assert third[1] == "measured" and third[0] != first[0]
        assert ask("hangs", 1.0) == (None, "failed: it took longer than 1 s")
        lost = ask("loses the device")
        assert lost[1] == "measured"
        assert ask("runs")[0] not in (None, lost[0]), "nothing runs where the device was lost"
    finally:
        rows.end()


def test_sizes_of_a_quick_run_come_first_and_a_resumed_run_goes_on(command: ModuleType) -> None:
    parts = list(command.PARTS)
    entries = {part.name: command.fresh(part, "full", ()) for part in parts}
    order = command.in_order(parts, entries)
    assert len(order) == sum(map(len, entries.values()))
    quick = sum(len(part.cells("quick")) for part in parts)
    assert [part.name for part, _ in order[:quick]] == [p.name for p in parts for _ in p.cells("quick")]
    measured, failed = order[0][1], order[1][1]
    measured |= {"figures": {"copy": 4.2}, "status": "measured"}
    failed |= {"status": "failed: it took longer than 180 s"}
    again = {part.name: command.fresh(part, "full", entries[part.name]) for part in parts}
    left = command.in_order(parts, again)
    assert len(left) == len(order) - 1, "what failed is tried again"
    assert measured in again["copy"] and not any(entry is measured for _, entry in left)
