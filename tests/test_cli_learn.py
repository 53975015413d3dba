"""`kvcompile learn`: what it writes and says, what it finds out before it loads a model, and that it can be stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcompile.cli import main
from kvcompile.learning.masks import load_scores
from kvcompile.learning.optimizer import Optimizer

LOCAL = ("--set", "n_sink=2", "--set", "window=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with two KV heads, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.models import VOCABULARY, random_model

    where = tmp_path_factory.mktemp("model")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    random_model("llama64", **sizes).save_pretrained(where)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", pad_token="w0").save_pretrained(where)
    return where


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    texts = [" ".join(f"w{3 + (i * 7 + at * at) % 250}" for at in range(40)) for i in range(6)]
    lines = [{"text": text} for text in texts[:3]] + [{"prompt": text, "answer": "w5 w6"} for text in texts[3:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["learn", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_a_mask_is_written_and_read_by_the_other_commands(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "masks.tsv"
    options = ("--data", data, "--out", out, "--steps", 4, "--batch", 2, "--keep", "50%", *LOCAL)
    code, said, err = run(capsys, "prulong", "--model", folder, *options)
    assert code == 0, err
    mask = load_scores(out).values
    lines = said.splitlines()
    assert lines[0].split() == ["layer", "kept", "retrieval"]
    for layer, row in enumerate(mask):
        own = [str(head) for head, value in enumerate(row) if value]
        assert lines[1 + layer].split() == [str(layer), str(len(own)), "of", "2", *own]
    assert lines[3] == "kept 2 of 4 KV heads (50% was asked for)"
    assert lines[4].startswith("at the end: ") and "loss " in lines[4] and "target " in lines[4]
    assert lines[5] == f"written: {out}; use it with --table retrieval={out}"
    explained = ["explain", "prulong", "--model", str(folder), "--table", f"retrieval={out}", *LOCAL, "--prompt", "64"]
    assert main(explained) == 0


GATED = """
policy gated():
    unit block(4) with c = mean[i] raw.k
    score live = softmax[u] learned("gates.safetensors", q, c)
    attend own block | top(2) blocks by live per query_head
    at chunk

learn live for gated:
    gate z = block_gate(width=4) per query_head
    loss attention_kl
    freeze weights
"""


def test_gates_of_units_are_written_and_read_by_the_other_commands(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path
) -> None:
    policy, out = tmp_path / "gated.kvp", tmp_path / "mine.safetensors"
    policy.write_text(GATED)
    same = (policy, "--model", folder, "--data", data, "--steps", 3, "--batch", 2)
    code, said, err = run(capsys, *same, "--out", out)
    assert code == 0, err
    lines = said.splitlines()
    assert (
        lines[0] == "gates of 2 layers, for the mean of a unit's queries and the mean of raw.k over units of 4 tokens"
    )
    assert lines[1].startswith("loss: ") and lines[2].startswith("recall: ")
    assert lines[3] == f"written: {out}; use it with --table live={out}"
    asked = ["run", str(policy), "--model", str(folder), "--table", f"live={out}", "--prompt", "w5 w9 w7 w8 w5 w9"]
    assert main([*asked, "--max-new-tokens", "2", "--backend", "reference"]) == 0
    code, said, err = run(capsys, *same, "--out", out, "--json")
    assert code == 0 and json.loads(said)["trained"]["landmarks"] == ["mean"]
    for wrong, reason in (
        (("--out", tmp_path / "gates.tsv"), "written as .safetensors"),
        (("--out", out, "--keep", "30%"), "keep='30%' has no use for gates of units"),
    ):
        code, _, err = run(capsys, *same, *wrong)
        assert code != 0 and reason in " ".join(err.split())
    quick = (policy, "--model", folder, "--method", "quick", "--out", out)
    code, _, err = run(capsys, *quick)
    assert code == 2 and "quick measures heads" in " ".join(err.split())


def test_the_part_is_that_of_the_block_or_scores_are_written(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.safetensors"
    same = ("--model", folder, "--data", data, "--out", out, "--steps", 3, *LOCAL, "--json")
    code, said, err = run(capsys, "prulong", *same)
    assert code == 0, err
    found = json.loads(said)
    assert (found["keep"], len(found["heads"]), found["out"]) == ("3/10", 1, str(out))
    assert found["provenance"]["method"] == "learn" and found["provenance"]["metrics"]["target"] < 1
    assert load_scores(out).provenance["data_digest"] == found["provenance"]["data_digest"]
    code, said, err = run(capsys, "duo", *same, "--lr", "0.1")
    assert code == 0, err
    found = json.loads(said)
    assert (found["keep"], found["heads"]) == (None, None)
    assert len({score for row in found["scores"] for score in row}) > 1


@pytest.mark.parametrize("method", ["quick", "probe:induction", "probe:echo"])
def test_heads_are_scored_without_data(
    method: str, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.tsv"
    code, said, err = run(capsys, "duo", "--model", folder, "--out", out, "--method", method, "--length", 40, *LOCAL)
    assert code == 0, err
    values = load_scores(out).values
    assert [len(row) for row in values] == [2, 2] and min(min(row) for row in values) > 0
    assert said.splitlines()[1].split() == ["0", *(f"{value:.3f}" for value in values[0])]


def test_an_interrupted_run_goes_on(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(name: str) -> tuple[object, ...]:
        return ("prulong", "--model", folder, "--data", data, "--steps", 5, "--out", tmp_path / f"{name}.tsv", *LOCAL,
                "--checkpoint", tmp_path / name)  # fmt: skip

    assert run(capsys, *asked("whole"))[0] == 0
    step = Optimizer.step

    def stopped(self: Optimizer) -> float:
        if self.taken == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Optimizer, "step", stopped)
    code, said, err = run(capsys, *asked("part"))
    assert (code, said) == (1, "") and f"the state is in {tmp_path / 'part'}" in err
    assert not (tmp_path / "part.tsv").exists()
    monkeypatch.undo()
    assert run(capsys, *asked("part"))[0] == 0
    states = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("whole", "part")]
    assert states[0]["history"] == states[1]["history"] and states[0]["sha256"] == states[1]["sha256"]
    code, _, err = run(capsys, *asked("part"), "--seed", 1)
    assert code == 1 and "seed is 0 there and 1 here" in err and "--no-resume" in err
    assert run(capsys, *asked("part"), "--seed", 1, "--no-resume")[0] == 0


# ---------------------------------------------------------------- what is found out early


@pytest.fixture
def weightless(folder: Path, tmp_path: Path) -> Path:
    """A model folder whose weights cannot be read: whoever loads it fails with another message."""
    where = tmp_path / "weightless"
    where.mkdir()
    (where / "config.json").write_text((folder / "config.json").read_text())
    return where


USAGE = [
    ((), "give --data"),
    (("--data", "d.txt", "--method", "guess"), "'guess' is none of train, quick"),
    (("--data", "d.txt", "--method", "quick"), "--data has no use with --method quick"),
    (("--method", "probe:echo", "--steps", "3"), "--steps has no use with --method probe:echo"),
    (("--data", "d.txt", "--dtype", "fp8"), "'fp8' is none of auto"),
    (("--data", "d.txt", "--compile", "auto"), "'auto' is none of off"),
    (("--data", "d.txt", "--set", "seed=3"), "'seed' is an option of learn"),
    (("--data", "d.txt", "--steps", "0"), "Invalid value for '--steps'"),
    (("--data", "d.txt", "--out", "masks.csv"), "ends in .tsv or .safetensors"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_wrong_usage(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], weightless: Path, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "prulong", "--model", weightless, "--out", tmp_path / "m.tsv", *arguments)
    assert (code, out) == (2, "") and message in " ".join(err.split())


EARLY = [
    ("prulong", ("--out", "none/masks.tsv"), "there is no folder none"),
    ("prulong", ("--out", "folder.tsv"), "is a folder; name a file in it"),
    ("h2o", (), "policy `h2o` has no learn block"),
    ("prulong", ("--heads", "local"), "has no learn block for `local`"),
    ("prulong", ("--set", "windw=3"), "windw"),
    ("prulong", ("--keep", "10%"), "10% of this model's 4 KV heads is none at all"),
    ("prulong", ("--keep", "130%"), "is no part of the heads"),
]


@pytest.mark.parametrize(("policy", "arguments", "message"), EARLY)
def test_mistakes_are_found_before_weights_are_read(
    policy: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], weightless: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("folder.tsv").mkdir()
    same = ("--model", weightless, "--data", "data.jsonl", "--out", "masks.tsv")
    code, out, err = run(capsys, policy, *same, *arguments)
    assert (code, out) == (1, "") and message in err
    assert not Path("masks.tsv").exists()


def test_text_needs_a_tokenizer_and_ready_made_ids_need_none(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(3, 60))}) + "\n")
    same = ("prulong", "--model", bare, "--steps", 3, *LOCAL, "--out", tmp_path / "m.safetensors")
    for data in ("suite:recall", tmp_path / "text.txt"):
        code, _, err = run(capsys, *same, "--data", data)
        assert code == 1 and "needs the model's tokenizer: save it into the model's folder" in err
    code, _, err = run(capsys, *same, "--data", tmp_path / "ids.jsonl")
    assert code == 0, err


def test_places_that_cannot_be_written_are_found_first(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Optimizer, "step", lambda self: pytest.fail("a step was taken"))
    same = ("prulong", "--model", folder, "--data", data, *LOCAL)
    code, _, err = run(capsys, *same, "--out", "/proc/m.tsv")  # no user can write there
    assert code == 1 and "--out /proc/m.tsv: cannot write there" in err
    code, _, err = run(capsys, *same, "--out", tmp_path / "m.tsv", "--checkpoint", "/proc")
    assert code == 1 and "checkpoint /proc: cannot write there" in err


def test_interrupted_before_there_is_a_state(
    capsys: pytest.CaptureFixture[str], folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcompile.learning.learn.load_data", stopped)
    same = ("prulong", "--model", folder, "--data", data, *LOCAL, "--out", tmp_path / "m.tsv")
    code, _, err = run(capsys, *same, "--checkpoint", tmp_path / "state")
    assert (code, err) == (1, "interrupted\n")


def test_data_that_cannot_be_used(capsys: pytest.CaptureFixture[str], folder: Path, data: Path, tmp_path: Path) -> None:
    same = ("--model", folder, "--out", tmp_path / "m.tsv")
    with data.open("a") as stream:
        stream.write("{half\n")
    code, _, err = run(capsys, "prulong", *same, "--data", data, *LOCAL)
    assert code == 1 and f"{data}:7, column" in err
    code, _, err = run(capsys, "prulong", *same, "--data", tmp_path / "none.txt", *LOCAL)
    assert code == 1 and "none.txt: no such file or folder; give one, or `suite:NAME`" in err
    code, _, err = run(capsys, "prulong", *same, "--data", tmp_path / "none", *LOCAL)
    assert code == 1 and "none: no such file or folder" in err
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    code, _, err = run(capsys, "prulong", *same, "--data", tmp_path / "bytes.txt", *LOCAL)
    assert code == 1 and "bytes.txt: not UTF-8 text (byte 0); save it as UTF-8" in err
    (tmp_path / "text.txt").write_text("w3 w4 w5")
    code, _, err = run(capsys, "prulong", *same, "--data", tmp_path / "text.txt", *LOCAL)
    assert code == 1 and "reads the same" in err
    code, _, err = run(capsys, "duo", *same, "--data", tmp_path / "text.txt", *LOCAL)
    assert code == 1 and "the loss compares answer tokens" in err
    code, _, err = run(capsys, "prulong", *same, "--data", "suite:recal")
    assert code == 1 and "no suite `recal`; the nearest is `recall`" in err
