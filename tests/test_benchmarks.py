"""The benchmarks run, at sizes at which their figures mean nothing, and say what they measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ("--rounds", "2", "--calls", "1", "--slow-rounds", "1", "--threads", "1", "--sweep", "1")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark as a run of it would; the number of threads is put back afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    torch.set_num_threads(threads)


def test_attention_of_every_kind(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--lengths", "64", "128", "--prompt", "96", "--sink", "8", "--window", "32", "--without", "FlexAttention")
    assert load("attention_cpu").main([*sizes, *SMALL, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert [s["kind"] for s in found["sections"]] == ["decode"] * 4 + ["ragged"] * 2 + ["scores"] * 2 + [
        "prefill"
    ] * 2 + ["evict"] * 4
    for section in found["sections"]:
        for name, row in section["rows"].items():
            assert row.get("ms", 0) > 0 or "not built" in row["error"], (section["title"], name, row)
    limits = {claim["limit"] for section in found["sections"] for claim in section["claims"]}
    assert limits == {0.65, 1.15, 0.40, 0.70}
    ragged = next(s for s in found["sections"] if s["kind"] == "ragged")
    assert sum(ragged["lengths"]) == 8 * 128 and max(ragged["lengths"]) / min(ragged["lengths"]) > 25
    page = (tmp_path / "attention_cpu.md").read_text()
    assert page == capsys.readouterr().out.rstrip("\n") + "\n"
    assert page.count("\n## ") == len(found["sections"]) and "| at most 0.65 |" in page
    assert (tmp_path / "attention_cpu.png").exists() == ("(attention_cpu.png)" in page)


@pytest.mark.slow
def test_reads_of_every_kind(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--lengths", "64", "2048", "--prompt", "640", "--rounds", "1", "--calls", "1", "--slow-rounds", "1")
    assert load("reads_cpu").main([*sizes, "--sweep", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "reads_cpu.json").read_text())
    assert [s["kind"] for s in found["sections"]] == ["decode"] * 4 + ["prefill"] * 2
    for section in found["sections"]:
        for name, row in section["rows"].items():
            assert row.get("ms", 0) > 0, (section["title"], name, row)
        assert section["predicted"].keys() <= section["rows"].keys()
    page = (tmp_path / "reads_cpu.md").read_text()
    assert page == capsys.readouterr().out.rstrip("\n") + "\n"
    assert page.count("\n## ") == len(found["sections"]) and "| at most 0.25 |" in page


def test_answers_under_reads_and_evictions(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("reads_recall")
    monkeypatch.setattr(script, "SHARES", (0.25,))
    monkeypatch.setattr(script, "SUITES", ("recall_later:facts=3",))
    shown = ("untouched", "sink and window", "seer-r, distilled gate", "streaming")
    methods = script.methods
    monkeypatch.setattr(script, "methods", lambda *given: [m for m in methods(*given) if m.label in shown])
    command = ["reads_recall.py", "--count", "1", "--length", "64", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    script.main()
    rows = {row["label"]: row for row in json.loads((tmp_path / "reads_recall.json").read_text())["rows"]}
    assert tuple(rows) == shown
    assert (rows["untouched"]["read"], rows["untouched"]["bytes"], rows["untouched"]["kept"]) == (1.0, 1.0, 1.0)
    for name in ("sink and window", "seer-r, distilled gate"):
        assert rows[name]["read"] < 0.6 and rows[name]["footprint"] == rows[name]["kept"] == 1.0
    assert rows["sink and window"]["bytes"] == rows["sink and window"]["read"]
    gated = rows["seer-r, distilled gate"]
    assert gated["bytes"] > gated["read"] + 0.05  # landmarks
    assert rows["streaming"]["kept"] < 0.6 and rows["streaming"]["footprint"] < 1.0
    assert (tmp_path / "reads_recall.md").read_text() in capsys.readouterr().out


def test_nonsense_sizes_are_refused(load: Any) -> None:
    for wrong in (["--lengths", "8"], ["--prompt", "0"], ["--rounds", "0"], ["--lengths"]):
        with pytest.raises(SystemExit) as refused:
            load("attention_cpu").main(wrong)
        assert refused.value.code == 2


def test_turns_compare_before_they_time(load: Any) -> None:
    turns = load("_turns")
    right, calls = torch.arange(8.0), []

    def broken() -> None:
        raise RuntimeError("no such\nkernel")

    contestants = [
        turns.Contestant("a", lambda: calls.append("a") or right, lambda: calls.append("before a"), bytes=32),
        turns.Contestant("b", lambda: calls.append("b") or right.clone(), like="a"),
        turns.Contestant("wrong", lambda: right + 1, like="a"),
        turns.Contestant("broken", broken),
    ]
    rows = turns.race(contestants, 2, 1, lambda: calls.append("sweep"))
    assert (
        rows["broken"] == {"error": "RuntimeError: no such"} and "differs by 1.00e+00 from a" in rows["wrong"]["error"]
    )
    assert calls[6:] == ["before a", "sweep", "a", "sweep", "b", "sweep", "b", "before a", "sweep", "a"]
    assert rows["a"]["gb_s"] >= 0 and len(rows["b"]["each_round"]) == 2
    timed = {"x": {"ms": 3.0, "each_round": [2.0, 4.0]}, "y": {"ms": 4.0, "each_round": [4.0, 4.0]}}
    judged = turns.judge(turns.Claim("x", "y", 0.7), timed)
    assert (judged["ratio"], judged["holds"], judged["ratio_of_each_round"]) == (0.75, False, [0.5, 1.0])
    assert turns.judge(turns.Claim("x", "z", 0.7), timed)["holds"] is None


def test_flex_masks_say_what_local_heads_read(load: Any) -> None:
    masks = load("_flex")
    mask = masks.local_mask(300, 8, 100, 4, 2, 2)
    q, k = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    for head, local in ((0, True), (3, True), (4, False), (7, False)):
        wanted = (q >= k) & ((q - k < 100) | (k < 8) | (not local))
        h = torch.tensor(head)
        assert torch.equal(mask.mask_mod(torch.tensor(0), h, q, k), wanted)
        blocks = torch.nn.functional.pad(wanted, (0, 84, 0, 84)).view(3, 128, 3, 128).any(1).any(-1)
        assert torch.equal(mask.to_dense()[0, head].bool(), blocks)


TINY = {"prompt": 64, "tokens": 2, "warm_up": 1, "threads": 1, "budget": 24, "observe": 8}
PIECES = {"sink": 4, "window": 12, "chunk": 32}


def test_a_whole_model(load: Any) -> None:
    module = load("decode_cpu")
    setting = module.Setting(**TINY, **PIECES)
    runs = {c.name: c.run for c in module.CONTESTANTS}
    full, ours = (runs[name](setting) for name in ("untouched", "kvcompile prulong"))
    assert full["bytes"] == 4 * 4 * (64 + 3) * 2 * 64 * 4 and 0 < ours["bytes"] < full["bytes"]
    assert len(full["step_ms"]) == len(full["bare_ms"]) == 2
    assert full["attention_ms"] == pytest.approx(full["median_ms"] - sum(full["bare_ms"]) / 2, abs=2e-3)
    said = {"versions": {"torch": "2"}, "machine": module.machine()}
    rounds = {"untouched": [full | said], "kvcompile prulong": [ours | said]}
    (claim,) = module.compare(rounds, {}, setting)["claims"]
    assert (claim["of"], claim["limit"]) == ("prefill_seconds", 0.6)


def test_a_contestant_in_a_process(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for name, size in TINY.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    only = ("--only", "kvcompile snapkv", "kvpress SnapKV", "--rounds", "1", "--out", str(tmp_path))
    assert load("decode_cpu").main([*sizes, *only, "--peer-python", "false"]) == 1
    out, err = capsys.readouterr()
    assert "kvpress SnapKV did not run: no error output" in err and "| kvcompile snapkv |" in out
    found = json.loads((tmp_path / "decode_cpu.json").read_text())
    assert list(found["contestants"]) == ["kvcompile snapkv"] and found["claims"] == []
    assert set(found["rounds"]["kvcompile snapkv"][0]["versions"]) == {"torch", "transformers", "kvcompile"}


def test_ratios_are_of_medians_and_failures_have_a_line(load: Any) -> None:
    module = load("decode_cpu")

    def runs(*steps: float) -> list[dict[str, Any]]:
        common = {"prefill_seconds": 1.0, "bytes": 8, "versions": {"torch": "2"}, "machine": module.machine()}
        return [{"median_ms": step, "attention_ms": step - 2, **common} for step in steps]

    rounds = {"untouched": runs(10, 20, 12), "kvcompile keep_all": runs(5, 6, 30), "kvpress SnapKV": []}
    found = module.compare(rounds, {"kvpress SnapKV": "ImportError: no kvpress"}, module.Setting())
    assert found["contestants"]["kvcompile keep_all"]["attention_ms"] == 4
    (claim,) = found["claims"]
    assert claim["ratio"] == 0.5 and claim["holds"] and claim["ratio_of_each_round"] == [0.5, 0.3, 2.5]
    page = module.as_table(found, 3)
    assert "| kvpress SnapKV | did not run: ImportError: no kvpress |" in page
    said = 'Traceback (most recent call last):\n  File "x.py"\ntorch._inductor.exc.InductorError: no\nSet TORCHDYNAMO\n'
    assert module._error_line(said) == "torch._inductor.exc.InductorError: no"
    assert module._error_line("") == "no error output"


def test_the_bare_model_reads_nothing(load: Any) -> None:
    common = load("_common")
    bare = common.bare_model(common.Setting(prompt=8, threads=1))
    with torch.no_grad():
        logits = bare(torch.tensor([[5, 6, 5]]), use_cache=False).logits[0]
        assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
