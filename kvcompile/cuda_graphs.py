"""CUDA graphs of decode steps: one step of the whole model, head included, is captured once and replayed.

Takes a step as a callable over tokens and positions; gives what it gives, in memory of its own. Whatever a graph has
burnt in (addresses, shapes, kept logits, whether the step evicts) is its key: a step under another key first runs as
it is, then is captured. Nothing inside a captured step passes between host and device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcompile.kernels.choose_listed import without_triton
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.store import Store

# Entries that a row may grow by before its pool moves: each move costs a step that runs as it is, and a capture.
AHEAD = 256

Step = Callable[[Tensor, Tensor], Any]  # (ids or embeddings [B, 1, ...], positions [B, 1]) -> the model's output
Key = tuple[object, ...]


class Recording(Protocol):
    """A captured step."""

    def replay(self) -> Any:
        """Run it again; the output, whose tensors the next replay overwrites."""
        ...


class Recorder(Protocol):
    """What captures: torch.cuda's graphs, or in a test what stands for them."""

    def aside(self, run: Callable[[], Any]) -> Any:
        """Run now, where captures are made, so that all that a first run sets up is there before one."""
        ...

    def capture(self, run: Callable[[], Any]) -> Recording:
        """Take down what `run` launches without carrying it out."""
        ...


class CudaRecorder:
    """Graphs of one device; they share a pool of memory, because no two run at a time and outputs are copied out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, run: Callable[[], Any]) -> Any:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = run()
        here.wait_stream(self.stream)
        output.logits.record_stream(here)
        return output

    def capture(self, run: Callable[[], Any]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self.device)
        try:
            # Other threads may allocate meanwhile; what counts is what this one does.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = run()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # torch leaves its own stream current where a capture fails
            raise KvCompileError(
                f"a decode step of this model cannot be captured in a CUDA graph ({str(error).splitlines()[0]}): "
                "something in it passes between host and device; use compile='eager'"
            ) from error
        return CudaRecording(graph, output)


@dataclass(frozen=True, slots=True)
class CudaRecording:
    """`Recording` on a device."""

    graph: Any
    output: Any

    def replay(self) -> Any:
        self.graph.replay()
        return self.output


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph with the two buffers that it reads; all else that it reads or writes is the store's own."""

    recording: Recording
    tokens: Tensor
    positions: Tensor


@dataclass
class _Held:
    """Graphs of one store while its tensors stay where they are; `seen`: keys that have run as they are."""

    addresses: Key
    seen: set[Key] = field(default_factory=set)
    graphs: dict[Key, _Captured] = field(default_factory=dict)


class StepGraphs:
    """The graphs of an optimised model. captured, replayed: how many, and how often, since it was optimised."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.captured = self.replayed = 0
        self._held: WeakKeyDictionary[Store, _Held] = WeakKeyDictionary()

    def run(self, store: Store, step: Step, tokens: Tensor, positions: Tensor, key: Key) -> Any:
        """The output of one step on a paged store.

        key: what of the step is no tensor: which input it takes, kept logits, whether it evicts. `step` is captured as
        it is now, so it must not depend on anything that changes under the same key.
        """
        held = self._of(store)
        key = (*key, tokens.shape, tokens.dtype, positions.shape)
        if key not in held.seen:
            held.seen.add(key)
            return self.recorder.aside(lambda: step(tokens, positions))
        if key not in held.graphs:
            held.graphs[key] = self._capture(step, tokens, positions)
        found = held.graphs[key]
        found.tokens.copy_(tokens)
        found.positions.copy_(positions)
        output = found.recording.replay()
        self.replayed += 1
        return type(output)(logits=output.logits.clone())

    def _of(self, store: Store) -> _Held:
        # The first layer's tensors are the whole store's: those of other layers are the same ones or views of them.
        now = tuple((t.data_ptr(), t.shape, t.stride()) for t in store.site(0))
        held = self._held.get(store)
        if held is None or held.addresses != now:
            held = self._held[store] = _Held(now)
        return held

    def _capture(self, step: Step, tokens: Tensor, positions: Tensor) -> _Captured:
        own, places = (t.clone(memory_format=torch.contiguous_format) for t in (tokens, positions))
        recording = self.recorder.capture(lambda: step(own, places))
        self.captured += 1
        return _Captured(recording, own, places)


def step_graphs(plan: PolicyPlan, backend: str, device: torch.device) -> StepGraphs:
    """For a plan on a backend and device; KvCompileError, with the reason, where no step of it can be captured."""
    refuse_graphs(plan, backend, device)
    return StepGraphs(CudaRecorder(device))


def refuse_graphs(plan: PolicyPlan, backend: str, device: torch.device) -> None:
    """KvCompileError where a step of the plan cannot be captured: it would pass between host and device."""
    way = "use compile='eager', or 'auto'"
    if backend != "triton":
        raise KvCompileError(f"compile='cudagraph' needs backend 'triton', and here it is {backend!r}: {way}")
    if device.type != "cuda":
        raise KvCompileError(f"compile='cudagraph' needs a CUDA device, and the model is on {device}: {way}")
    reasons = [reason for reason in without_triton(plan) if _in_a_step(reason)]
    if reasons:
        raise KvCompileError(
            f"compile='cudagraph' needs every step of {plan.name} on kernels, and the reference, which reads the "
            f"device, runs part of it ({'; '.join(reasons)}): {way}"
        )


def _in_a_step(reason: str) -> bool:
    place = reason.split(":")[0]
    return place == "decode" or place.endswith((", decode", ", after a step"))
