"""Head tables come from anywhere: every broken one is refused with its place, the good ones by a fixed rule."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from kvcompile.dsl import PolicyError
from kvcompile.dsl.diagnostics import outside
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy, tables
from kvcompile.passes.tables import choose, read_table

HERE = outside("<here>")
FACTS = ModelFacts(2, 4, 2, 64)


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "heads.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_published_layout_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "6.054687500000000000e-01\t0.000000000000000000e+00\r\n1.0\t.5\n\n")
    assert read_table(path, 2, 2) == ((0.60546875, 0.0), (1.0, 0.5))


@pytest.mark.parametrize(
    ("text", "code", "line", "column", "reason"),
    [
        ("1\t0\n0\tnan\n", "K611", 2, 3, "`nan`"),
        ("1\t0\n0\tinf\n", "K611", 2, 3, "`inf`"),
        ("1\t0\n0\t1e999\n", "K611", 2, 3, "`1e999`"),
        ("1\t0\n0\t0x1\n", "K611", 2, 3, "`0x1`"),
        ("1\t0\n0\t1_0\n", "K611", 2, 3, "`1_0`"),
        ("layer\thead\n0\t1\n", "K611", 1, 1, "`layer`"),
        ("1\t0\n0\n", "K612", 2, 1, "line 2 holds 1 numbers"),
        ("1\t0\t0\n0\t0\t0\n", "K612", 1, 1, "line 1 holds 3 numbers"),
        ("1\t0\n\n1\t0\n", "K612", 2, 1, "line 2 holds 0 numbers"),
        ("1\t0\n", "K612", 1, 1, "the table holds 1 lines"),
        ("1\t0\n1\t0\n1\t0\n1\t0\n", "K612", 3, 1, "the table holds 4 lines"),
        ("", "K612", 1, 1, "empty"),
        ("\n \n", "K612", 1, 1, "empty"),
        (b"\xff\xfe1", "K610", 1, 1, "no text"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str | bytes, code: str, line: int, column: int, reason: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read_table(written(tmp_path, text), 2, 2)
    finding = caught.value.diagnostics[0]
    assert (finding.code, finding.line, finding.column) == (code, line, column)
    assert reason in finding.message
    assert finding.hint


def test_paths_that_are_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, reason in ((tmp_path, "directory"), (tmp_path / "none.tsv", "no such"), (Path("a\0b"), "cannot read")):
        with pytest.raises(PolicyError, match=reason):
            read_table(path, 2, 2)
    monkeypatch.setattr(tables, "MAX_BYTES", 4)
    with pytest.raises(PolicyError, match="larger than 4 bytes"):
        read_table(written(tmp_path, "1 0\n0 1\n"), 2, 2)


def test_ties_go_to_the_lower_layer_then_the_lower_head() -> None:
    table = ((0.5, 1.0, 1.0), (1.0, 1.0, 0.25))
    chosen, warnings = choose(table, Fraction(1, 2), HERE)
    assert chosen == {(0, 1), (0, 2), (1, 0)} and not warnings
    assert choose(table, Fraction(99, 600), HERE)[0] == set()  # 0.99 of a head is none: truncated once
    assert choose(table, Fraction(1), HERE)[0] == {(layer, head) for layer in range(2) for head in range(3)}


def test_a_table_of_only_zero_and_one_is_taken_as_it_is() -> None:
    table = ((1.0, 0.0), (1.0, 1.0))
    assert choose(table, None, HERE) == ({(0, 0), (1, 0), (1, 1)}, [])
    chosen, warnings = choose(table, Fraction(1, 4), HERE)
    assert len(chosen) == 3
    assert [(w.code, w.severity) for w in warnings] == [("K614", "warning")]


def test_other_tables_need_a_threshold() -> None:
    with pytest.raises(PolicyError, match=r"K613.*0 and 1"):
        choose(((0.5, 1.0),), None, HERE)


def test_a_path_in_a_policy_counts_from_its_file_one_given_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        'heads far = table("heads.tsv")\n\npolicy mine():\n    far: keep all\n    rest: keep recent(4)\n    at step\n'
    )
    beside, elsewhere = tmp_path / "policies", tmp_path / "work"
    for folder, table in ((beside, "1 0\n0 0\n"), (elsewhere, "0 0\n1 1\n")):
        folder.mkdir()
        written(folder, table)
    (beside / "mine.kvp").write_text(body)
    monkeypatch.chdir(elsewhere)
    from_file = compile_policy(beside / "mine.kvp", FACTS).plan
    assert from_file.class_of == ((0, 1), (1, 1))
    from_text = compile_policy(body, FACTS).plan
    assert from_text.class_of == ((1, 1), (0, 0))
    given = compile_policy(beside / "mine.kvp", FACTS, tables={"far": "heads.tsv"}).plan
    assert given.class_of == ((1, 1), (0, 0))
    based = compile_policy(body, FACTS, base=beside).plan
    assert based.class_of == ((0, 1), (1, 1))


def test_a_library_policy_wants_its_table(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"K610.*brings no table for `retrieval`"):
        compile_policy("prulong", FACTS)
    with pytest.raises(PolicyError, match=r"K601.*given for `retrieva`.*\n.*retrieval"):
        compile_policy("prulong", FACTS, tables={"retrieva": "x.tsv"})
    path = written(tmp_path, "0.9 0.1\n0.8 0.7\n")
    plan = compile_policy("prulong", FACTS, tables={"retrieval": path}).plan
    assert [cls.name for cls in plan.classes] == ["retrieval", "local"]
    assert plan.class_of == ((0, 1), (1, 1))  # 30 % of four heads is one
