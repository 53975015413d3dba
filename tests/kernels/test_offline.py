"""Every generated kernel compiles for three architectures on a machine without a GPU, and fits there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.offline import ARCHES, Resources, compile_apart, compile_offline
from kvcompile.kernels.plan import Expr, PolicyPlan, Region, Selection
from kvcompile.kernels.triton_backend.library import write_kernels
from tests.kernels.triton_interpreted.plans import ACC, H2O, PREFILL_END, STEP, attn, plan, reduce
from tests.kernels.triton_interpreted.read_plans import EVERY

pytest.importorskip("triton")
BIG = {"head_dim": 128, "group": 4, "kv_heads": 8, "layers": 32, "dtype": "bfloat16"}
READS = {"head_dim": 128, "group": 4, "kv_heads": 1, "dtype": "bfloat16"}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}


def policies() -> dict[str, PolicyPlan]:
    last = reduce("mean", "g", reduce("sum", "q", attn("last", 64)))
    pooled = Expr("pool", (last,), ("max", 7))
    norm = Expr("unary", (Expr("field", (), "k"),), "norm")
    one = reduce("mean", "h", reduce("sum", "q", attn("last", 1)))
    both = (PREFILL_END, STEP)
    recent = Region("recent", 0)
    across = Selection("top", pooled, 1, scope="across", floor=Fraction(1, 5))
    return {
        "h2o": plan((recent, Selection("top", ACC, 1)), (H2O,), triggers=both, **BIG),  # type: ignore[arg-type]
        "tova": plan((Selection("top", one, 1, scope="shared"),), triggers=both, **BIG),  # type: ignore[arg-type]
        "adakv": plan((recent, across), triggers=(PREFILL_END,), by_position=True, **BIG),  # type: ignore[arg-type]
        "knorm": plan((Selection("bottom", norm, 1),), triggers=(PREFILL_END,), **BIG),  # type: ignore[arg-type]
        "streaming": plan((Region("sink", 0), Region("recent", 1)), by_position=True, **BIG),  # type: ignore[arg-type]
    }


def compiled(name: str, place: Path, arches: tuple[str, ...], *wanted: str) -> dict[str, tuple[Resources, ...]]:
    files = write_kernels(policies()[name], place)
    paths = [file.path for file in files.values() if not wanted or file.spec.template in wanted]
    return compile_apart(paths, arches)


def test_decode_and_evict_fit_a_hopper(tmp_path: Path) -> None:
    table = compiled("h2o", tmp_path, ("sm_90",), "decode", "evict")
    decode, combine = table["decode_g4_d128_p16_bf16_acc"]
    (evict,) = table["evict_d128_p16_h1_bf16_head_acc"]
    assert "wgmma" in decode.instructions and "cp.async" in decode.instructions
    for used in (decode, combine, evict):
        assert used.fits and 16 <= used.registers <= 255
        assert used.spill_stores == used.spill_loads == 0
        assert f".entry {used.kernel}" in used.ptx and used.kernel in used.line()
    # As many programs stand on a multiprocessor as work units are aimed at: three.
    assert decode.registers * decode.warps * 32 * 3 <= 65536
    assert (decode.shared + 1024) * 3 <= 228 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", policies())
def test_every_kernel_of_every_policy_compiles_everywhere(tmp_path: Path, name: str) -> None:
    table = compiled(name, tmp_path, ARCHES)
    assert len(table) == len(list(tmp_path.glob("*.py")))
    for kernels in table.values():
        assert {used.arch for used in kernels} == set(ARCHES)
        for used in kernels:
            assert used.fits and used.registers > 0
            assert used.spill_stores <= 64, used.line()
            if used.kernel in ("decode_kernel", "columns_kernel"):
                assert MATRIX[used.arch] in used.instructions


def compiled_once(plan: PolicyPlan, place: Path, *wanted: str) -> dict[str, tuple[Resources, ...]]:
    """Kernels of a plan as they are where every size that may be 1 is."""
    paths = []
    for file in write_kernels(plan, place).values():
        if not wanted or file.spec.template in wanted:
            file.path.write_text(file.source + ONCE.format(ones=ONES))
            paths.append(file.path)
    return compile_apart(paths, ("sm_90",))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*policies(), *EVERY])
def test_a_batch_of_one_compiles_too(tmp_path: Path, name: str) -> None:
    """Triton makes a constant of an integer argument that is 1: nothing in a kernel may ask more of it."""
    plan = EVERY[name](**READS) if name in EVERY else policies()[name]
    table = compiled_once(plan, tmp_path)
    assert all(used.registers > 0 for kernels in table.values() for used in kernels)


def test_a_read_of_a_single_row_compiles(tmp_path: Path) -> None:
    """One sequence on one KV head of one query head, which chooses."""
    table = compiled_once(EVERY["quest"](**READS | {"group": 1}), tmp_path, "units", "spans")
    assert sorted(used.kernel for kernels in table.values() for used in kernels) == [
        "choose_kernel", "combine_kernel", "decode_kernel", "units_kernel",
    ]  # fmt: skip


ONCE = """
OFFLINE = tuple(
    (
        kernel,
        types | {{"i32": " ".join(a for a in types["i32"].split() if a not in {ones})}},
        constants | {{a: 1 for a in types["i32"].split() if a in {ones}}},
        options,
    )
    for kernel, types, constants, options in OFFLINE
)
"""
ONES = (
    "rows", "kv_heads", "batch", "n", "n_q", "splits", "all_heads", "groups", "tiles", "table_row", "now_b", "prompt_b",
    "fires_b", "active_b", "counts_b", "counts_n", "counts_l", "clock_b", "lse_b", "target", "state_s", "heads",
    "columns", "units", "blocks", "score_units", "words", "chunks", "blocks_q", "most", "span_row", "numbers_l",
    "numbers_n", "numbers_b", "read", "opens",
)  # fmt: skip


@pytest.mark.parametrize("name", ["h2o", "adakv"])
def test_a_layer_or_a_prompts_length_makes_no_kernel_of_its_own(tmp_path: Path, name: str) -> None:
    """Numbers of layers lie 8 bytes apart: Triton would compile everything twice, and anew as prompts differ."""
    seen = set()
    for file in write_kernels(policies()[name], tmp_path).values():
        module = file.module()
        for kernel, *_ in module.OFFLINE:
            for argument in getattr(module, kernel).params:
                if argument.name == "layer":
                    assert argument.do_not_specialize_on_alignment, kernel
                    seen.add(kernel)
                if argument.name in ("columns", "tiles", "n_q", "splits"):
                    assert argument.do_not_specialize, kernel
                    seen.add(kernel)
    assert seen >= {"decode_kernel", "combine_kernel", "prefill_kernel", "reserve_kernel", "pack_kernel"}


def test_the_interpreter_is_refused_by_name(tmp_path: Path) -> None:
    path = next(iter(write_kernels(policies()["streaming"], tmp_path).values())).path
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    code = "from pathlib import Path; from kvcompile.kernels.offline import compile_offline; "
    code += f"compile_offline(Path({str(path)!r}), 'sm_90')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "KvCompileError: TRITON_INTERPRET is set" in done.stderr


def test_unknown_architectures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KvCompileError, match="known: sm_80"):
        compile_offline(tmp_path / "none.py", "sm_70")
    with pytest.raises(KvCompileError, match="offline compilation failed"):
        compile_apart([tmp_path / "none.py"], ["sm_90"])


def test_resources_travel_as_json() -> None:
    used = Resources("k", "sm_80", 40, 0, 0, 200 * 1024, 0, 4, ("mma.sync",), ".entry k")
    assert not used.fits and "40 registers, no spills" in used.line()
    assert json.loads(json.dumps({"i": used.instructions}))["i"] == ["mma.sync"]
