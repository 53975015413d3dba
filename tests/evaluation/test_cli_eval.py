"""`kvcompile eval`: what it prints and writes, and a message for every usual mistake."""

import json
import shutil
import subprocess
import sys

import pytest

from kvcompile.cli import main
from kvcompile.cli_eval import suite_names
from tests.evaluation.shipped import FOLDER

SMALL = ("--model", FOLDER, "--length", "128", "--count", "2", "--suite", "recall_later")


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_a_table_files_and_cells_that_are_kept(capsys, tmp_path):
    asked = ("snapkv_chunked", *SMALL, "--budgets", "30%,60%", "--chunks", "32", "--set", "observe=8", "--seeds", "0,1")
    code, out, err = run(capsys, *asked, "--out", tmp_path)
    assert code == 0
    assert "recall_later, 128 tokens, 2 samples of 2 seeds each" in out and "snapkv_chunked, pieces of 32" in out
    assert err.splitlines()[-2:] == [f"written: {tmp_path}/results.json", f"written: {tmp_path}/results.csv"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(before) == 6
    code, again, _ = run(capsys, *asked, "--out", tmp_path)
    assert (code, again) == (0, out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before


def test_json(capsys):
    table = f"retrieval={FOLDER}/heads.tsv"
    code, out, _ = run(capsys, "prulong", "streaming", *SMALL, "--budgets", "0.3", "--set", "n_sink=2",
                         "--table", table, "--json")  # fmt: skip
    data = json.loads(out)
    assert code == 0 and [c["label"] for c in data["cells"]] == ["full", "prulong", "streaming"]
    assert data["cells"][2]["params"] == {"n_sink": "2", "window": "36"}


def test_suites_between_commas_keep_their_options(tmp_path, monkeypatch):
    assert suite_names("recall:facts=4,depths=5,recall_later, topic") == [
        "recall:facts=4,depths=5",
        "recall_later",
        "topic",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert suite_names("a,b") == ["a,b"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("streaming", *SMALL[:-1], "recal"), 1, "nearest is `recall`"),
        (("streaming", "--model", FOLDER), 2, "name at least one suite"),
        (("streamng", *SMALL), 1, "did you mean `streaming`"),
        (("streaming", *SMALL, "--length", "5000"), 1, "longer than the model's 1024 positions"),
        (("streaming", *SMALL, "--length", "no"), 2, "is no whole number from 1"),
        (("streaming", *SMALL, "--budgets", "30"), 2, "did you mean 30%"),
        (("streaming", *SMALL, "--budgets", "0"), 2, "outside of"),
        (("streaming", *SMALL, "--budgets", "10%,10%"), 2, "names one twice"),
        (("streaming", *SMALL, "--threshold", "120%"), 2, "part of full attention's score 120% is outside of"),
        (("streaming", *SMALL, "--seeds", "a"), 2, "is no whole number"),
        (("streaming", *SMALL, "--plot"), 2, "--plot needs --out DIR"),
        (("streaming", *SMALL, "--set", "widow=4"), 1, "no policy here has a parameter or a table `widow`"),
        (("streaming", *SMALL, "--set", "window"), 2, "is not of the form NAME=VALUE"),
        (("streaming", *SMALL, "--backend", "gpu"), 2, "is none of"),
        (("streaming", *SMALL, "--chunks", "32"), 1, "no parameter `c`"),
        (("razor", *SMALL, "--budgets", "30%"), 1, "give its parameters with --set NAME=VALUE"),
        (("snapkv", *SMALL, "--budgets", "10%"), 1, ""),
        (("streaming", "--suite", "recall", "--model", "nowhere"), 1, "does not exist"),
    ],
)  # fmt: skip
def test_mistakes(capsys, arguments, code, said):
    found, out, err = run(capsys, *arguments)
    assert found == code, err
    assert said in " ".join(err.replace("│", " ").split())
    if arguments[0] == "snapkv":
        assert "skipped: snapkv at budget 0.1: " in out and "this count is -52" in out


def test_where_results_cannot_go(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run(capsys, "streaming", *SMALL, "--out", file)
    assert code == 1 and "is a file; name a folder" in err
    code, _, err = run(capsys, "streaming", *SMALL, "--out", "/proc")  # no user can write there
    assert code == 1 and "--out /proc: cannot write there" in err
    code, _, err = run(capsys, "streaming", *SMALL, "--out", file / "below")
    assert code == 1 and str(file) in err


def test_a_folder_without_a_tokenizer(capsys, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(FOLDER / name, tmp_path)
    code, _, err = run(capsys, "streaming", "--model", tmp_path, *SMALL[2:])
    assert code == 1 and f"{tmp_path}: has no tokenizer; save the model's own into it" in err
    (tmp_path / "tokenizer.json").write_text("{")
    code, _, err = run(capsys, "streaming", "--model", tmp_path, *SMALL[2:])
    assert code == 1 and "cannot load the tokenizer" in err


def test_interrupted_it_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    from kvcompile.evaluation import running

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "answer", interrupted)
    code, _, err = run(capsys, "streaming", *SMALL, "--out", tmp_path)
    assert code == 1 and "the same command goes on from there" in err


def test_help_imports_no_torch():
    script = "import sys; from kvcompile.cli import main; main(['eval', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
