"""Facts of GPUs that predictions, pruning and tuning need, each with its source.

Takes a name as a person or a driver spells it, or the properties of a device; gives a `Gpu`. Figures of the known ones
are the makers' (peak, not measured), so a prediction is a lower bound of time. What a driver does not tell about an
unknown GPU is scaled by its multiprocessors from the weakest known one of its kind, and named in `scaled`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from kvcompile.kernels.errors import KvCompileError

KIB, MIB, GB = 1024, 1024 * 1024, 10**9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Sizes in bytes, rates per second; operations are dense, a multiply-add counts as two.

    reported         names as torch.cuda.get_device_name gives them
    operations       bfloat16 matrix operations, fp16 the same in float16, both summing in float32; fp32: without
                     tensor cores
    shared           what one thread block may use; shared_all: what one multiprocessor has
    registers        of 32 bits, threads: resident at most, both of one multiprocessor; warp: threads in lockstep
    launch           seconds between dependent kernels outside a CUDA graph: an estimate, 2 to 5 us is usual
    sources          (figures, where they are from)
    scaled           figures that were scaled from another GPU
    """

    name: str
    reported: tuple[str, ...]
    arch: str
    memory: int
    bandwidth: float
    l2: int
    multiprocessors: int
    operations: float
    fp16: float
    fp32: float
    shared: int
    shared_all: int
    registers: int
    threads: int
    sources: tuple[tuple[str, str], ...]
    warp: int = 32
    launch: float = 3e-6
    scaled: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        """Operations per second in a torch dtype; the kernels multiply float32 without tensor cores."""
        return {"float32": self.fp32, "float16": self.fp16}.get(dtype, self.operations)

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What a tuned configuration belongs to: the driver's name, architecture, multiprocessors, L2."""
        return self.reported[0], self.arch, self.multiprocessors, self.l2


_AREA = "shared, shared_all, registers, threads"
_GUIDE = "CUDA C++ programming guide, technical specifications per compute capability, "
_A100 = "NVIDIA A100 data sheet (June 2021)"
_AMPERE = (("multiprocessors, l2", "NVIDIA A100 Tensor Core GPU architecture whitepaper"), (_AREA, _GUIDE + "8.0"))
_HOPPER = (("multiprocessors, l2", "NVIDIA H100 Tensor Core GPU architecture whitepaper"), (_AREA, _GUIDE + "9.0"))
_RATES = "memory, bandwidth, operations, fp16, fp32"

_SXM = Gpu(
    "A100", ("NVIDIA A100-SXM4-80GB",), "sm_80", 80 * GB, 2.039e12, 40 * MIB, 108, 312e12, 312e12, 19.5e12,
    163 * KIB, 164 * KIB, 65536, 2048, ((_RATES, _A100 + ", SXM 80 GB"), *_AMPERE),
)  # fmt: skip
_H100 = Gpu(
    "H100", ("NVIDIA H100 80GB HBM3",), "sm_90", 80 * GB, 3.35e12, 50 * MIB, 132, 989e12, 989e12, 67e12,
    227 * KIB, 228 * KIB, 65536, 2048, ((_RATES, "NVIDIA H100 data sheet, SXM (halved where with sparsity)"), *_HOPPER),
)  # fmt: skip
_L40S = Gpu(
    "L40S", ("NVIDIA L40S",), "sm_89", 48 * GB, 864e9, 96 * MIB, 142, 362e12, 362e12, 91.6e12,
    99 * KIB, 100 * KIB, 65536, 1536,
    (
        (_RATES, "NVIDIA L40S data sheet (362.05 without sparsity)"),
        ("multiprocessors, l2", "NVIDIA Ada GPU architecture whitepaper, AD102 of the L40 generation"),
        (_AREA, _GUIDE + "8.9"),
    ),
)  # fmt: skip

_ALL = (
    _SXM,
    replace(
        _SXM, name="A100-PCIE", reported=("NVIDIA A100 80GB PCIe",), bandwidth=1.935e12,
        sources=((_RATES, _A100 + ", PCIe 80 GB"), *_AMPERE),
    ),
    replace(
        _SXM, name="A100-40GB", reported=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), memory=40 * GB,
        bandwidth=1.555e12, sources=((_RATES, "NVIDIA A100 data sheet (2020), 40 GB"), *_AMPERE),
    ),
    _H100,
    replace(
        _H100, name="H100-PCIE", reported=("NVIDIA H100 PCIe",), bandwidth=2.0e12, multiprocessors=114,
        operations=756e12, fp16=756e12, fp32=51e12,
        sources=((_RATES, "NVIDIA H100 data sheet (2022), PCIe (halved where with sparsity)"), *_HOPPER),
    ),
    replace(
        _H100, name="H200", reported=("NVIDIA H200",), memory=141 * GB, bandwidth=4.8e12,
        sources=((_RATES, "NVIDIA H200 data sheet, SXM (halved where with sparsity)"), *_HOPPER),
    ),
    Gpu(
        "B200", ("NVIDIA B200",), "sm_100", 180 * GB, 7.7e12, 126 * MIB, 148, 2.25e15, 2.25e15, 75e12,
        227 * KIB, 228 * KIB, 65536, 2048,
        (
            (_RATES, "NVIDIA Blackwell data sheet, HGX B200 per GPU; its driver agrees: 7680 bits at 3996 MHz"),
            ("multiprocessors, l2", "device query on a B200 (pytorch/ao, pull request 4002); Blackwell tuning guide"),
            (_AREA, _GUIDE + "10.0"),
        ),
    ),
    _L40S,
    replace(
        _L40S, name="RTX4090", reported=("NVIDIA GeForce RTX 4090",), memory=24 * GB, bandwidth=1.008e12, l2=72 * MIB,
        multiprocessors=128, operations=165.2e12, fp16=165.2e12, fp32=82.6e12,
        sources=(
            (_RATES + ", multiprocessors, l2", "NVIDIA Ada GPU architecture whitepaper, appendix A (sums in float32)"),
            (_AREA, _GUIDE + "8.9"),
        ),
    ),
    Gpu(
        "MI300X", ("AMD Instinct MI300X",), "gfx942", 192 * GB, 5.3e12, 32 * MIB, 304, 1307.4e12, 1307.4e12, 163.4e12,
        64 * KIB, 64 * KIB, 131072, 2048,
        (
            (_RATES, "AMD Instinct MI300X data sheet"),
            ("multiprocessors, l2", "AMD CDNA 3 whitepaper: 8 dies of 38 units and 4 MiB; ROCm tells 4 MiB"),
            (_AREA, "AMD CDNA 3 instruction set and whitepaper: 64 KiB LDS, 512 KiB of vector registers a unit"),
        ),
        warp=64,
    ),
)  # fmt: skip
GPUS = {known.name: known for known in _ALL}


def gpu(name: str) -> Gpu:
    """One GPU by its name, spelled freely (`rtx 4090`, `NVIDIA H200`, `NVIDIA H100 80GB HBM3`)."""
    wanted = _plain(name)
    for known in _ALL:
        if wanted in map(_plain, (known.name, *known.reported)):
            return known
    raise KvCompileError(
        f"no facts about the GPU {name!r}; known: {', '.join(GPUS)}. On a machine that has it, its driver is asked: "
        "there `kvcompile tune` without --gpu knows it"
    )


def _plain(name: str) -> str:
    return re.sub(r"NVIDIA|GEFORCE|AMD|INSTINCT|[^A-Z0-9]", "", name.upper())


def of_device(device: Any = None) -> Gpu:
    """The GPU at hand (default: torch's current device)."""
    import torch

    return of_properties(torch.cuda.get_device_properties(device))


def of_properties(seen: Any) -> Gpu:
    """A GPU from what torch.cuda.get_device_properties tells: a known one, or one made of the driver's figures.

    A part of a known GPU (MIG) has fewer multiprocessors, and is an unknown one.
    """
    for known in _ALL:
        if seen.name in known.reported and seen.multi_processor_count == known.multiprocessors:
            return replace(known, reported=(seen.name, *(n for n in known.reported if n != seen.name)))
    amd = str(getattr(seen, "gcnArchName", "")).split(":")[0]
    arch = amd if amd.startswith("gfx") else f"sm_{seen.major}{seen.minor}"
    like = _like(arch)
    part = seen.multi_processor_count / like.multiprocessors
    scaled = ["operations", "fp16", "fp32"]
    # Memory moves data on both edges of its clock; kHz and bits.
    clock, bus = getattr(seen, "memory_clock_rate", 0), getattr(seen, "memory_bus_width", 0)
    bandwidth = 2.0 * clock * 1000 * bus / 8
    if not bandwidth:
        bandwidth = like.bandwidth * part
        scaled.append("bandwidth")
    told: dict[str, int] = {}
    for figure, name in _TOLD.items():
        told[figure] = getattr(seen, name, 0) or getattr(like, figure)
        if not getattr(seen, name, 0):
            scaled.append(figure)
    return Gpu(
        name=seen.name,
        reported=(seen.name,),
        arch=arch,
        memory=seen.total_memory,
        bandwidth=bandwidth,
        multiprocessors=seen.multi_processor_count,
        operations=like.operations * part,
        fp16=like.fp16 * part,
        fp32=like.fp32 * part,
        sources=(("all but what is scaled", "the driver"), (", ".join(scaled), f"{like.name} by multiprocessors")),
        scaled=tuple(scaled),
        **told,
    )


_TOLD = {
    "l2": "L2_cache_size",
    "shared": "shared_memory_per_block_optin",
    "shared_all": "shared_memory_per_multiprocessor",
    "registers": "regs_per_multiprocessor",
    "threads": "max_threads_per_multi_processor",
    "warp": "warp_size",
}


def _like(arch: str) -> Gpu:
    """The known GPU with the least arithmetic per multiprocessor, of the same architecture if there is one."""
    amd = arch.startswith("gfx")
    kind = [known for known in _ALL if known.arch == arch] or [
        known for known in _ALL if known.arch.startswith("gfx") == amd
    ]
    return min(kind, key=lambda known: known.operations / known.multiprocessors)
