"""Sweeps: finished cells are read, interrupted ones go on, what cannot run says why, workers give the same."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kvcompile.dsl import PolicyError
from kvcompile.evaluation import running
from kvcompile.evaluation.answering import answer
from kvcompile.evaluation.budgets import Unfit
from kvcompile.evaluation.cells import SKIPPED
from kvcompile.evaluation.samples import suite
from kvcompile.evaluation.sweep import Case, sweep
from kvcompile.kernels.errors import KvCompileError
from tests.evaluation.shipped import FOLDER, Ragged, shipped
from tests.oracle_states import trained_heads

CASES = (
    Case("full", "keep_all"),
    Case("snap", "snapkv_chunked", {"observe": 8}, budget=0.3, chunk=32),
    Case("snap", "snapkv_chunked", {"observe": 8}, budget=0.6, chunk=32),
    Case("prulong", "prulong", {"n_sink": 2, "window": 12}, {"retrieval": FOLDER / "heads.tsv"}, 0.3, 32),
)


def swept(cases=CASES, suites=None, **options):
    model, tokenizer = shipped()
    asked = {"lengths": [128], "count": 2, "seeds": (0, 1), "note": lambda text: None} | options
    return sweep(model, tokenizer, cases, suites or [suite("recall_later")], **asked)


def plain(cells):
    """Without times, which differ from run to run."""
    return [replace(cell, seconds=None) for cell in cells]


@pytest.fixture
def counted(monkeypatch):
    """The labels of what was really run."""
    calls = []

    def counting(*arguments, **options):
        calls.append(arguments[2].name)
        return answer(*arguments, **options)

    monkeypatch.setattr(running, "answer", counting)
    return calls


def test_full_attention_is_one_and_a_small_stream_forgets():
    cells = swept([CASES[0], Case("streaming", "streaming", budget=0.1)], count=4)
    full, streaming = cells[:2], cells[2:]
    assert all((c.footprint, c.peak, c.kept, c.score) == (1.0, 1.0, 1.0, 1.0) for c in full)
    assert all(c.score < 0.5 and c.footprint < 1.0 and c.kept < 0.15 for c in streaming)
    assert [(c.label, c.seed) for c in cells] == [(name, s) for name in ("full", "streaming") for s in (0, 1)]
    assert all(len(c.samples) == 4 and len(c.turns) == 3 and c.later for c in cells)


def test_a_cell_says_all_that_it_came_from():
    cell = swept(seeds=(0,))[3]
    assert cell.policy == "prulong" and cell.params == {"n_sink": "2", "window": "12", "c": "32"}
    assert cell.tables["retrieval"]["file"].startswith("retrieval-") and len(cell.tables["retrieval"]["sha256"]) == 64
    assert [row.count("retrieval") for row in cell.classes] == [1, 0, 2]  # the three highest of heads.tsv
    assert "local: keep sink(2) | recent(12) at chunk(32), step" in cell.clauses
    assert json.loads(json.dumps(cell.to_dict()))["digest"] == cell.digest


def test_finished_cells_are_not_run_again(tmp_path, counted):
    first = swept(out=tmp_path)
    assert len(counted) == 8 and len(list((tmp_path / "cells").glob("*.json"))) == 8
    assert swept(out=tmp_path) == first and len(counted) == 8
    more = swept(out=tmp_path, seeds=(0, 1, 2), count=2)
    assert len(counted) == 12 and [c for c in more if c.seed < 2] == list(first)


def test_what_decides_a_result_is_in_its_key(tmp_path, counted):
    swept(CASES[1:2], out=tmp_path, seeds=(0,))
    changes = [
        {"count": 3}, {"lengths": [136]}, {"seeds": (5,)}, {"suites": [suite("recall_later:facts=4")]},
        {"backend": "reference"}, {"cases": [replace(CASES[1], params={"observe": 9})]},
        {"cases": [replace(CASES[1], chunk=40)]},
        {"cases": [replace(CASES[1], params={"observe": 8, "c": 32}, cut=True)]},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        swept(**{"cases": CASES[1:2], "out": tmp_path, "seeds": (0,), **change})
        assert len(counted) == number, change
    # The batch, the label and how a budget is said decide nothing.
    same = Case("other", "snapkv_chunked", {"observe": 8, "ratio": "30%", "c": 32})
    (cell,) = swept([same], out=tmp_path, seeds=(0,), batch=1)
    assert len(counted) == len(changes) + 1 and (cell.label, cell.budget, cell.chunk) == ("other", None, None)


def test_other_weights_are_another_cell(tmp_path, counted):
    model, _ = shipped()
    weight = model.model.norm.weight.data
    swept(CASES[:1], out=tmp_path, seeds=(0,))
    weight[0] += 1
    try:
        swept(CASES[:1], out=tmp_path, seeds=(0,))
    finally:
        weight[0] -= 1
    assert len(counted) == 2


def test_where_answers_end_is_part_of_the_key(tmp_path, counted, monkeypatch):
    model, tokenizer = shipped()
    (first,) = swept(CASES[:1], out=tmp_path, seeds=(0,))
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer.eos_token_id)
    assert swept(CASES[:1], out=tmp_path, seeds=(0,)) == (first,)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 8])
    (other,) = swept(CASES[:1], out=tmp_path, seeds=(0,))
    assert len(counted) == 2 and other.key != first.key


def test_cases_that_differ_in_trained_scores_only(tmp_path):
    """Their plans are the same: the second must not run with the scores of the first."""
    cases = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scores = {name: torch.randn_like(value) for name, value in trained_heads(3, 4, 2, 32).items()}
        save_file(scores, tmp_path / f"{seed}.safetensors")
        given = {"budget": 24, "stabilizers": 4, "c": 32}
        cases.append(Case(f"locret {seed}", "locret", given, {"cis": tmp_path / f"{seed}.safetensors"}))
    both = swept(cases, seeds=(0,), count=4)
    alone = [swept([case], seeds=(0,), count=4)[0] for case in cases]
    assert both[0].digest == both[1].digest and both[0].key != both[1].key
    assert [c.samples for c in both] == [c.samples for c in alone]
    assert both[0].samples != both[1].samples


@pytest.mark.parametrize("damage", ["{", "", "[]", '{"format": 1}', "another", "none", "deep"])
def test_a_corrupt_cell_is_computed_again_with_a_note(tmp_path, counted, damage):
    (first,) = swept(CASES[1:2], out=tmp_path, seeds=(0,))
    path = tmp_path / "cells" / f"{first.key}.json"
    good = json.loads(path.read_text())
    text = {
        "another": json.dumps(good | {"suite": "recall"}), "none": json.dumps(good | {"score": None}),
        "deep": "[" * 100_000,
    }.get(damage, damage)  # fmt: skip
    path.write_text(text)
    notes = []
    (again,) = swept(CASES[1:2], out=tmp_path, seeds=(0,), note=notes.append)
    assert len(counted) == 2 and plain([again]) == plain([first])
    assert len(notes) == 1 and first.key in notes[0] and "computed again" in notes[0]
    assert json.loads(path.read_text()) | {"seconds": 0} == good | {"seconds": 0}


def test_an_interrupted_sweep_goes_on_to_the_same_cells(tmp_path, monkeypatch):
    whole = swept()
    left = [3]

    def interrupted(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return answer(*arguments, **options)

    monkeypatch.setattr(running, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(out=tmp_path)
    assert "_kvcompile" not in vars(shipped()[0])
    assert len(list((tmp_path / "cells").iterdir())) == 3
    left[0] = 5
    assert plain(swept(out=tmp_path)) == plain(whole) and left[0] == 0


def test_what_cannot_run_at_a_budget_is_skipped_with_its_reason(tmp_path):
    cases = [
        Case("snap", "snapkv", {"observe": 64}, budget=0.1),  # 12 tokens, of which 64 are protected
        Case("streaming", "streaming", budget=0.01),
        CASES[1],
    ]
    cells = swept(cases, out=tmp_path, seeds=(0,))
    assert [c.status for c in cells] == [SKIPPED, SKIPPED, "done"]
    assert "this count is -52" in cells[0].reason and "no window beside n_sink" in cells[1].reason
    assert cells[0].score is None and not cells[0].done


def test_a_table_that_no_budget_mends_ends_the_sweep_before_it_begins(counted, tmp_path):
    other = tmp_path / "of_another_model.tsv"
    other.write_text("0.1 0.2\n0.3 0.4\n")
    for budget in (None, 0.3):
        with pytest.raises(PolicyError, match=f"{other}:1:1: error.K612.*\\n.*\\n.*\\n.*3 lines of 4 numbers"):
            swept([CASES[0], replace(CASES[3], tables={"retrieval": other}, budget=budget)])
        with pytest.raises((PolicyError, Unfit), match="--table retrieval="):
            swept([CASES[0], replace(CASES[3], tables={}, budget=budget)])
        with pytest.raises(PolicyError, match="no such table"):
            swept([CASES[0], replace(CASES[3], tables={"retrieval": tmp_path / "none.tsv"}, budget=budget)])
    assert not counted


def test_mistakes_end_the_sweep_before_it_begins(counted):
    with pytest.raises(Unfit, match="no rule says how policy razor"):
        swept([CASES[0], Case("razor", "razor", budget=0.3)])
    with pytest.raises(KvCompileError, match="fed in pieces: say of how many tokens"):
        swept([replace(CASES[1], chunk=None, cut=True)])
    with pytest.raises(KvCompileError, match="jobs=0"):
        swept(jobs=0)
    assert not counted


@pytest.mark.slow  # each worker loads torch anew
def test_workers_give_what_one_process_gives(tmp_path):
    alone = swept(CASES[:2], [Ragged()], seeds=(0,))
    together = swept(CASES[:2], [Ragged()], seeds=(0,), jobs=2, out=tmp_path)
    assert plain(together) == plain(alone)
    assert len(list((tmp_path / "cells").iterdir())) == 2
