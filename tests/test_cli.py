"""The command line: exit codes, streams, messages without tracebacks, and each command on a small random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcompile.cli import main

GOOD = """\
policy mine(budget=16):
    keep sink(2) | top(budget) by norm(k) per head
    at prefill.end
"""
BAD = """\
policy mine(budget=16):
    keep sink(2) | top(budgte) by norm(k) per head
    at prefill.end
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a word-level tokenizer, saved as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.models import VOCABULARY, random_model

    where = tmp_path_factory.mktemp("model")
    random_model("llama64", num_hidden_layers=2).save_pretrained(where)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", pad_token="w0").save_pretrained(where)
    return where


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "mine.kvp"
    path.write_text(GOOD)
    return path


PROMPT = " ".join(f"w{3 + i % 200}" for i in range(60))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


# ------------------------------------------------------------------ check


def test_check_and_fmt_never_import_torch(policy: Path) -> None:
    script = (
        "import sys; from kvcompile.cli import main; code = main(['check', sys.argv[1], 'snapkv'])"
        " + main(['fmt', '--check', sys.argv[1]]);"
        "bad = {'torch', 'transformers', 'triton'} & set(sys.modules); print(sorted(bad)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(policy)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_check_says_fine(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    code, out, _ = run(capsys, "check", policy)
    assert (code, out) == (0, f"{policy}: fine (mine)\n")


def test_check_shows_place_caret_and_hint(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    policy.write_text(BAD)
    code, out, err = run(capsys, "check", policy)
    lines = err.splitlines()
    assert (code, out) == (1, "")
    assert lines[0].startswith(f"{policy}:2:24: error[K101]: ")
    assert lines[1] == " 2 |     keep sink(2) | top(budgte) by norm(k) per head"
    assert lines[2] == "   |                        ^^^^^^"
    assert lines[3].startswith("hint: ") and "budget" in lines[3]


def test_check_goes_on_after_a_bad_file(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    code, out, err = run(capsys, "check", policy.with_name("missing.kvp"), policy)
    assert code == 1 and f"{policy}: fine" in out and "missing.kvp: error[K011]" in err


def test_check_takes_every_policy_of_a_file(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    policy.write_text(GOOD + "\n" + GOOD.replace("mine", "other"))
    code, out, _ = run(capsys, "check", policy)
    assert (code, out) == (0, f"{policy}: fine (mine, other)\n")
    code, out, _ = run(capsys, "check", policy, "--name", "other")
    assert (code, out) == (0, f"{policy}: fine (other)\n")
    code, _, err = run(capsys, "check", policy, "--name", "third")
    assert code == 1 and "K013" in err


def test_check_json(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    policy.write_text(BAD)
    code, out, err = run(capsys, "check", "--json", policy, "snapkv")
    bad, good = json.loads(out)
    assert (code, err) == (1, "")
    finding = next(f for f in bad["findings"] if f["severity"] == "error")
    assert (finding["code"], finding["line"], finding["column"]) == ("K101", 2, 24)
    assert [p["name"] for p in good["policies"]] == ["snapkv"]
    assert not [f for f in good["findings"] if f["severity"] == "error"]


def test_check_ast(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    code, out, _ = run(capsys, "check", "--ast", policy)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "File 1:1"
    assert "  Policy 1:1 name=mine" in lines
    assert "        Selection 2:20 rank=top" in lines
    code, out, _ = run(capsys, "check", "--ast", "--json", policy)
    tree = json.loads(out)[0]["ast"]
    assert tree["node"] == "File" and tree["children"][0]["name"] == "mine"


def test_check_strict_counts_warnings(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    policy.write_text(GOOD.replace("budget=16", "budget=16, unused=3"))
    code, _, err = run(capsys, "check", policy)
    assert code == 0 and "warning[K117]" in err
    code, out, err = run(capsys, "check", "--strict", policy)
    assert code == 1 and "fine" not in out and "0 errors, 1 warning" in err


def test_check_refuses_what_cannot_be_lowered(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", "kivi")
    assert code == 1 and "error[K9" in err and "kivi.kvp:" in err


def test_check_takes_parameters(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    assert run(capsys, "check", policy, "--set", "budget=10% of prompt")[0] == 0
    code, _, err = run(capsys, "check", policy, "--set", "bugdet=3")
    assert code == 1 and "K104" in err and "budget" in err


def test_check_tells_every_broken_clause(capsys: pytest.CaptureFixture[str], policy: Path) -> None:
    policy.write_text("policy mine():\n    kep all\n    at step step\n")
    code, _, err = run(capsys, "check", policy)
    assert code == 1 and f"{policy}:2:5: error[K001]" in err and f"{policy}:3:13: error[K001]" in err


# ------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chekc"], "chekc"),
        (["check"], "FILE"),
        (["fmt"], "FILE"),
        (["fmt", "-", "-"], "once"),
        (["explain", "snapkv"], "--model"),
        (["run", "snapkv", "--model", "M"], "--prompt"),
        (["run", "snapkv", "--model", "M", "--prompt", "  "], "empty"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--prompt-file", "b"], "not both"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--backend", "cuda"], "reference"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--compile", "yes"], "inductor"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--set", "budget"], "NAME=VALUE"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--set", "backend=cpu"], "option"),
        (["run", "snapkv", "--model", "M", "--prompt", "a", "--set", "a=1", "--set", "a=2"], "twice"),
        (["inspect", "snapkv", "--model", "M", "--arch", "sm_90"], "--kernel"),
    ],
)
def test_wrong_usage_is_two(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and said in err


def test_commands_not_built_are_absent(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("check", "fmt", "explain", "run", "inspect", "verify", "kernels"):
        assert f"\n  {command} " in out
    for command in ("tune", "bench", "learn", "eval", "export"):
        assert run(capsys, command)[0] == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import kvcompile

    assert run(capsys, "--version")[:2] == (0, f"kvcompile {kvcompile.__version__}\n")


# ------------------------------------------------------------------ bad folders and files


def test_bad_model_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path, policy: Path) -> None:
    def explain(folder: Path) -> str:
        code, out, err = run(capsys, "explain", "snapkv", "--model", folder)
        assert code == 1 and out == "" and len(err.splitlines()) < 12
        return err

    assert "does not exist" in explain(tmp_path / "missing")
    assert "is a file" in explain(policy)
    assert "config.json" in explain(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    assert "cannot load the configuration" in explain(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "no_such_model" in explain(tmp_path)


def test_bad_weights(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x00\x01 no weights")
    code, _, err = run(capsys, "run", "keep_all", "--model", tmp_path, "--prompt", "w5")
    assert code == 1 and "cannot load the model" in err


def test_bad_prompt_files(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    code, _, err = run(capsys, "run", "keep_all", "--model", folder, "--prompt-file", tmp_path / "missing.txt")
    assert code == 1 and "missing.txt: No such file" in err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, _, err = run(capsys, "run", "keep_all", "--model", folder, "--prompt-file", tmp_path / "latin.txt")
    assert code == 1 and "UTF-8" in err


@pytest.mark.parametrize("command", ["explain", "inspect", "verify"])
def test_bad_policies(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, command: str) -> None:
    code, _, err = run(capsys, command, "snapvk", "--model", folder)
    assert code == 1 and "error[K013]" in err and "snapkv" in err
    code, _, err = run(capsys, command, f"{tmp_path}/", "--model", folder)
    assert code == 1 and "error[K011]" in err and "directory" in err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, policy: Path) -> None:
    """An error that no user made keeps its traceback: it is ours."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kvcompile.cli_check.examine", broken)
    with pytest.raises(ZeroDivisionError):
        main(["check", str(policy)])


# ------------------------------------------------------------------ on a model


def test_explain(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["explain", "streaming", "--model", folder, "--prompt", 512, "--set", "n_sink=4", "--set", "window=60"]
    code, out, err = run(capsys, *arguments, "--json")
    facts = json.loads(out)
    assert code == 0, err
    assert facts["layers"] and 0 < facts["bytes"] < facts["bytes_full"]
    assert facts["classes"]["all"]["triggers"] == {"chunk": 512, "step": 1}
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "footprint" in out and "overshoot" in out
    code, out, _ = run(capsys, *arguments, "--gpu", "h100")
    assert code == 0 and out.splitlines()[-1].startswith("H100 ")
    code, out, err = run(capsys, *arguments, "--gpu", "abacus")
    assert code == 1 and out == "" and "abacus" in err and "H200" in err


def test_run_prints_text_and_report(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ["run", "snapkv", "--model", folder, "--max-new-tokens", 4, "--set", "budget=16", "--set", "observe=4"]
    code, out, err = run(capsys, *arguments, "--prompt", PROMPT, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert len(answer["tokens"]) == 4 and answer["report"]["bytes_resident"] < answer["report"]["bytes_full"]
    code, out, err = run(capsys, *arguments, "--prompt-file", tmp_path / "prompt.txt")
    assert code == 0 and out.splitlines()[0] == answer["text"] and "footprint" in out and "footprint" not in err


def test_a_byte_limit_is_planned_with_and_held(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    asked = ("keep_all", "--model", folder, "--max-bytes", "300kB", "--json")
    code, out, _ = run(capsys, "explain", *asked, "--prompt", 60)
    found = json.loads(out)
    assert code == 0 and found["max_bytes"] == 300 * 1024 and found["fits"] is True and found["batch_that_fits"] == 1
    code, out, err = run(capsys, "run", *asked[:-1], "--prompt", PROMPT, "--max-new-tokens", 200)
    assert code == 1 and "max_bytes is 300.0 KiB" in err and "bytes more than allowed" in err
    begun = out.split()
    code, out, err = run(capsys, "run", *asked, "--prompt", PROMPT, "--max-new-tokens", len(begun))
    assert code == 0, err
    said = json.loads(out)
    assert code == 0 and said["text"].split() == begun and len(begun) > 2
    assert said["report"]["bytes_peak"] <= 300 * 1024
    for wrong in ("much", "0", "-3", "2GiBs"):
        code, _, err = run(capsys, "explain", "keep_all", "--model", folder, f"--max-bytes={wrong}")
        assert code == 2 and "2GiB" in err and "--max-bytes" in err


def test_run_keep_all_is_the_model(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    want = out[0, ids.shape[1] :].tolist()
    arguments = ["run", "keep_all", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 6, "--json"]
    code, printed, _ = run(capsys, *arguments)
    assert code == 0 and json.loads(printed)["tokens"] == want


def test_verify_agrees_with_the_reference(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["verify", "h2o", "--model", folder, "--backend", "cpu", "--length", 96, "--steps", 4, "--json"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    outcome = json.loads(out)
    assert outcome["ok"] and outcome["kept_differing"] == 0 and outcome["kept_entries"] > 0
    assert outcome["logit_error"] <= outcome["logit_bound"]
    assert 0 < outcome["kept_fraction"] < 0.5 and outcome["kl_mean"] > 0


def test_verify_keep_all_loses_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, err = run(capsys, "verify", "keep_all", "--model", folder, "--prompt", PROMPT, "--steps", 3)
    assert code == 0, err
    assert "agrees with the reference" in out and "100.0% held" in out and "100.0% the same" in out


def test_verify_fails_where_a_backend_is_wrong(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvcompile.verify as verify_module

    honest = verify_module._trace
    runs: list[object] = []

    def dishonest(*arguments: Any) -> Any:
        trace = honest(*arguments)
        runs.append(trace)
        if len(runs) != 2:  # the second run is the backend's
            return trace
        first = (trace.kept[1][0][0] - {max(trace.kept[1][0][0])}, *trace.kept[1][0][1:])
        return verify_module.Trace(trace.logits, trace.tokens, (trace.kept[0], (first, *trace.kept[1][1:])))

    monkeypatch.setattr(verify_module, "_trace", dishonest)
    code, out, _ = run(capsys, "verify", "streaming", "--model", folder, "--length", 40, "--steps", 2)
    assert code == 1 and "DIFFERS" in out and "layer 0 head 0 at the end" in out and "1 differ" in out


SNAPKV = ["--set", "budget=16", "--set", "observe=4"]


def test_inspect_shows_plan_and_passes(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["inspect", "snapkv", "--model", folder, *SNAPKV]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert "keep top(12) by maxpool(mean[g] sum[q] attn[q in last(4)], 7) per head" in out
    assert "passes (--after NAME): lower, bind, budgets, schedule, memory, graph" in out
    code, out, _ = run(capsys, *arguments, "--after", "bind")
    assert code == 0 and "kv.site 1" in out
    code, out, _ = run(capsys, *arguments, "--after", "lower", "--json")
    assert code == 0 and list(json.loads(out)) == ["lower"]
    code, _, err = run(capsys, *arguments, "--after", "bnid")
    assert code == 1 and "no such pass" in err and "bind" in err


def test_inspect_shows_the_graph(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, err = run(capsys, "inspect", "streaming", "--model", folder, "--after", "graph")
    assert code == 0, err
    assert "evict" in out


def test_kernels_are_listed_and_shown(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    code, out, err = run(capsys, "kernels")
    assert (code, out) == (0, "") and "no kernels" in err
    code, out, err = run(capsys, "kernels", "snapkv", "--model", folder, *SNAPKV, "--json")
    assert code == 0, err
    files = {kernel["name"]: kernel["path"] for kernel in json.loads(out)["kernels"]}
    name = next(key for key in files if key.startswith("decode"))
    code, out, _ = run(capsys, "inspect", "snapkv", "--model", folder, *SNAPKV, "--kernel", name)
    assert code == 0 and out.rstrip() == Path(files[name]).read_text().rstrip()
    compile(out, name, "exec")
    code, _, err = run(capsys, "inspect", "snapkv", "--model", folder, *SNAPKV, "--kernel", "no_such_kernel")
    assert code == 1 and "no_such_kernel" in err and name in err
    code, out, _ = run(capsys, "kernels")
    assert code == 0 and str(files[name]) in out


@pytest.mark.slow
def test_inspect_says_what_a_kernel_needs(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for a GPU that is not here, in a process of its own."""
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    arguments = ["inspect", "streaming", "--model", folder, "--backend", "reference"]
    plan = json.loads(run(capsys, *arguments, "--json")[1])
    name = next(key for key in plan["kernels"] if key.startswith("decode"))
    code, out, err = run(capsys, *arguments, "--kernel", name, "--arch", "sm_90")
    assert code == 0, err
    assert "sm_90" in out and "registers" in out and "shared" in out
    code, _, err = run(capsys, *arguments, "--kernel", name, "--arch", "sm_1")
    assert code == 1 and "sm_1" in err
