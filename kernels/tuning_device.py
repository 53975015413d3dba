"""Times kernel files on the GPU at hand.

Takes a rendered file, gives the median seconds of its launch at the sizes in its header. Every launch sees the same
inputs (a launch appends, moves or evicts, so they are put back), a cold L2, and a device that is busy until the
host has queued it: Python's own time is not measured.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.render import load
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning_space import Config, facts_digest

LONGEST = 0.5  # seconds that the launches of one candidate may take together
LEAST = 3  # launches whatever they take
FLUSHES = 4  # times that the L2 is written over: longer than the host needs to queue a launch


class DeviceTimer:
    """`tuning_search.Timer` on torch's current CUDA device."""

    def __init__(self) -> None:
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            raise KvCompileError("TRITON_INTERPRET is set: kernels would be interpreted, not timed; unset it")
        seen = torch.cuda.get_device_properties()
        self._processors = seen.multi_processor_count
        self._flush = torch.empty(max(256 << 20, 4 * seen.L2_cache_size), dtype=torch.uint8, device="cuda")
        self._inputs: tuple[str, dict[str, Any], dict[str, Tensor]] | None = None

    def seconds(self, spec: KernelSpec, path: Path, config: Config, repeats: int) -> float:
        """Median of `repeats` launches, fewer where they are long; infinite where the device refuses the launch."""
        from triton.runtime.errors import OutOfResources, PTXASError

        module = load(path)
        inputs, before = self._of(spec, module)
        units = dict(config).get("units")
        if units is not None:
            rows, capacity = inputs["length"].shape[0], inputs["table"].shape[1] * module.PAGE
            target = units * self._processors
            inputs = inputs | {"scratch": module.make_scratch(rows, capacity, inputs["k"].device, target)}
        try:
            module.launch(**inputs)
        except (OutOfResources, PTXASError):
            return float("inf")
        (first,) = self._launched(module, inputs, before, 1)
        return statistics.median(self._launched(module, inputs, before, _affordable(first, repeats)))

    def _launched(self, module: Any, inputs: dict[str, Any], before: dict[str, Tensor], repeats: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in marks:
            put_back(inputs, before)
            for _ in range(FLUSHES):
                self._flush.zero_()
            start.record()
            module.launch(**inputs)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in marks]

    def right(self, path: Path) -> bool:
        """Whether the file's own check passes here; what it prints goes to stderr."""
        with contextlib.redirect_stdout(sys.stderr):
            return not load(path).check()

    def _of(self, spec: KernelSpec, module: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Inputs of a kernel and copies of its tensors, made once for all its candidates."""
        name = facts_digest(spec) + inspect.getsource(module.example)  # which holds the sizes
        if self._inputs is None or self._inputs[0] != name:
            self._inputs = None  # the old ones go before the new ones come
            dtype = getattr(torch, str(dict(spec.facts).get("dtype", "float32")))
            inputs = module.example("cuda", dtype, small=False)
            self._inputs = name, inputs, copies(inputs)
        return self._inputs[1], self._inputs[2]


def _affordable(seconds: float, repeats: int) -> int:
    """How many launches of so many seconds are made where `repeats` are wanted."""
    return max(min(LEAST, repeats), min(repeats, int(LONGEST / max(seconds, 1e-9))))


def copies(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What `put_back` needs."""
    return {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}


def put_back(inputs: dict[str, Any], before: dict[str, Tensor]) -> None:
    """Make the tensors what they were, in place."""
    for name, value in before.items():
        inputs[name].copy_(value)
