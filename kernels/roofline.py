"""Predicted time of a kernel: the bytes it must move over a GPU's bandwidth, plus its launches.

Every kernel here is bound by memory traffic or by launch latency: decode attention does `group` operations
a byte where a GPU balances at two hundred. So the prediction is a sum that a person can check by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.gpus import Gpu


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes by name, in the order in which a header lists them, and dependent launches."""

    parts: tuple[tuple[str, int], ...]
    launches: int = 1

    @property
    def total(self) -> int:
        return sum(count for _, count in self.parts)

    def seconds(self, gpu: Gpu) -> float:
        """Lower bound: traffic at full bandwidth, and no launch overlaps another."""
        return self.total / gpu.bandwidth + self.launches * gpu.launch

    def arithmetic(self, gpu: Gpu) -> str:
        """The prediction and how it comes about, in one line."""
        return (
            f"{self.seconds(gpu) * 1e6:.1f} us on {gpu.name} = {_size(self.total)} / {gpu.bandwidth / 1e12:.2f} TB/s "
            f"({self.total / gpu.bandwidth * 1e6:.1f} us) + {self.launches} x {gpu.launch * 1e6:.0f} us of launch"
        )


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def itemised(traffic: Traffic) -> str:
    """`keys and values 8.0 MiB + logits 0.3 MiB = 8.3 MiB`."""
    parts = " + ".join(f"{name} {_size(count)}" for name, count in traffic.parts)
    return f"{parts} = {_size(traffic.total)}" if len(traffic.parts) > 1 else parts
