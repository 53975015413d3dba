"""Facts of GPUs that predictions and pruning need; nothing here asks a driver.

Bandwidth in bytes per second, dense bfloat16 operations per second, shared memory and L2 in bytes. Figures
are the makers' data sheets (peak, not measured), so a prediction is a lower bound of time.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.errors import KvCompileError

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """`shared` is what one thread block may use; every one of these has 65536 registers per multiprocessor."""

    name: str
    arch: str
    bandwidth: float
    operations: float
    multiprocessors: int
    shared: int
    l2: int
    launch: float = 3e-6  # seconds between dependent kernels, CUDA graph off (2 to 5 us is usual)


GPUS = {
    # NVIDIA A100 80GB SXM data sheet; shared memory: CUDA programming guide, compute capability 8.0
    "A100": Gpu("A100", "sm_80", 2.039e12, 0.312e15, 108, 163 * KIB, 40 * MIB),
    # NVIDIA H100 SXM5 80GB data sheet; compute capability 9.0
    "H100": Gpu("H100", "sm_90", 3.35e12, 0.989e15, 132, 227 * KIB, 50 * MIB),
    # NVIDIA H200 SXM data sheet: H100's chip with HBM3e
    "H200": Gpu("H200", "sm_90", 4.8e12, 0.989e15, 132, 227 * KIB, 50 * MIB),
    # NVIDIA B200 data sheet (HGX, per GPU); compute capability 10.0
    "B200": Gpu("B200", "sm_100", 8.0e12, 2.25e15, 148, 227 * KIB, 126 * MIB),
    # NVIDIA L40S data sheet; compute capability 8.9
    "L40S": Gpu("L40S", "sm_89", 0.864e12, 0.362e15, 142, 99 * KIB, 96 * MIB),
    # NVIDIA Ada whitepaper, GeForce RTX 4090; compute capability 8.9
    "RTX4090": Gpu("RTX4090", "sm_89", 1.008e12, 0.165e15, 128, 99 * KIB, 72 * MIB),
}


def gpu(name: str) -> Gpu:
    """One GPU by its name, spelled freely (`rtx 4090`, `NVIDIA H200`)."""
    wanted = name.upper().replace(" ", "").replace("NVIDIA", "").replace("GEFORCE", "").replace("-", "")
    if wanted in GPUS:
        return GPUS[wanted]
    raise KvCompileError(f"no facts about the GPU {name!r}; known: {', '.join(GPUS)}")
