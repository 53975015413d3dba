"""Evaluations: from policies to cells and critical footprints, as text, JSON and CSV."""

import csv
import json

import pytest

from kvcompile.dsl.diagnostics import PolicyError
from kvcompile.evaluation.critical import critical_footprint
from kvcompile.evaluation.evaluate import cases_of, evaluate
from kvcompile.evaluation.sweep import Case
from kvcompile.kernels.errors import KvCompileError
from tests.evaluation.shipped import FOLDER, Ragged, shipped

OWN = """
policy mine(window=12, c=32):
    keep sink(2) | recent(window)
    at chunk(c), step
"""


def evaluated(policies, **options):
    model, tokenizer = shipped()
    asked = {"length": 128, "count": 2, "tokenizer": tokenizer, "suite": "recall_later"} | options
    return evaluate(model, policies, asked.pop("suite"), **asked)


@pytest.fixture(scope="module")
def evaluation():
    return evaluated(
        ["snapkv_chunked", OWN], budgets=["30%", 0.6, 1], chunks=[32], seeds=(0, 1), count=3, params={"observe": 8}
    )


def test_policies_times_budgets_beside_full_attention(evaluation):
    assert evaluation.full == "full"
    labels = [(c.label, c.budget, c.chunk, c.seed) for c in evaluation.cells]
    pairs = [("full", None, None)] + [(p, b, 32) for p in ("snapkv_chunked", "mine") for b in (0.3, 0.6, 1.0)]
    assert labels == [(*pair, seed) for pair in pairs for seed in (0, 1)]
    snap = [c for c in evaluation.cells if c.label == "snapkv_chunked" and c.seed == 0]
    assert [c.params["ratio"] for c in snap] == ["30%", "60%", "100%"]
    assert [c.params["observe"] for c in snap] == ["8"] * 3
    assert [c.footprint for c in snap] == sorted(c.footprint for c in snap)


def test_critical_footprints_follow_from_the_cells(evaluation):
    found = {s.label: s for s in evaluation.critical()}
    assert set(found) == {"snapkv_chunked", "mine"}
    for label, spread in found.items():
        for seed, critical in spread.each:
            points = [(c.footprint, c.score) for c in evaluation.cells if c.label == label and c.seed == seed]
            (full,) = [c.score for c in evaluation.cells if c.label == "full" and c.seed == seed]
            assert critical == critical_footprint(points, full, 0.9)


def test_files_hold_it_all_and_name_no_folder(evaluation, tmp_path):
    paths = evaluation.save(tmp_path / "new" / "folder")
    data = json.loads(paths[0].read_text())
    assert len(data["cells"]) == 14 and data["full"] == "full" and data["threshold"] == 0.9
    assert data["config"]["versions"]["torch"] and data["config"]["machine"]["cores"]
    assert data["config"]["suites"] == [{"name": "recall_later", "version": 1}]
    assert len(data["critical"]) == 2 and data["cells"][-1]["relative"] is not None
    with paths[1].open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 14
    for row, cell in zip(rows, evaluation.cells, strict=True):
        assert (row["label"], float(row["footprint"]), float(row["score"])) == (cell.label, cell.footprint, cell.score)
    text = paths[0].read_text() + paths[1].read_text()
    assert str(FOLDER) not in text and str(tmp_path) not in text
    assert sorted(p.name for p in paths[0].parent.iterdir()) == ["results.csv", "results.json"]


def test_as_text(evaluation):
    text = str(evaluation)
    assert "recall_later, 128 tokens, 3 samples of 2 seeds each" in text
    assert "snapkv_chunked, pieces of 32" in text and "critical footprint" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("  full")]
    assert lines[0][:2] == ["full", "-"] and "1.000" in lines[0]


def test_a_skipped_case_is_shown():
    text = str(evaluated("snapkv", budgets=["10%"]))
    assert "skipped" in text and "this count is -52" in text


def test_keep_all_among_the_policies_is_full_attention():
    found = evaluated(["keep_all", "streaming"], budgets=[0.5], chunks=None)
    assert found.full == "keep_all" and [c.label for c in found.cells] == ["keep_all", "streaming"]
    assert found.cells[0].budget is None


def test_cases_of_ones_own_and_a_suite_object():
    case = Case("wide", OWN, {"window": 100})
    found = evaluated([case, OWN], suite=Ragged(), threshold=0.5)
    assert [c.label for c in found.cells] == ["full", "wide", "mine"]
    assert found.cells[1].params["window"] == "100" and found.cells[2].params["window"] == "12"
    assert found.cells[1].footprint > found.cells[2].footprint


def test_parameters_and_tables_go_to_the_policies_that_have_them():
    given = {"retrieval": FOLDER / "heads.tsv"}
    cases = cases_of(["snapkv", "prulong", "keep_all"], ["30%"], params={"observe": 8, "n_sink": 2}, tables=given)
    assert [(c.label, dict(c.params), dict(c.tables), c.budget) for c in cases] == [
        ("snapkv", {"observe": 8}, {}, 0.3), ("prulong", {"n_sink": 2}, given, 0.3), ("keep_all", {}, {}, None),
    ]  # fmt: skip
    with pytest.raises(KvCompileError, match="has a parameter or a table `obsrve`"):
        cases_of(["snapkv"], params={"obsrve": 8})
    with pytest.raises(KvCompileError, match="table `retrieval`"):
        cases_of(["snapkv"], tables=given)
    with pytest.raises(PolicyError, match="K109"):
        cases_of(["snapkv"], params={"observe": "30%"})
    with pytest.raises(KvCompileError, match="two policies are called `snapkv`"):
        cases_of(["snapkv", "snapkv"])
    with pytest.raises(PolicyError, match="did you mean `snapkv`"):
        cases_of("snapvk")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 2000}, "longer than the model's 1024 positions"),
        ({"length": []}, "at least one length"),
        ({"count": 0}, "at least one"),
        ({"seeds": ()}, "at least one"),
        ({"threshold": 0}, "threshold"),
        ({"budgets": [1.5]}, "outside of"),
        ({"suite": "recal"}, "nearest is `recall`"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(KvCompileError, match=said):
        evaluated("snapkv", **options)


def test_a_model_without_a_folder_needs_a_tokenizer():
    from tests.models import random_model

    with pytest.raises(KvCompileError, match="give tokenizer="):
        evaluate(random_model("llama64"), "streaming", "recall", length=128, count=1)
