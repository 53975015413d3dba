"""Predicted time of a kernel: the bytes it must move over a GPU's bandwidth, plus its launches.

Decode, judging and moving are bound by memory traffic or by launch latency: decode attention does `group`
operations a byte where a GPU balances at two hundred. Only a second pass over all queries of a prefill is
bound by arithmetic. So a prediction is a sum that a person can check by hand. `Launch` adds what occupancy
takes from the bandwidth, to rank candidates: few bytes under way cannot hide the memory's latency.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.gpus import Gpu


@dataclass(frozen=True, slots=True)
class Cpu:
    """What a prediction for a CPU is made with: bytes and float32 operations a second."""

    name: str
    bandwidth: float
    operations: float


# Rounded from what a sum over 256 MB and torch's sgemm reached on two cores of an AMD EPYC with AVX-512: 33, 169.
TWO_CORES = Cpu("two cores of a server", 30e9, 170e9)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes by name, in the order in which a header lists them; dependent launches; matrix operations.

    lanes: instructions of a single lane each, beside matrix ones, where a kernel compares and counts.
    """

    parts: tuple[tuple[str, int], ...]
    launches: int = 1
    operations: int = 0
    lanes: int = 0

    @property
    def total(self) -> int:
        return sum(count for _, count in self.parts)

    def seconds(self, gpu: Gpu, dtype: str = "bfloat16") -> float:
        """Lower bound: traffic at full bandwidth or arithmetic at full speed, and no launch overlaps another."""
        work = max(self.total / gpu.bandwidth, self.operations / gpu.peak(dtype), self.lanes / _lanes(gpu))
        return work + self.launches * gpu.launch

    def arithmetic(self, gpu: Gpu, dtype: str = "bfloat16") -> str:
        """The prediction and how it comes about, in one line."""
        peak = gpu.peak(dtype)
        memory, compute = self.total / gpu.bandwidth, self.operations / peak
        counting = self.lanes / _lanes(gpu)
        if counting > max(memory, compute):
            work = f"{self.lanes / 1e9:.1f} G instructions / {_lanes(gpu) / 1e12:.1f} T/s ({counting * 1e6:.1f} us)"
        elif memory >= compute:
            work = f"{size(self.total)} / {gpu.bandwidth / 1e12:.2f} TB/s ({memory * 1e6:.1f} us)"
        else:
            work = f"{self.operations / 1e12:.3f} TFLOP / {peak / 1e12:.0f} TFLOP/s ({compute * 1e6:.1f} us)"
        launches = f"{self.launches} x {gpu.launch * 1e6:.0f} us of launch"
        return f"{self.seconds(gpu, dtype) * 1e6:.1f} us on {gpu.name} = {work} + {launches}"

    def seconds_on(self, cpu: Cpu) -> float:
        """The same for a CPU: traffic or arithmetic, whichever takes longer; a call costs next to nothing."""
        return max(self.total / cpu.bandwidth, self.operations / cpu.operations)

    def on(self, cpu: Cpu) -> str:
        """The prediction for a CPU and how it comes about, in one line."""
        if self.total / cpu.bandwidth >= self.operations / cpu.operations:
            work = f"{size(self.total)} / {cpu.bandwidth / 1e9:.0f} GB/s"
        else:
            work = f"{self.operations / 1e9:.1f} GFLOP / {cpu.operations / 1e9:.0f} GFLOP/s"
        return f"{self.seconds_on(cpu) * 1e3:.3f} ms on {cpu.name} = {work}"


def _lanes(gpu: Gpu) -> float:
    """Instructions of a lane a second: the float32 peak counts a multiplication and an addition as two."""
    return gpu.fp32 / 2


LATENCY = 0.7e-6  # seconds from a load to its data under load: an estimate for HBM and GDDR alike
RESERVED = 1024  # bytes of shared memory that the system takes of each thread block (CUDA programming guide)


@dataclass(frozen=True, slots=True)
class Needs:
    """What one thread block takes of a multiprocessor: registers of a thread, bytes of shared memory, warps."""

    registers: int
    shared: int
    warps: int


def limits(gpu: Gpu, needs: Needs) -> dict[str, int]:
    """Thread blocks that fit one multiprocessor, by what they share there."""
    threads = needs.warps * gpu.warp
    registers = -(-max(needs.registers, 1) // 8) * 8 * threads  # handed out in eights
    return {
        "threads": gpu.threads // threads,
        "registers": gpu.registers // registers,
        "shared memory": gpu.shared_all // (needs.shared + RESERVED) or 1,
    }


def resident(gpu: Gpu, needs: Needs) -> int:
    """Thread blocks that stand on one multiprocessor at a time; 0 where not even one fits."""
    return 0 if needs.shared > gpu.shared else min(limits(gpu, needs).values())


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch as ranking sees it. programs: that have work, a real number; in_flight: bytes that one waits for."""

    traffic: Traffic
    programs: float
    in_flight: int

    def seconds(self, gpu: Gpu, blocks: int, dtype: str = "bfloat16") -> float:
        """Predicted time where `blocks` programs stand on a multiprocessor; infinite where none can.

        Bytes in flight over the latency bound the bandwidth (Little's law).
        """
        if blocks < 1:
            return float("inf")
        active = min(self.programs, float(blocks * gpu.multiprocessors))
        bandwidth = min(gpu.bandwidth, active * self.in_flight / LATENCY)
        spread = min(1.0, active / gpu.multiprocessors)
        busy = max(self.traffic.operations / gpu.peak(dtype), self.traffic.lanes / _lanes(gpu))
        work = max(self.traffic.total / bandwidth, busy / spread)
        return work + self.traffic.launches * gpu.launch


def size(count: int) -> str:
    """Bytes for a reader: 8.0 MiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def itemised(traffic: Traffic) -> str:
    """`keys and values 8.0 MiB + logits 0.3 MiB = 8.3 MiB`."""
    parts = " + ".join(f"{name} {size(count)}" for name, count in traffic.parts)
    return f"{parts} = {size(traffic.total)}" if len(traffic.parts) > 1 else parts
