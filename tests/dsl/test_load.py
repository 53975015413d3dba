"""The policy argument: texts, paths, library names, and what is said when none of them fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.dsl import Loaded, PolicyError, library, load, parse
from kvcompile.dsl.parser import MAX_BYTES

ONE = "policy one(n=4):\n    keep sink(n)\n    at step\n"
TWO = ONE + "\npolicy two():\n    keep all\n"


def error(policy: object, name: str | None = None) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        load(policy, name)
    return caught.value


def test_text_path_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.kvp").write_text(ONE)
    assert load(ONE).policy.name == "one"
    assert load(ONE).base == Path.cwd()
    for path in (tmp_path / "mine.kvp", str(tmp_path / "mine.kvp")):
        assert load(path).policy.name == "one"
        assert load(path).base == tmp_path
    monkeypatch.chdir(tmp_path)
    assert load("mine.kvp").policy.name == "one"
    assert load("snapkv").policy.name == "snapkv"
    assert load("snapkv").base is None
    assert load("prulong").policy.name == "prulong"


def test_file_and_loaded_pass_through() -> None:
    file = parse(TWO)
    loaded = load(file, "two")
    assert loaded.policy.name == "two"
    assert load(loaded) is loaded
    assert load(loaded, "one").policy.name == "one"
    assert isinstance(loaded, Loaded)


def test_base_can_be_given(tmp_path: Path) -> None:
    assert load(ONE, base=tmp_path).base == tmp_path


def test_one_of_several_needs_a_name() -> None:
    found = error(TWO).diagnostics[0]
    assert (found.code, found.line, found.column) == ("K012", 5, 1)
    assert "one, two" in found.message
    assert load(TWO, "two").policy.name == "two"
    missing = error(TWO, "twu").diagnostics[0]
    assert missing.code == "K013" and missing.hint == "did you mean `two`?"


@pytest.mark.parametrize("text", ["\n", "# nothing\n", "heads a = rest\n"])
def test_text_without_policies(text: str) -> None:
    assert error(text).diagnostics[0].code == "K012"


def test_unknown_library_names() -> None:
    found = error("snapvk").diagnostics[0]
    assert found.code == "K013" and found.hint == "did you mean `snapkv`?"
    assert "adakv" in error("zzzz").diagnostics[0].hint
    assert error("").diagnostics[0].code == "K015"
    assert "line break" in error("policy p(): keep all").diagnostics[0].hint


def test_name_of_a_file_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.kvp").write_text(ONE)
    monkeypatch.chdir(tmp_path)
    assert "./mine.kvp" in error("mine").diagnostics[0].hint


@pytest.mark.parametrize("policy", [None, 4, b"snapkv", ["snapkv"]])
def test_not_a_policy(policy: object) -> None:
    assert error(policy).diagnostics[0].code == "K015"


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.kvp").mkdir()
    (tmp_path / "big.kvp").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "bin.kvp").write_bytes(b"policy p():\n\xff\xfe")
    (tmp_path / "mine.kvp").write_text(ONE)
    cases = {
        str(tmp_path): ("K011", "directory"),
        str(tmp_path / "folder.kvp"): ("K011", "directory"),
        str(tmp_path / "nine.kvp"): ("K011", "mine.kvp"),
        str(tmp_path / "snapkv.kvp"): ("K011", "the library has `snapkv`"),
        str(tmp_path / "mine.kvp" / "x.kvp"): ("K010", "Not a directory"),
        str(tmp_path / ("x" * 300 + ".kvp")): ("K010", "too long"),
        "a\x00b.kvp": ("K010", "null"),
        str(tmp_path / "big.kvp"): ("K009", "larger"),
        str(tmp_path / "bin.kvp"): ("K010", "byte 12"),
    }
    for path, (code, words) in cases.items():
        found = error(path)
        assert found.diagnostics[0].code == code, path
        assert words in str(found), path
        assert "\n" not in found.diagnostics[0].message


def test_a_long_text_without_line_break_is_shortened() -> None:
    assert len(str(error("x" * 100_000))) < 1000


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        (ONE + "policy one():\n    keep all\n", "K106", 4, 8),
        ("heads a = rest\nheads a = rest\n" + ONE, "K106", 2, 7),
        ("policy p(n=4, n=5):\n    keep sink(n)\n    at step\n", "K106", 1, 15),
        (ONE + "learn a for onr:\n    freeze weights\n", "K013", 4, 13),
    ],
)
def test_double_names(text: str, code: str, line: int, column: int) -> None:
    found = error(text).diagnostics[0]
    assert (found.code, found.line, found.column) == (code, line, column)


def test_library_names_stay_in_their_folder() -> None:
    with pytest.raises(KeyError):
        library.read("../load")
