"""`kernels` and `inspect --kernel`: both targets, their status, and what is said where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile import backends
from kvcompile.cli import main
from kvcompile.kernels import tuning
from kvcompile.kernels.choose import decode_spec
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.cpp_backend.library import cpp_names
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.offline import Resources
from kvcompile.kernels.plan import ModelFacts
from kvcompile.kernels.status import Missing, missing, rows
from kvcompile.kernels.tuning import key_of, versions
from kvcompile.kernels.tuning_space import default
from kvcompile.kernels.tuning_store import Bucket, Entry, save
from kvcompile.passes import compile_policy
from tests.kernels.test_cpp_build import forget, script
from tests.models import random_model, tokens

SNAPKV = ["--set", "budget=16", "--set", "observe=4"]
GCC = says_why_not() is None
needs_compiler = pytest.mark.skipif(not GCC, reason=str(says_why_not()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small Llama; no weights, which these commands do not read."""
    where = tmp_path_factory.mktemp("model")
    random_model("llama64", num_hidden_layers=2).config.save_pretrained(where)
    return where


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    forget()
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVC_TUNED", str(tmp_path / "tuned"))
    yield tmp_path
    forget()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def listed(capsys: pytest.CaptureFixture[str], folder: Path, *more: object) -> dict[str, Any]:
    code, out, err = run(capsys, "kernels", "snapkv", "--model", folder, *SNAPKV, "--json", *more)
    assert code == 0, err
    return json.loads(out)


def kernels_of(capsys: pytest.CaptureFixture[str], folder: Path, target: str, *more: object) -> list[dict[str, Any]]:
    return [row for row in listed(capsys, folder, *more)["kernels"] if row["target"] == target]


# ------------------------------------------------------------------ kernels


def test_both_targets_are_listed(capsys: pytest.CaptureFixture[str], folder: Path, fresh: Path) -> None:
    answer = listed(capsys, folder, "--gpu", "A100")
    assert list(answer) == ["policy", "gpu", "cpu", "kernels", "without_kernel"]
    assert (answer["policy"], answer["gpu"]) == ("snapkv", "A100")
    for row in answer["kernels"]:
        assert list(row) == ["name", "target", "purpose", "status", "reason", "constants", "path"]
        path = Path(row["path"])
        assert path.is_file() and path.is_relative_to(fresh / "cache" / "kernels") and path.stem == row["name"]
        assert (row["target"] == "c++") == row["name"].endswith("_cpp") == (path.suffix == ".cpp")
    triton = [row for row in answer["kernels"] if row["target"] == "triton"]
    assert {row["status"] for row in triton} == {"rendered"} and {row["constants"] for row in triton} == {"default"}
    assert {row["name"].split("_")[0] for row in triton} >= {"decode", "pack", "columns", "pool", "select"}
    for what in answer["without_kernel"]:
        assert list(what) == ["what", "target", "instead"]


def test_the_table_has_every_kernel(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    names = [row["name"] for row in listed(capsys, folder)["kernels"]]
    code, out, _ = run(capsys, "kernels", "snapkv", "--model", folder, *SNAPKV)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["kernel", "target", "status", "for"]
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    assert lines[1 + len(names)].startswith("files in ") and lines[-1].startswith("cpu: ")
    assert "rendered: default constants, none tuned for H200" in lines  # once, below the table
    code, out, _ = run(capsys, "kernels")
    assert code == 0 and all(f"/{name}" in out for name in names)


@needs_compiler
def test_built_means_built_and_sound(capsys: pytest.CaptureFixture[str], folder: Path, fresh: Path) -> None:
    before = kernels_of(capsys, folder, "c++")
    assert before and {row["status"] for row in before} == {"not built"} and "--build" in before[0]["reason"]
    after = kernels_of(capsys, folder, "c++", "--build")
    assert {(row["status"], row["reason"]) for row in after} == {("built", "")}
    assert kernels_of(capsys, folder, "c++") == after
    for path in (fresh / "cache" / "built").glob("*.so"):
        path.write_bytes(bytes(64))
    assert kernels_of(capsys, folder, "c++") == before


def test_no_compiler_is_the_reason(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVC_CXX", "none")
    answer = listed(capsys, folder, "--build")
    cpp = [row for row in answer["kernels"] if row["target"] == "c++"]
    assert cpp and {row["status"] for row in cpp} == {"not built"}
    assert all("switched off by KVC_CXX=none" in row["reason"] and "runs instead" in row["reason"] for row in cpp)
    assert answer["cpu"].startswith("cpu: packed SDPA and torch (C++ kernels are switched off")
    code, out, _ = run(capsys, "inspect", "snapkv", "--model", folder, *SNAPKV)
    assert code == 0 and answer["cpu"] in out
    reasons = [
        line
        for line in run(capsys, "kernels", "snapkv", "--model", folder, *SNAPKV)[1].splitlines()
        if "runs instead" in line
    ]
    assert [line for line in reasons if line.startswith("decode") and line.endswith("packed SDPA runs instead")]
    assert [line for line in reasons if "select_h1_head_top_cpp" in line and line.endswith("torch runs instead")]


def test_tuned_constants_are_named_with_their_source(
    capsys: pytest.CaptureFixture[str], folder: Path, fresh: Path
) -> None:
    plan = compiled(folder)
    spec, gpu = decode_spec(plan), GPUS["H200"]
    key = key_of(spec, gpu, Bucket.of(plan.facts.kv_heads, 4096))
    save((Entry(key, default(spec), "timed", 1e-5, spec.name, spec.facts, versions()),), gpu)
    row = next(row for row in kernels_of(capsys, folder, "triton", "--gpu", "H200") if row["name"] == spec.name)
    assert (row["constants"], row["reason"]) == ("user, timed", "tuned by timing on H200 (user file)")
    row = next(row for row in kernels_of(capsys, folder, "triton", "--gpu", "B200") if row["name"] == spec.name)
    assert (row["constants"], row["reason"]) == ("default", "default constants, none tuned for B200")
    # Of another version of the templates: left out, with the file's name.
    tuning._tell_stale.cache_clear()
    path = save((Entry(replace(key, space="0" * 16), default(spec), "timed", 1e-5, spec.name, spec.facts),), gpu)
    with pytest.warns(UserWarning, match="another version of kvcompile") as told:
        found = rows(plan, gpu)
    assert str(path) in str(told[0].message) and {row.constants for row in found if row.target == "triton"} == {
        "default"
    }


def compiled(folder: Path) -> Any:
    from kvcompile.cli_inspect import _compiled

    return _compiled("snapkv", folder, {"name": None, "tables": None, "budget": "16", "observe": "4"}).plan


def test_what_has_no_kernel_names_what_runs_instead(folder: Path) -> None:
    plan = compiled(folder)
    odd = replace(plan, facts=replace(plan.facts, head_dim=20))
    found = missing(odd)
    decode = Missing(next(what.what for what in found if what.what.startswith("decode:")), "triton", "")
    assert "head_dim 20" in decode.what
    assert replace(decode, instead="the reference, in torch") in found
    assert replace(decode, target="c++", instead="packed SDPA") in found
    assert f"no Triton kernel: {decode.what}; the reference" in found[0].line()


def test_a_read_without_kernels_is_told_once_and_for_no_other_target() -> None:
    found = missing(compile_policy("graph_kv", ModelFacts(2, 4, 2, 32)).plan)
    said = [(what.target, what.what) for what in found if "span" in what.what]
    reason = "the region span has no kernel yet"
    assert said == [
        ("triton", f"all, decode: {reason}"),
        ("triton", f"all, prefill attention: {reason}"),
        ("c++", f"all, attend: {reason}"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "snapkv"], "go together"),
        (["kernels", "--build"], "goes with POLICY"),
        (["kernels", "--gpu", "H200"], "goes with POLICY"),
        (["inspect", "snapkv", "--model", "M", "--gpu", "H200"], "--gpu goes with --kernel"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and said in " ".join(err.replace("│", " ").split())


# ------------------------------------------------------------------ inspect --kernel


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Path], list[str]]]:
    """An offline compiler that answers at once: two functions, one of them bound by shared memory."""
    asked = []

    def compiled(paths: list[Path], arches: list[str]) -> dict[str, tuple[Resources, ...]]:
        asked.append((paths, arches))
        first = Resources("first", arches[0], 64, 0, 0, 1024, 0, 4, ("wgmma",), ".entry first")
        second = Resources("second", arches[0], 40, 8, 12, 100 * 1024, 0, 8, (), ".entry second")
        return {path.stem: (first, second) for path in paths}

    monkeypatch.setattr("kvcompile.inspection.compile_apart", compiled)
    return asked


def test_the_account_of_a_triton_kernel(capsys: pytest.CaptureFixture[str], folder: Path, offline: list[Any]) -> None:
    plan = compiled(folder)
    spec = decode_spec(plan)
    arguments = ["inspect", "snapkv", "--model", folder, *SNAPKV, "--kernel", spec.name]
    code, out, err = run(capsys, *arguments, "--arch", "sm_90")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == f"{spec.name} on sm_90, predicted for H200"
    assert lines[1].split("  ")[-1].strip() == "64 registers, no spills, 1024 B shared, wgmma"
    # 65536 registers, 2048 threads: 64 * 128 registers a block allow 8, threads 16.
    assert lines[2].strip() == "4 warps a block, 8 blocks a multiprocessor, 50% of its threads, limited by registers"
    assert "40 registers, spills 8+12 B" in lines[3]
    # 228 KiB of shared memory, of which a block takes 101.
    assert lines[4].strip().endswith("2 blocks a multiprocessor, 25% of its threads, limited by shared memory")
    entries = plan.facts.kv_heads * 4096
    total = entries * plan.facts.entry_bytes
    seconds = total / 4.8e12 + 2 * 3e-6
    assert f"{seconds * 1e6:.1f} us on H200 = {total / 2**20:.1f} MiB / 4.80 TB/s" in out
    assert f"launches, {6e-6 / seconds:.0%} of the predicted time" in lines[-1]
    code, out, _ = run(capsys, *arguments, "--gpu", "h100 pcie", "--json")
    answer = json.loads(out)
    assert (answer["arch"], answer["gpu"], answer["bytes"]) == ("sm_90", "H100-PCIE", total)
    assert answer["operations"] == 4 * entries * plan.facts.group * plan.facts.head_dim and answer["launches"] == 2
    assert answer["predicted_seconds"] == pytest.approx(total / 2.0e12 + 6e-6)
    assert [f["occupancy"] for f in answer["functions"]] == [0.5, 0.25] and "ptx" not in answer["functions"][0]
    assert offline[-1][1] == ["sm_90"]
    code, out, _ = run(capsys, *arguments, "--arch", "sm_86")
    assert code == 0 and "no GPU of it is known" in out and "us on" not in out


def test_a_launch_that_does_not_fit_says_so(folder: Path, offline: list[Any]) -> None:
    from kvcompile.kernels.account import Account

    used = Resources("k", "sm_89", 64, 0, 0, 150 * 1024, 0, 4, (), "")
    plan = compiled(folder)
    account = Account("k", "float32", "sm_89", (used,), header_for(plan, decode_spec(plan)), GPUS["L40S"])
    assert "no block fits: L40S gives one at most 99.0 KiB" in account.lines()[2]
    assert account.occupancy(used) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arch", "sm_90", "--gpu", "A100"], "A100 is sm_80, not sm_90"),
        (["--arch", "sm_90", "--gpu", "Voodoo"], "no facts about the GPU 'Voodoo'; known: A100"),
        (["--gpu", "Voodoo"], "no facts about the GPU 'Voodoo'; known: A100"),
        (["--arch", "sm_1"], "unknown architecture 'sm_1'; known: sm_80"),
        (["--gpu", "MI300X"], "unknown architecture 'gfx942'; known: sm_80"),
        (["--arch", "native"], "its arch is a GPU's"),
    ],
)
def test_unknown_gpus(capsys: pytest.CaptureFixture[str], folder: Path, more: list[str], said: str) -> None:
    name = decode_spec(compiled(folder)).name
    code, out, err = run(capsys, "inspect", "snapkv", "--model", folder, *SNAPKV, "--kernel", name, *more)
    assert (code, out) == (1, "") and said in err
    code, out, err = run(capsys, "kernels", "snapkv", "--model", folder, "--gpu", "Voodoo")
    assert (code, out) == (1, "") and "known: A100" in err


def test_the_account_of_a_cpp_kernel(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    name = cpp_names(compiled(folder))[0]
    arguments = ["inspect", "snapkv", "--model", folder, *SNAPKV, "--kernel", name]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith(f"/*\n{name}:")
    code, out, err = run(capsys, *arguments, "--arch", "sm_90")
    assert (code, out) == (1, "") and "its arch is native" in err
    code, out, err = run(capsys, *arguments, "--arch", "native", "--json")
    if not GCC:
        assert code == 1 and "no C++ compiler" in err
        return
    answer = json.loads(out)
    assert answer["vector_bits"] >= 128 and answer["instructions"] > 50 and answer["predicted_seconds"] > 0
    code, out, _ = run(capsys, *arguments, "--arch", "native")
    assert code == 0 and f"vectors of {answer['vector_bits']} bits" in out and "GB/s; predicted" in out


@needs_compiler
def test_no_compiler_for_assembly(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVC_CXX", "/bin/false")
    name = cpp_names(compiled(folder))[0]
    code, out, err = run(capsys, "inspect", "snapkv", "--model", folder, *SNAPKV, "--kernel", name, "--arch", "native")
    assert (code, out) == (1, "") and "/bin/false does not answer --version" in err


def test_artifacts_hold_both_targets() -> None:
    model: Any = kvcompile.optimize(random_model("llama64", num_hidden_layers=2), "streaming")
    art = kvcompile.inspect(model)
    cpp = {name: kernel for name, kernel in art.kernels.items() if name.endswith("_cpp")}
    assert set(cpp) == set(cpp_names(art.plan)) and set(art.kernels) - set(cpp)
    for name, kernel in art.kernels.items():
        assert kernel.path.read_text() == kernel.source and name in kernel.source
        assert kernel.config["head_dim"] == 64 if "head_dim" in kernel.config else True
        assert kernel.target == ("c++" if name in cpp else "triton")
    assert art.runs_on.startswith("cpu: ")
    first = next(iter(cpp.values()))
    if GCC:
        assert ".globl" in first.assembly()
    with pytest.raises(KvCompileError, match="has no PTX"):
        first.ptx("sm_90")
    with pytest.raises(KvCompileError, match="no assembly"):
        next(kernel for name, kernel in art.kernels.items() if name not in cpp).assembly()


# ------------------------------------------------------------------ something is missing


SMALL = 'case "$1" in --version) echo small 1.0;; *) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac'


@pytest.mark.parametrize("how", ["off", "not on the path", "false", "no OpenMP"])
def test_without_a_compiler_packed_sdpa_gives_the_same(fresh: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    ids = torch.tensor([tokens(60)])
    model: Any = random_model("llama64", num_hidden_layers=2)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with kvcompile.use(model, "snapkv", backend="reference", budget=16, observe=4):
        want = model.generate(ids, **options).tolist()
    match how:
        case "off":
            monkeypatch.setenv("KVC_CXX", "none")
        case "false":
            monkeypatch.setenv("KVC_CXX", "/bin/false")
        case "no OpenMP":
            monkeypatch.setenv("KVC_CXX", str(script(fresh, "small", SMALL)))
        case _:
            monkeypatch.delenv("KVC_CXX", raising=False)
            monkeypatch.setenv("PATH", str(fresh))
    with pytest.warns(UserWarning, match="runs packed SDPA and torch, which is slower") as told:
        for _ in range(2):
            with kvcompile.use(model, "snapkv", backend="cpu", budget=16, observe=4):
                assert model.generate(ids, **options).tolist() == want
                report = kvcompile.report(model)
    assert len([w for w in told if "packed SDPA" in str(w.message)]) == 1
    assert report.runs_on.startswith("cpu: packed SDPA and torch (") and report.runs_on in str(report)


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
sys.meta_path.insert(0, Blocker())
"""


def without_triton(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


COMMANDS = """
import json
from kvcompile.cli import main
from kvcompile.kernels.errors import KvCompileError
for command in json.loads(sys.argv[1]):
    print("===", command[0], main(command))
assert "triton" not in sys.modules
"""


def test_without_triton_the_commands_work_or_say_why(folder: Path) -> None:
    on = ["snapkv", "--model", str(folder), *SNAPKV]
    name = decode_spec(compiled(folder)).name
    commands = [
        ["check", "snapkv"],
        ["explain", *on],
        ["kernels", *on],
        ["inspect", *on],
        ["inspect", *on, "--kernel", name],
        ["tune", *on, "--gpu", "H200", "--effort", "none"],
        ["inspect", *on, "--kernel", name, "--arch", "sm_90"],
    ]
    done = without_triton(COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    codes = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("===")]
    assert codes == ["0"] * 6 + ["1"], done.stderr
    assert "default constants, none tuned for H200; Triton is not installed here" in done.stdout
    assert "Triton is not installed: registers and spills are guessed" in done.stderr
    assert "error: Triton is not installed, so no kernel can be run" in done.stderr and "Traceback" not in done.stderr


RUNS = """
import torch, kvcompile
from pathlib import Path
from tests.models import random_model, tokens
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.render import load
ids = torch.tensor([tokens(60)])
model = kvcompile.optimize(random_model("llama64", num_hidden_layers=2), "streaming")
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
print(kvcompile.report(model).runs_on)
kernel = next(kernel for kernel in kvcompile.inspect(model).kernels.values() if kernel.target == "triton")
for attempt in (lambda: load(kernel.path), lambda: kernel.ptx("sm_90"),
                lambda: kvcompile.optimize(random_model(), "snapkv", backend="triton")):
    try:
        attempt()
    except KvCompileError as error:
        print(error)
"""


def test_without_triton_the_cpu_runs() -> None:
    done = without_triton(RUNS)
    assert done.returncode == 0, done.stderr
    first, *errors = done.stdout.splitlines()
    assert first.startswith("cpu: ") and len(errors) == 3
    assert all("Triton is not installed" in error and "pip install triton" in error for error in errors)


def test_on_a_gpu_without_triton_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda")
    assert backends.backend_for("auto", there) == "triton"
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.warns(UserWarning, match="backend 'auto' runs the reference, which is slow: Triton is not installed"):
        assert backends.backend_for("auto", there) == "reference"


def test_a_cache_folder_that_cannot_be_used_is_one_line_of_warning(folder: Path, fresh: Path) -> None:
    (fresh / "cache").write_text("")
    command = [sys.executable, "-m", "kvcompile", "kernels", "snapkv", "--model", str(folder), *SNAPKV]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: the cache folder {fresh / 'cache'} is not used: Not a directory")
    assert "files in /" in done.stdout
