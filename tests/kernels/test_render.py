"""Generated files: same input, same text; names that tell facts; files that stand alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from kvcompile.kernels.choose import decode_spec, evict_spec, specs_for, unprintable
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS, gpu
from kvcompile.kernels.headers import Sizes, header_for
from kvcompile.kernels.plan import Expr, PolicyPlan, Region, Selection
from kvcompile.kernels.render import folder, render, write
from kvcompile.kernels.roofline import Traffic
from kvcompile.kernels.triton_backend.library import library, write_kernels
from tests.kernels.triton_interpreted.plans import ACC, H2O, PREFILL_END, STEP, attn, no_interpreter, plan, reduce

POOLED = Expr("pool", (reduce("mean", "g", reduce("sum", "q", attn("last", 64))),), ("max", 7))


def h2o(**facts: object) -> PolicyPlan:
    keep = (Region("recent", 0), Selection("top", ACC, 1))
    return plan(
        keep, (H2O,), triggers=(PREFILL_END, STEP), **({"head_dim": 128, "group": 4, "dtype": "bfloat16"} | facts)
    )  # type: ignore[arg-type]


def adakv() -> PolicyPlan:
    term = Selection("top", POOLED, 1, scope="across", floor=Fraction(1, 5))
    return plan((Region("recent", 0), term), triggers=(PREFILL_END,), by_position=True, dtype="bfloat16")


def test_names_spell_the_facts() -> None:
    assert [spec.name for spec in specs_for(h2o())] == [
        "decode_g4_d128_p16_bf16_acc",
        "prefill_g4_d128_p16_bf16",
        "pack_d128_p16_bf16",
        "evict_d128_p16_h1_bf16_head_acc",
        "select_h1_head_top",
        "columns_g4_d128_w0_bf16_acc",
    ]
    assert [spec.name for spec in specs_for(adakv())] == [
        "decode_g2_d64_p16_bf16",
        "prefill_g2_d64_p16_bf16",
        "pack_d64_p16_bf16",
        "columns_g2_d64_w64_bf16_last",
        "pool_max7",
        "select_h2_across_top",
    ]
    assert unprintable(h2o()) == unprintable(adakv()) == ()


def test_two_formulas_under_one_name_are_set_apart() -> None:
    policy = adakv()
    (cls, rest) = policy.classes
    other = Selection("top", Expr("pool", (reduce("max", "g", reduce("sum", "q", attn("last", 64))),), ("max", 7)), 1)
    two = replace(
        policy, classes=(cls, replace(rest, keep=(other,), triggers=(PREFILL_END,))), class_of=((0, 1), (0, 1))
    )
    names = [spec.name for spec in specs_for(two)]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("columns_") for name in names) == 2


def test_text_is_deterministic_and_parses() -> None:
    for policy in (h2o(), adakv()):
        for spec in specs_for(policy):
            text = render(spec, header_for(policy, spec))
            assert text == render(spec, header_for(policy, spec))
            tree = ast.parse(text)
            assert (ast.get_docstring(tree) or "").startswith(spec.name)
            assert not [line for line in text.split("\n") if len(line) > 130 or line != line.rstrip()]
            assert "kvcompile" not in {
                a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
            }
            assert not any(isinstance(n, ast.ImportFrom) for n in ast.walk(tree)), "a generated file stands alone"


def test_a_launch_reads_nothing_back() -> None:
    """A device value on the host would stop the stream: no launch may ask for one."""
    for policy in (h2o(), adakv()):
        for spec in specs_for(policy):
            tree = ast.parse(render(spec, header_for(policy, spec)))
            (launch,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "launch")
            calls = [n.func for n in ast.walk(launch) if isinstance(n, ast.Call)]
            names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
            assert not names & {"item", "tolist", "cpu", "int", "bool", "float", "nonzero", "any", "all"}, spec.name


def test_the_digest_follows_facts_and_formulas_only() -> None:
    spec = decode_spec(h2o())
    assert spec.digest() == decode_spec(h2o()).digest() and len(spec.digest()) == 16
    assert spec.digest() != decode_spec(h2o(head_dim=64)).digest()
    assert spec.digest() == decode_spec(h2o(), "fp16").digest() != decode_spec(h2o(), "fp32").digest()
    changed = replace(h2o(), states=(replace(H2O, add=reduce("max", "g", reduce("sum", "q", attn()))),))
    assert spec.digest() != decode_spec(changed).digest()
    assert replace(spec, tag="other").digest() == spec.digest()


def test_the_header_shows_formula_bytes_and_arithmetic() -> None:
    policy = h2o(kv_heads=8, layers=32)
    text = render(decode_spec(policy), header_for(policy, decode_spec(policy), Sizes(4, 8192, GPUS["H100"])))
    header = ast.get_docstring(ast.parse(text)) or ""
    # 4 sequences, 8 heads, 8192 entries of 512 bytes: 128 MiB; logits 2 x 4 heads x 2 B, state 8 B an entry.
    for part in (
        "mean[g] sum[q] attn",
        "keys and values 128.0 MiB",
        "logits out and in 4.0 MiB",
        "states in and out 2.0 MiB",
    ):
        assert part in " ".join(header.split()), header
    want = (128 + 4 + 2) * 2**20 / 3.35e12 * 1e6
    assert f"({want:.1f} us) + 2 x 3 us" in " ".join(header.split())
    assert "32 layers of 8 KV heads (any model), two launches a layer" in header
    # Every query of a piece is read once, and there are `group` of them for each key.
    piece = next(spec for spec in specs_for(policy) if spec.template == "columns")
    parts = dict(header_for(policy, piece, Sizes(4, 8192)).traffic.parts)
    assert parts["keys, each pass"] == 4 * 8 * 8192 * 256
    assert parts["queries, each pass"] == policy.facts.group * parts["keys, each pass"]


def test_predictions_take_the_tighter_bound() -> None:
    h200 = gpu("NVIDIA H200")
    assert Traffic((("a", 48 * 10**8),)).seconds(h200) == pytest.approx(1e-3 + 3e-6)
    assert Traffic((("a", 8),), 2, operations=989 * 10**9).seconds(h200) == pytest.approx(1e-3 + 6e-6)
    with pytest.raises(KvCompileError, match="known: A100"):
        gpu("Voodoo 2")


def test_files_are_written_once_and_only_where_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    policy = h2o()
    files = write_kernels(policy)
    place = folder(policy.name, policy.digest)
    assert place.parent == tmp_path / "kernels"
    assert {path.name for path in place.iterdir()} == {f"{name}.py" for name in files}
    path = files["pack_d128_p16_bf16"].path
    stamp = path.stat().st_mtime_ns
    write(files["pack_d128_p16_bf16"].source, path)
    assert path.stat().st_mtime_ns == stamp
    write("changed\n", path)
    assert path.read_text() == "changed\n" and not list(place.glob("*.tmp"))


def test_what_has_no_form_is_listed_and_left_out() -> None:
    anchor = reduce("mean", "i", Expr("field", (), "k"))
    key = Expr("pair", (Expr("field", (), "k"), anchor), "cos")
    policy = plan((Selection("bottom", key, 1), Region("random", 0)), triggers=(PREFILL_END, STEP))
    reasons = unprintable(policy)
    assert any("some, after a step" in r and "random" in r for r in reasons)
    assert any("some, prefill" in r and "mean[i] over the entries of a row" in r for r in reasons)
    assert {spec.template for spec in specs_for(policy)} == {"decode", "prefill", "pack", "select"}
    assert unprintable(plan((Region("all"),), head_dim=80)) == ()
    assert "head_dim 84 is not a multiple of 8" in unprintable(plan((Region("all"),), head_dim=84))[0]
    assert "head_dim 264 is above 256" in unprintable(plan((Region("all"),), head_dim=264))[0]
    with pytest.raises(Exception, match="several selections"):
        evict_spec(plan((Selection("top", ACC, 0), Selection("top", ACC, 1)), (H2O,)), 0)


def test_the_library_finds_a_module_by_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    policy = adakv()
    found = library(policy)
    term = policy.classes[0].selections[0]
    assert found.decode().HEAD_DIM == 64 and found.decode().LOGITS is None
    assert [template for template, _ in found.scores(term)] == ["columns", "pool"]
    assert found.select(0, term).HEADS == 2 and found.pack().PAGE == 16
    assert found.decode() is library(policy).decode()


@pytest.mark.skipif(bool(no_interpreter()), reason=no_interpreter())
@pytest.mark.parametrize("template", ["decode", "evict"])
def test_a_file_checks_itself_and_says_where_there_is_no_gpu(tmp_path: Path, template: str) -> None:
    pytest.importorskip("triton")
    policy = h2o(head_dim=64, group=2)
    spec = next(spec for spec in specs_for(policy) if spec.template == template)
    path = write(render(spec, header_for(policy, spec)), tmp_path / f"{spec.name}.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, path.name, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = run("--check", "--bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check passed: float32 on the interpreter" in done.stdout
    assert "bench: no GPU here, nothing was measured" in done.stdout
    assert "usage" in run("--chekc").stderr

    right, wrong = {
        "decode": ("p, 0.0), 1) / GROUP", "p, 0.0), 1) / 3"),
        "evict": ("won = candidate & ((key > bar)", "won = candidate & ((key >= bar)"),
    }[template]
    broken = path.read_text().replace(right, wrong)
    assert broken != path.read_text()
    path.write_text(broken)
    done = run("--check")
    assert done.returncode != 0, f"a broken kernel passes its own check: {done.stdout}"
