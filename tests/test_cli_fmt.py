"""`kvcompile fmt`: what is written, what is told, and what is left alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from kvcompile.cli import main

UGLY = "policy   mine( budget=16 ) :\n  keep sink( 2 )|top(budget)by norm(k)   # both\n\n\n  at prefill.end\n"
TIDY = """\
policy mine(budget=16):
    keep sink(2) | top(budget) by norm(k)  # both

    at prefill.end
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "mine.kvp"
    path.write_text(UGLY)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_fmt_writes_the_file_and_keeps_its_rights(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    policy.chmod(0o640)
    link = policy.with_name("link.kvp")
    link.symlink_to(policy)
    assert run(capsys, "fmt", link) == (0, f"{link}: laid out anew\n", "")
    assert policy.read_text() == TIDY and policy.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    assert run(capsys, "fmt", policy) == (0, "", "")
    assert sorted(path.name for path in policy.parent.iterdir()) == ["link.kvp", "mine.kvp"]


def test_fmt_check_and_diff_write_nothing(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    assert run(capsys, "fmt", "--check", policy) == (1, f"{policy}: would change\n", "")
    code, out, _ = run(capsys, "fmt", "--diff", policy)
    assert code == 0 and "\n-policy   mine( budget=16 ) :\n" in out and "\n+policy mine(budget=16):\n" in out
    assert run(capsys, "fmt", "--check", "--diff", policy)[0] == 1
    assert policy.read_text() == UGLY
    policy.write_text(TIDY)
    assert run(capsys, "fmt", "--check", "--diff", policy) == (0, "", "")


def test_fmt_leaves_a_broken_file_and_goes_on(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    broken = policy.with_name("broken.kvp")
    broken.write_text("policy  mine( :\n")
    code, out, err = run(capsys, "fmt", broken, policy, policy.with_name("missing.kvp"))
    assert code == 1 and out == f"{policy}: laid out anew\n"
    assert "error[K003]" in err and f"{broken}: left as it is" in err and "error[K011]" in err
    assert broken.read_text() == "policy  mine( :\n" and policy.read_text() == TIDY


def test_fmt_reads_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def given(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    given(UGLY.replace("\n", "\r\n"))
    assert run(capsys, "fmt", "-") == (0, TIDY, "")
    given(UGLY)
    assert run(capsys, "fmt", "--check", "-") == (1, "<stdin>: would change\n", "")
    given("policy")
    code, out, err = run(capsys, "fmt", "-")
    assert (code, out) == (1, "") and "<stdin>:1:7: error[K001]" in err


def test_fmt_json(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    code, out, _ = run(capsys, "fmt", "--json", policy, "no.kvp")
    done, missing = json.loads(out)
    assert code == 1 and done == {"file": str(policy), "changed": True, "findings": []}
    assert [found["code"] for found in missing["findings"]] == ["K011"] and policy.read_text() == TIDY


def test_fmt_says_when_it_cannot_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, policy: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, out, err = run(capsys, "fmt", policy)
    assert (code, out) == (1, "") and err == f"{policy}: left as it is: cannot write it: No space left on device\n"
    assert policy.read_text() == UGLY and [path.name for path in policy.parent.iterdir()] == ["mine.kvp"]
