"""Facts of GPUs: each has a source, names are found however they are spelled, unknown devices get stated guesses."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS, KIB, MIB, gpu, of_properties
from kvcompile.kernels.offline import SHARED_LIMIT

NO_FIGURES = {"name", "reported", "arch", "sources", "warp", "launch", "scaled"}


@pytest.mark.parametrize("name", GPUS)
def test_every_figure_has_one_source(name: str) -> None:
    known = GPUS[name]
    named = [figure for group, _ in known.sources for figure in group.split(", ")]
    assert sorted(named) == sorted({f.name for f in fields(known)} - NO_FIGURES)
    assert all(where for _, where in known.sources) and not known.scaled


@pytest.mark.parametrize("name", GPUS)
def test_figures_fit_each_other(name: str) -> None:
    known = GPUS[name]
    assert known.shared <= known.shared_all and known.fp32 < known.operations
    assert 100e9 < known.bandwidth < 10e12 and known.memory > 20e9
    # A multiprocessor does a whole number of operations in a cycle of 1 to 3 GHz.
    assert 512 <= known.operations / known.multiprocessors / 1e9 <= 3 * 8192
    if known.arch.startswith("sm_"):
        assert SHARED_LIMIT[int(known.arch[3:])] == known.shared


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("h200", "H200"),
        ("NVIDIA H200", "H200"),
        ("rtx 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("a100-sxm4-40gb", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIE"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_names_are_spelled_freely(spelled: str, name: str) -> None:
    assert gpu(spelled) is GPUS[name]


def test_no_two_gpus_share_a_name() -> None:
    names = [name for known in GPUS.values() for name in (known.name, *known.reported)]
    assert len(set(names)) == len(names)


def test_an_unknown_name_is_an_error_with_a_way_out() -> None:
    with pytest.raises(KvCompileError, match=r"Voodoo 2.*known: A100.*MI300X.*kvcompile tune"):
        gpu("Voodoo 2")


def seen(name: str, major: int, minor: int, count: int, **more: object) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=count, total_memory=24 * 10**9, **more
    )


def test_a_known_device_is_recognised_whatever_its_driver_says_of_the_cache() -> None:
    found = of_properties(seen("NVIDIA H200", 9, 0, 132, L2_cache_size=60 * MIB))
    assert found == GPUS["H200"] and found.identity == ("NVIDIA H200", "sm_90", 132, 50 * MIB)
    forty = of_properties(seen("NVIDIA A100-PCIE-40GB", 8, 0, 108))
    assert forty.bandwidth == GPUS["A100-40GB"].bandwidth and forty.identity[0] == "NVIDIA A100-PCIE-40GB"


def test_a_slice_of_a_known_device_is_another_one() -> None:
    part = of_properties(seen("NVIDIA H200", 9, 0, 66))
    assert part.identity != GPUS["H200"].identity
    assert part.operations == pytest.approx(GPUS["H100-PCIE"].operations * 66 / 114)


def test_an_unknown_device_takes_its_driver_at_its_word_and_scales_the_rest() -> None:
    found = of_properties(
        seen(
            "NVIDIA GeForce RTX 3090", 8, 6, 82, L2_cache_size=6 * MIB, shared_memory_per_block_optin=99 * KIB,
            shared_memory_per_multiprocessor=100 * KIB, regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=1536, warp_size=32, memory_clock_rate=9751000, memory_bus_width=384,
        )
    )  # fmt: skip
    assert found.bandwidth == pytest.approx(936.1e9, rel=1e-3)  # the maker's figure
    assert (found.arch, found.shared, found.l2, found.threads) == ("sm_86", 99 * KIB, 6 * MIB, 1536)
    assert set(found.scaled) == {"operations", "fp16", "fp32"}
    weakest = min(g.operations / g.multiprocessors for g in GPUS.values())
    assert found.operations == pytest.approx(weakest * 82)


def test_a_device_that_tells_little_is_scaled_from_its_own_kind() -> None:
    found = of_properties(seen("AMD Instinct MI300A", 9, 4, 228, gcnArchName="gfx942:sramecc+:xnack-"))
    assert found.arch == "gfx942" and found.warp == 64
    assert found.bandwidth == pytest.approx(5.3e12 * 228 / 304) and "bandwidth" in found.scaled
    assert found.peak("float32") < found.peak("bfloat16") == found.peak("float16")
