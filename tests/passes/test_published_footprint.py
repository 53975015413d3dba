"""The metric's published figures: the published formula to the digits, explain where no defect is in play."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from kvcompile.kernels.counts import pyramid
from kvcompile.passes.explain import explain

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = range(11)


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The published formula and the benchmark, which import each other by bare name, as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module("published_footprint"), import_module("footprint")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("published_footprint", "footprint", "_common"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("row", ROWS)
def test_the_published_formula_gives_the_published_digits(modules, row: int) -> None:
    formula, _ = modules
    assert len(formula.GOLDEN) == len(ROWS)
    setting, footprint, peak = formula.GOLDEN[row]
    found = formula.published(setting)
    assert [round(x, 7) for x in found] == [footprint, peak]


@pytest.mark.parametrize("row", range(6))
def test_explain_gives_the_rows_without_token_eviction(modules, row: int, tmp_path: Path) -> None:
    formula, benchmark = modules
    setting, footprint, peak = formula.GOLDEN[row]
    assert setting.token_sparsity == 0
    heads = 320  # 70 % of these are whole heads
    shape, table = benchmark.table(round(heads * (1 - setting.head_sparsity)), heads, tmp_path)
    found = explain(
        "prulong", shape, prompt=setting.prompt, generate=setting.answer, n_sink=setting.sink, window=setting.window,
        c=setting.piece, tables={"retrieval": table},
    )  # fmt: skip
    assert found.exact
    assert found.footprint == pytest.approx(footprint, abs=1e-6)
    assert found.peak == pytest.approx(peak, abs=1e-6)


def test_without_its_defects_the_formula_is_explain(modules, tmp_path: Path) -> None:
    """Nothing but the 64 entries and the peeked tokens tells the published figure of SnapKV in pieces from the true."""
    _, benchmark = modules
    published, corrected, naive, peeked, patched = benchmark.one_by_one(tmp_path)
    assert corrected[1:] == pytest.approx(naive[1:], abs=1e-12)
    assert peeked[1:] == pytest.approx(patched[1:], abs=1e-12)
    assert published[1] > patched[1] > naive[1]


@pytest.mark.parametrize(
    ("capacity", "published", "ours"),
    [
        (16, [28, 20, 12, 4], [28, 20, 12, 4]),
        (24, [43, 31, 19, 7], [43, 30, 18, 5]),
        (40, [40, 40, 40, 40], [40, 40, 40, 40]),
    ],
)
def test_pyramid_budgets_as_published_and_without_drift(modules, capacity, published, ours) -> None:
    formula, _ = modules
    window, prompt, layers = 4, 64, 4
    assert formula.pyramid(capacity, window, prompt, layers) == published
    found = [n + window for n in pyramid(capacity - window, layers, Fraction(20), prompt, window)]
    assert found == ours
    assert sum(found) == capacity * layers
    assert (sum(published) == capacity * layers) == (published == ours)


def test_the_page_of_results_is_what_comes_out(modules, tmp_path: Path) -> None:
    """The rows that take no time; and every measured figure is the closed form's."""
    _, benchmark = modules
    page = json.loads((BENCHMARKS / "results" / "footprint.json").read_text())
    cases = [case for case in benchmark.CASES if benchmark.GOLDEN[case.row][0].answer <= 100]
    for found in benchmark.compared(tmp_path, cases):
        (kept,) = [
            row for row in page["rows"] if (row["method"], row["setting"]) == (found["method"], found["setting"])
        ]
        for key in ("published", "recomputed", "true"):
            assert kept[key] == pytest.approx(found[key], abs=1e-12)
    assert len(page["rows"]) == len(benchmark.CASES)
    for row in page["measured"]:
        assert row["explained"]["exact"]
        assert row["measured"]["footprint"] == pytest.approx(row["explained"]["footprint"], abs=1e-12)
        assert row["measured"]["peak"] == pytest.approx(row["explained"]["peak"], abs=1e-12)
    assert (BENCHMARKS / "results" / "footprint.md").read_text() == benchmark.markdown(page)
