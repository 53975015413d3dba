"""No kernel spills with the constants that it has untuned, as Triton 3.7.1 compiles it for four architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import pytest

from kvcompile.kernels.choose import specs_for
from kvcompile.kernels.choose_listed import listed_specs
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.offline import Resources, compile_apart
from kvcompile.kernels.plan import Expr, PolicyPlan, Region, Selection
from kvcompile.kernels.render import render, write
from kvcompile.kernels.spec import KernelSpec
from kvcompile.passes.slide import slide
from tests.kernels.triton_interpreted.plans import ACC, H2O, PREFILL_END, STEP, attn, plan, reduce
from tests.kernels.triton_interpreted.read_plans import EVERY

pytest.importorskip("triton")
ARCHES = ("sm_80", "sm_89", "sm_90", "sm_100")
OWN = ("decode", "prefill", "columns", "keys", "pool", "select", "pack", "evict")
# Which registers a kernel takes is the compiler's choice: another version spills elsewhere.
pytestmark = pytest.mark.skipif(metadata.version("triton") != "3.7.1", reason="the constants are those of triton 3.7.1")


def policies(dtype: str, size: int, group: int) -> Iterator[PolicyPlan]:
    """A state that attention grows, in order and not; a window's columns, pooled and shared out; keys alone."""
    facts = {"dtype": dtype, "head_dim": size, "group": group, "kv_heads": 8, "layers": 32}
    recent, both = Region("recent", 0), (PREFILL_END, STEP)
    last = Expr("pool", (reduce("mean", "g", reduce("sum", "q", attn("last", 64))),), ("max", 7))
    norm = Expr("unary", (Expr("field", (), "k"),), "norm")
    across = Selection("top", last, 1, scope="across", floor=Fraction(1, 5))
    yield plan((recent, Selection("top", ACC, 1)), (H2O,), triggers=both, **facts)  # type: ignore[arg-type]
    yield plan((recent, Selection("top", ACC, 1)), (H2O,), triggers=both, by_position=True, **facts)  # type: ignore[arg-type]
    yield plan((recent, across), triggers=(PREFILL_END,), by_position=True, **facts)  # type: ignore[arg-type]
    yield plan((recent, Selection("bottom", norm, 1)), triggers=(PREFILL_END,), **facts)  # type: ignore[arg-type]


def varied(plain: PolicyPlan) -> PolicyPlan:
    """For a model with a soft-cap, sinks, and windows in every other layer."""
    facts = replace(plain.facts, softcap=50.0, sinks=True, windows=(4096, 0) * (plain.facts.layers // 2))
    return slide(replace(plain, facts=facts))


def compiled(
    place: Path,
    dtype: str,
    size: int,
    group: int,
    arches: tuple[str, ...],
    templates: tuple[str, ...] = OWN,
    model: Callable[[PolicyPlan], PolicyPlan] = lambda plain: plain,
) -> list[Resources]:
    specs: dict[KernelSpec, PolicyPlan] = {}
    for policy in map(model, policies(dtype, size, group)):
        specs |= {spec: policy for spec in specs_for(policy) if spec.template in templates}
    paths = [write(render(s, header_for(p, s)), place / f"{s.name}_{s.digest()}.py") for s, p in specs.items()]
    return [used for kernels in compile_apart(paths, arches).values() for used in kernels]


def spilled(found: list[Resources], **most: int) -> list[str]:
    """Those that spill more bytes than `most` says of a kernel: others may none."""
    assert found and all(used.registers > 0 for used in found)
    over = [used for used in found if max(used.spill_stores, used.spill_loads) > most.get(used.kernel, 0)]
    return [used.line() for used in found if used in over or not used.fits]


@pytest.mark.parametrize(
    ("dtype", "size", "group", "arch"),
    [
        ("bfloat16", 128, 4, "sm_90"),
        ("bfloat16", 128, 8, "sm_89"),
        ("float16", 64, 1, "sm_80"),
        ("float32", 96, 4, "sm_100"),
    ],
)
def test_reading_kernels_do_not_spill(tmp_path: Path, dtype: str, size: int, group: int, arch: str) -> None:
    assert spilled(compiled(tmp_path, dtype, size, group, (arch,), ("decode", "columns"))) == []


def test_choosing_and_moving_kernels_do_not_spill(tmp_path: Path) -> None:
    assert spilled(compiled(tmp_path, "bfloat16", 128, 4, ("sm_90",), ("select", "evict", "pack", "keys"))) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_variants_of_attention_compile_and_do_not_spill(tmp_path: Path, arch: str) -> None:
    assert spilled(compiled(tmp_path, "bfloat16", 96, 5, (arch,), ("decode", "columns", "evict"), varied)) == []


def reading(place: Path, dtype: str, size: int, group: int, arches: tuple[str, ...], *names: str) -> list[Resources]:
    """All kernels of narrowed reads: of the plans `names`, or of every one."""
    paths = []
    for name in names or EVERY:
        plan = EVERY[name](dtype=dtype, head_dim=size, group=group, kv_heads=8)
        paths += [write(render(s, header_for(plan, s)), place / f"{name}_{s.name}.py") for s in listed_specs(plan)]
    return [used for kernels in compile_apart(paths, arches).values() for used in kernels]


def test_kernels_of_reads_do_not_spill(tmp_path: Path) -> None:
    found = reading(tmp_path, "bfloat16", 128, 4, ("sm_90",), "cover")
    assert {used.kernel for used in found} >= {"split_kernel", "choose_kernel", "chosen_kernel", "tiles_kernel"}
    assert spilled(found) == []


# In float16 tiles are those of bfloat16; in float32 sizes differ more than groups.
OF_READS = [("bfloat16", size, group) for size in (64, 96, 128, 256) for group in (1, 4, 8)]
OF_READS += [("float16", 64, 1), ("float16", 128, 4), ("float32", 64, 8), ("float32", 128, 1), ("float32", 256, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size", "group"), OF_READS)
def test_no_kernel_of_reads_spills_anywhere(tmp_path: Path, dtype: str, size: int, group: int) -> None:
    found = reading(tmp_path, dtype, size, group, ARCHES)
    assert spilled(found, prefill_kernel=68, decode_kernel=80 if size == 256 else 0) == []  # as `defaults` says
    hopper = [used for used in found if used.arch == "sm_90" and dtype != "float32"]
    assert not hopper or spilled(hopper) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_no_variant_spills_anywhere(tmp_path: Path, size: int) -> None:
    templates = ("decode", "prefill", "columns", "evict")
    assert spilled(compiled(tmp_path, "bfloat16", size, 4, ARCHES, templates, varied)) == []


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_spills_anywhere(tmp_path: Path, dtype: str, size: int, group: int) -> None:
    assert spilled(compiled(tmp_path, dtype, size, group, ARCHES)) == []
