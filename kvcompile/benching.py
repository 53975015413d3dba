"""How fast is a policy on this model, beside the untouched model and others, on this machine?

Takes a model, contestants and token ids; runs every contestant in turn, round by round, in one process.
Gives a `Benchmark`: seconds of the prefill, milliseconds of each decode step, bytes, footprint. Guarantees: each
contestant runs the whole course once before anything is timed, so nothing that compiles is counted; all are fed the
same tokens; the model is left as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompile.api import use
from kvcompile.kernels.errors import KvCompileError
from kvcompile.reporting import report

UNTOUCHED = "untouched"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A name and, unless it is the untouched model, the policy and the options of `use`."""

    name: str
    policy: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def enter(self, model: Any) -> AbstractContextManager[Any]:
        """The model as this contestant has it, for a block."""
        return nullcontext(model) if self.policy is None else use(model, self.policy, **self.options)


@dataclass(frozen=True, slots=True)
class Course:
    """What is run: token ids int64 [batch, prompt + generate], of which `prompt` come first, and how many rounds."""

    ids: Tensor
    prompt: int
    rounds: int

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def generate(self) -> int:
        return self.ids.shape[1] - self.prompt


@dataclass(frozen=True, slots=True)
class Turn:
    """One contestant in one round. Bytes as in `report`; of the untouched model its cache's, and no peak is known.

    device_peak: most bytes that tensors took on the GPU, weights among them; None on the CPU.
    """

    prefill_seconds: float
    step_ms: tuple[float, ...]
    bytes_held: int
    bytes_peak: int | None
    device_peak: int | None
    footprint: float
    ceiling: float


@dataclass(frozen=True, slots=True)
class Figures:
    """A contestant's medians over rounds; `step_p10` and `step_p90` over all steps. Ratios: each round's part of the
    untouched model's time (or of the first contestant's, where that is not there)."""

    name: str
    prefill_seconds: float
    step_ms: float
    step_p10: float
    step_p90: float
    tokens_per_second: float
    step_ratio: float
    step_ratios: tuple[float, ...]
    prefill_ratio: float
    bytes_held: int
    bytes_peak: int | None
    device_peak: int | None
    footprint: float
    ceiling: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All that was measured; `base`: whose times the ratios are parts of."""

    policy: str
    device: str
    prompt: int
    generate: int
    batch: int
    rounds: int
    base: str
    contestants: tuple[Figures, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)


def bench(model: Any, contestants: list[Contestant], course: Course) -> Benchmark:
    """Run the course. The first contestant is the policy in question.

    Raises KvCompileError where the model is optimised already, or where prompt and steps are more than its positions.
    """
    if "_kvcompile" in vars(model):
        raise KvCompileError("bench times the untouched model too, and this one is optimised: restore it first")
    check_context(model.config, course.prompt, course.generate)
    turns: dict[str, list[Turn]] = {c.name: [] for c in contestants}
    short = Course(course.ids[:, : course.prompt + min(2, course.generate)], course.prompt, 1)
    for contestant in contestants:
        _turn(model, contestant, short)
    for number in range(course.rounds):
        start = number % len(contestants)
        for contestant in contestants[start:] + contestants[:start]:
            turns[contestant.name].append(_turn(model, contestant, course))
    base = UNTOUCHED if UNTOUCHED in turns else contestants[0].name
    figures = tuple(_figures(name, found, turns[base], course.batch) for name, found in turns.items())
    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _threads(torch.get_num_threads())
    sizes = course.prompt, course.generate, course.batch, course.rounds
    return Benchmark(contestants[0].name, where, *sizes, base, figures)


def check_context(config: Any, prompt: int, generate: int) -> None:
    """Raises KvCompileError where a model of this configuration has no positions for so many tokens."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and prompt + generate > most:
        raise KvCompileError(
            f"a prompt of {prompt} tokens and {generate} steps need {prompt + generate} positions, and this model has "
            f"{most}: at most --prompt {max(1, most - generate)} with so many steps"
        )


def batch_of(line: Tensor, batch: int) -> Tensor:
    """So many different sequences from one, int64 [1, n] to [batch, n]: each is the one before, turned by a token."""
    return torch.cat([line.roll(b, 1) for b in range(batch)])


def _turn(model: Any, contestant: Contestant, course: Course) -> Turn:
    device = next(model.parameters()).device
    with torch.no_grad(), contestant.enter(model):
        wait = _waiter(device)
        start = time.perf_counter()
        cache, steps = None, []
        if contestant.policy is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
        out = model(course.ids[:, : course.prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait()
        prefill = time.perf_counter() - start
        for i in range(course.prompt, course.ids.shape[1]):
            token = course.ids[:, i : i + 1]
            start = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            wait()
            steps.append((time.perf_counter() - start) * 1e3)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        if contestant.policy is None:
            held = cache_bytes(out.past_key_values)
            return Turn(prefill, tuple(steps), held, None, peak, 1.0, 1.0)
        said = report(model)
        return Turn(
            prefill, tuple(steps), said.bytes_resident, said.bytes_peak, peak, said.footprint, said.ceiling
        )  # fmt: skip


def cache_bytes(cache: Any) -> int:
    """Keys and values that a cache of transformers holds."""
    sides = [getattr(layer, side, None) for layer in cache.layers for side in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in sides if isinstance(t, Tensor))


def _waiter(device: torch.device) -> Callable[[], None]:
    """Waits until a device is done; its memory's peak is counted from here."""
    if device.type != "cuda":
        return lambda: None
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    return lambda: torch.cuda.synchronize(device)


def _figures(name: str, turns: list[Turn], base: list[Turn], batch: int) -> Figures:
    steps = sorted(ms for turn in turns for ms in turn.step_ms)
    middle = [statistics.median(turn.step_ms) for turn in turns]
    others = [statistics.median(turn.step_ms) for turn in base]
    step, prefill = statistics.median(middle), statistics.median(t.prefill_seconds for t in turns)
    last = turns[-1]
    return Figures(
        name=name,
        prefill_seconds=prefill,
        step_ms=step,
        step_p10=_part(steps, 0.1),
        step_p90=_part(steps, 0.9),
        tokens_per_second=batch / step * 1e3,
        step_ratio=step / statistics.median(others),
        step_ratios=tuple(a / b for a, b in zip(middle, others, strict=True)),
        prefill_ratio=prefill / statistics.median(t.prefill_seconds for t in base),
        bytes_held=last.bytes_held,
        bytes_peak=last.bytes_peak,
        device_peak=max((t.device_peak for t in turns if t.device_peak is not None), default=None),
        footprint=last.footprint,
        ceiling=last.ceiling,
    )


def _threads(count: int) -> str:
    return f"CPU, {count} thread{'' if count == 1 else 's'}"


def _part(ordered: list[float], part: float) -> float:
    """The value below which that part of them lies, nearest rank."""
    return ordered[round(part * (len(ordered) - 1))]
