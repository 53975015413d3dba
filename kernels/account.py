"""What one kernel takes of a processor, and what bounds its time: `offline`, `assembly` and `roofline` for a reader.

Takes resources of a kernel's functions and its header; gives lines for a person and plain values for JSON.
Predictions are lower bounds from bytes, operations and launches; nothing in here was measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kvcompile.kernels.cpp_backend.assembly import Machine
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS, Gpu
from kvcompile.kernels.offline import Resources
from kvcompile.kernels.render import Header
from kvcompile.kernels.roofline import TWO_CORES, Needs, itemised, limits, resident, size

# Of several GPUs of an architecture, the one that predictions are made for where none is named.
_TYPICAL = {"sm_80": "A100", "sm_89": "L40S", "sm_90": "H200", "sm_100": "B200"}


def gpu_of(arch: str, named: Gpu | None) -> Gpu | None:
    """The GPU to predict for: the named one, else the typical one of the architecture; None where none is known.

    Raises:
        KvCompileError: the named GPU has another architecture.
    """
    if named is None:
        return GPUS[_TYPICAL[arch]] if arch in _TYPICAL else None
    if named.arch != arch:
        raise KvCompileError(f"the GPU {named.name} is {named.arch}, not {arch}; leave --arch or --gpu out")
    return named


@dataclass(frozen=True, slots=True)
class Account:
    """A Triton kernel on a GPU. dtype: of its products; gpu: None where no facts are known and nothing is predicted."""

    kernel: str
    dtype: str
    arch: str
    functions: tuple[Resources, ...]
    header: Header
    gpu: Gpu | None

    def blocks(self, used: Resources) -> int | None:
        """Thread blocks of a function that stand on one multiprocessor at a time."""
        return None if self.gpu is None else resident(self.gpu, _needs(used))

    def occupancy(self, used: Resources) -> float | None:
        """The part of a multiprocessor's threads that these blocks are."""
        if self.gpu is None:
            return None
        return resident(self.gpu, _needs(used)) * used.warps * self.gpu.warp / self.gpu.threads

    @property
    def seconds(self) -> float | None:
        """Of a launch at the header's sizes, at best."""
        return None if self.gpu is None else self.header.traffic.seconds(self.gpu, self.dtype)

    def lines(self) -> list[str]:
        """The block that `inspect --kernel NAME --arch ARCH` prints."""
        traffic, gpu = self.header.traffic, self.gpu
        place = f"predicted for {gpu.name}" if gpu is not None else "no GPU of it is known, so nothing is predicted"
        lines = [f"{self.kernel} on {self.arch}, {place}"]
        width = max(len(used.kernel) for used in self.functions)
        for used in self.functions:
            lines += [f"  {used.kernel:<{width}}  {used.taken()}", f"  {'':<{width}}  {self._stands(used)}"]
        lines += [f"  sizes       {_sizes(self.header)}", f"  bytes       {itemised(traffic)} a launch"]
        if traffic.operations:
            balance = f"; {gpu.name} balances at {gpu.peak(self.dtype) / gpu.bandwidth:.0f}" if gpu is not None else ""
            each = traffic.operations / max(1, traffic.total)
            lines.append(f"  operations  {_count(traffic.operations)}, {each:.1f} a byte{balance}")
        if gpu is not None:
            lines += [f"  time        {traffic.arithmetic(gpu, self.dtype)}", f"  bound by    {self._bound(gpu)}"]
        return lines

    def to_dict(self) -> dict[str, object]:
        """Plain values, fit for JSON; PTX is left out."""
        return {
            "kernel": self.kernel,
            "dtype": self.dtype,
            "arch": self.arch,
            "gpu": None if self.gpu is None else self.gpu.name,
            "functions": [
                {key: value for key, value in asdict(used).items() if key != "ptx"}
                | {"blocks": self.blocks(used), "occupancy": self.occupancy(used)}
                for used in self.functions
            ],
            **_figures(self.header, self.seconds),
        }

    def _stands(self, used: Resources) -> str:
        if self.gpu is None:
            return f"{used.warps} warps a block"
        if not resident(self.gpu, _needs(used)):
            return f"no block fits: {self.gpu.name} gives one at most {size(self.gpu.shared)} of shared memory"
        bounds = limits(self.gpu, _needs(used))
        least = min(bounds.values())
        by = " and ".join(name for name, count in bounds.items() if count == least)
        return (
            f"{used.warps} warps a block, {least} block{'s' if least != 1 else ''} a multiprocessor, "
            f"{self.occupancy(used):.0%} of its threads, limited by {by}"
        )

    def _bound(self, gpu: Gpu) -> str:
        traffic = self.header.traffic
        parts = {
            "launches": traffic.launches * gpu.launch,
            "memory": traffic.total / gpu.bandwidth,
            "arithmetic": traffic.operations / gpu.peak(self.dtype),
        }
        most = max(parts, key=lambda name: parts[name])
        return f"{most}, {parts[most] / traffic.seconds(gpu, self.dtype):.0%} of the predicted time"


@dataclass(frozen=True, slots=True)
class CppAccount:
    """A C++ kernel as this machine's compiler makes it."""

    kernel: str
    machine: Machine
    header: Header

    @property
    def seconds(self) -> float:
        """Of a call at the header's sizes, at best, on `roofline.TWO_CORES`."""
        return self.header.traffic.seconds_on(TWO_CORES)

    def lines(self) -> list[str]:
        """The block that `inspect --kernel NAME_cpp --arch native` prints."""
        traffic = self.header.traffic
        operations = f"{_count(traffic.operations)}, {traffic.operations / max(1, traffic.total):.1f} a byte"
        return [
            f"{self.kernel} on this processor, by {self.machine.compiler}",
            f"  code        {self.machine.line()}",
            f"  sizes       {_sizes(self.header)}",
            f"  bytes       {itemised(traffic)} a call",
            *([f"  operations  {operations}"] if traffic.operations else []),
            f"  time        at least {traffic.on(TWO_CORES)}; predicted, not measured",
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain values, fit for JSON."""
        return {
            "kernel": self.kernel,
            "arch": "native",
            **asdict(self.machine),
            **_figures(self.header, self.seconds),
        }


def _figures(header: Header, seconds: float | None) -> dict[str, object]:
    traffic = header.traffic
    return {
        "sizes": dict(header.bench),
        "bytes": traffic.total,
        "bytes_by_part": dict(traffic.parts),
        "operations": traffic.operations,
        "launches": traffic.launches,
        "predicted_seconds": seconds,
    }


def _needs(used: Resources) -> Needs:
    return Needs(used.registers, used.shared, used.warps)


def _sizes(header: Header) -> str:
    return ", ".join(f"{name} {value}" for name, value in header.bench)


def _count(operations: int) -> str:
    for unit, name in ((10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP")):
        if operations >= unit:
            return f"{operations / unit:.2f} {name}"
    return f"{operations} FLOP"
