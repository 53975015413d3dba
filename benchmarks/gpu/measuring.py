"""How the GPU benchmarks measure: one clock for all contestants, cold L2, and figures that say why one is missing.

A contestant is a call that queues its work on the device. It is captured in a CUDA graph, so that Python's own time is
not measured, and each replay is between two events behind writes that push the L2 out. A dry run stands on the CPU,
where only the code is tried: its times mean nothing and are never filed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SIZES = ("full", "quick", "dry")
Cell = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One table of results. cells: what is measured at a size; figures: (key, column title, unit) of what comes out."""

    name: str
    title: str
    says: str
    cells: Callable[[str], list[Cell]]
    measure: Callable[[Bench, Cell], Figures]
    figures: tuple[tuple[str, str, str], ...]


@dataclass
class Bench:
    """Where it runs and how large. budget: seconds that the repeats of one contestant may take together."""

    size: str
    budget: float = 0.25
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dry = self.size == "dry"
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        self._flush: Tensor | None = None

    def noise(self, *shape: int) -> Tensor:
        """Normal numbers in the benchmark's dtype: zeros would run faster than real data does."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def seconds(self, run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        """Median of some runs after two that are not counted; `before` puts things back and is not measured."""
        if self.dry:
            before()
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        for _ in range(2):
            before()
            run()
        torch.cuda.synchronize()
        replay = _captured(run)
        start = time.perf_counter()
        before()
        replay()
        torch.cuda.synchronize()
        count = max(5, min(100, int(self.budget / max(time.perf_counter() - start, 1e-3))))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in marks:
            before()
            self.cool()
            begin.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks) * 1e-3

    def cool(self) -> None:
        """Push everything out of the L2."""
        if self._flush is None:
            self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        for _ in range(4):
            self._flush.zero_()

    def attempt(self, figures: Figures, key: str, make: Callable[[], float]) -> None:
        """Put a contestant's figure in, or None and a note: one that cannot run costs its own figure only."""
        try:
            figures[key] = make()
        except Exception as error:
            figures[key] = None
            text = str(error).strip().splitlines() or [""]
            figures.setdefault("notes", []).append(f"{key}: {type(error).__name__}: {text[0][:160]}")
            if not self.dry:
                torch.cuda.empty_cache()

    def copy_rate(self, count: int) -> float:
        """Bytes a second of a device-to-device copy that reads and writes `count` bytes together."""
        source = torch.empty(max(1, count // 2), dtype=torch.uint8, device=self.device).random_(0, 256)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of `run`, which has run before; `run` itself, and a line that says so, where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # torch leaves its own stream current where a capture fails
        print(f"timed without a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return run
    return graph.replay


def machine(bench: Bench) -> dict[str, Any]:
    """The device as the driver names it, and versions of what compiles and runs."""
    import platform

    import transformers
    import triton

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "transformers": transformers.__version__}
    if not bench.dry:
        seen = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": seen.name,
            "multiprocessors": seen.multi_processor_count,
            "memory_gib": round(seen.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found
