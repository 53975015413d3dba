"""The loop of a training: batches in, gates moved step by step, states written as it goes.

Takes a model, its learn plan and data; gives gates and the history of every step. Guarantees: a step follows from the
state before it, the seed and its number alone, so a run that was stopped and resumed ends as one that was not; an
interrupt leaves the last whole step in the checkpoint; the model is left as it was, however the loop ends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.checkpoints import Files, State, prepared, read_files, save_state, state_of
from kvcompile.learning.data import Batch, Data, number
from kvcompile.learning.gates import Gates, gates_of
from kvcompile.learning.mixing import Mix, mixed
from kvcompile.learning.objective import Objective, Totals
from kvcompile.learning.optimizer import Optimizer
from kvcompile.learning.spread import Group, sharded
from kvcompile.passes.learning import LearnPlan
from kvcompile.passes.sites import AttentionSite, find_sites

TOKENS_AT_ONCE = 8192  # of one forward; longer sequences go one by one
STATES = 50  # written in a run, beside the last one


@dataclass(frozen=True)
class Run:
    """What a training is told. identity: what a state must share to be gone on from."""

    steps: int
    batch: int
    seed: int
    draws: int = 1
    lr: float | None = None
    dtype: torch.dtype | None = None  # of autocast; None computes in the weights' own
    compile: str = "off"
    again: bool = False  # activations are made anew in the backward pass
    checkpoint: Path | None = None
    resume: bool = True
    progress: bool = False
    identity: dict[str, Any] = field(default_factory=dict)


def first_gates(plan: LearnPlan, seed: int) -> Gates:
    """The gates before the first step, on the host."""
    return gates_of(plan, torch.Generator().manual_seed(number("first gates", seed)))


def train(
    model: nn.Module, plan: LearnPlan, data: Data, run: Run, group: Group
) -> tuple[Gates, tuple[dict[str, Any], ...]]:
    """Run all steps; returns the gates and one dict of figures a step.

    Raises KvCompileError for a checkpoint that cannot be gone on from, and where the loss is no number any more.
    """
    group.check(run.batch)
    trainer = Trainer(plan, run, group)
    trainer.restore()
    if trainer.done == run.steps:
        return trainer.gates, trainer.history
    if group.first and run.checkpoint is not None:
        prepared(run.checkpoint)
    runner, sites = model, find_sites(model)
    if group.size > 1:
        runner = sharded(model, [site.name for site in sites], group)
        sites = find_sites(runner)
    with (
        _computed_again(sites, run.again),
        mixed(runner, sites, plan, compile=run.compile) as mix,
        bar(run.progress and group.first, run.steps) as tell,
    ):
        try:
            while trainer.done < run.steps:
                trainer.step(runner, mix, data)
                tell(trainer.history[-1])
                if trainer.done % max(1, run.steps // STATES) == 0 or trainer.done == run.steps:
                    trainer.save()
        except KeyboardInterrupt:
            trainer.save()
            raise
    return trainer.gates, trainer.history


class Trainer:
    """Gates, multipliers, optimiser and history, and the last whole step of them."""

    def __init__(self, plan: LearnPlan, run: Run, group: Group) -> None:
        self.run, self.group = run, group
        self.gates = first_gates(plan, run.seed).to(group.device)
        self.objective = Objective(plan, run.steps).to(group.device)
        self.optimizer = Optimizer(plan, self.gates, self.objective, run.steps, run.lr)
        self._last = State(0, self._tensors())
        self._saved: int | None = None

    @property
    def done(self) -> int:
        return self._last.step

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        return self._last.history

    def step(self, model: Any, mix: Mix, data: Data) -> None:
        """One step on the batch of its number. An exception before its end leaves the state before it."""
        at = self.done
        whole = data.batch(self.run.seed, at, self.run.batch)
        rows = self.group.rows(self.run.batch)
        parts = [part.to(self.group.device) for part in _parts(whole, rows)]
        device = self.group.device.type
        # Every process draws the same gates: they follow from the seed and the step.
        generator = torch.Generator().manual_seed(number("gates", self.run.seed, at))
        self.optimizer.adam.zero_grad()
        with torch.autocast(device, dtype=self.run.dtype, enabled=self.run.dtype is not None):
            figures = self.objective.backward(
                model, mix, parts, self.gates, generator, at,
                draws=self.run.draws, first=rows.start, sequences=self.run.batch, totals=Totals.of([whole]),
            )  # fmt: skip
        self._join(figures)
        norm = self._checked(at, figures)
        entry = {"step": at + 1, **figures, "grad_norm": norm}
        self._last = State(at + 1, self._tensors(), history=(*self.history, entry))

    def _join(self, figures: dict[str, float]) -> None:
        """Add gradients and figures of all processes up."""
        sums = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.group.device)
        grads = [weight.grad for weight in self.optimizer.parameters if weight.grad is not None]
        self.group.sum([sums, *grads])
        figures |= dict(zip(figures, sums.tolist(), strict=True))

    def _checked(self, at: int, figures: dict[str, float]) -> float:
        """Move the gates, where there is a number to move them by; returns the norm of all gradients."""
        grads = [weight.grad for weight in self.optimizer.parameters if weight.grad is not None]
        if not math.isfinite(figures["loss"]) or not all(bool(grad.isfinite().all()) for grad in grads):
            kept = f"; the state of step {self._saved} is in {self.run.checkpoint}" if self._saved is not None else ""
            raise KvCompileError(
                f"step {at + 1}: the loss is {figures['loss']:g} or has no gradient, so learning has diverged; take a "
                f"lower lr, dtype='fp32', or look for odd sequences in the data{kept}"
            )
        return self.optimizer.step()

    def save(self) -> None:
        """Write the last whole step, once, where a folder was named and this process is the first."""
        if self.run.checkpoint is None or self._saved == self.done:
            return
        if self.group.first:
            save_state(self.run.checkpoint, self._last, self.run.identity)
        self._saved = self.done

    def restore(self) -> None:
        """Go on from the folder's state, read by the first process and shared with the others."""
        folder = self.run.checkpoint
        if folder is None or not self.run.resume:
            return
        found = read_files(folder) if self.group.first else None
        index = self.group.share(None if found is None else found.index)
        tensors = self.group.share(None if found is None else found.tensors)
        if index is None or tensors is None:
            return
        state = state_of(Files(index, tensors), folder, self.run.identity)
        self._take(state, folder)
        self._last, self._saved = State(state.step, self._tensors(), history=state.history), state.step

    def _take(self, state: State, folder: Path) -> None:
        own = {"gates": self.gates.logits, "linear": self.objective.linear, "square": self.objective.square}
        rest = {name.removeprefix("optimizer."): t for name, t in state.tensors.items() if name not in own}
        for name, weight in own.items():
            saved = state.tensors.get(name)
            if saved is None or saved.shape != weight.shape or "taken" not in rest:
                raise KvCompileError(f"checkpoint {folder} is damaged: its tensors are not those of this run")
            with torch.no_grad():
                weight.copy_(saved)
        self.optimizer.restore(rest)

    def _tensors(self) -> dict[str, Tensor]:
        """Copies of all that a step changes: they are small, a number or three per head."""
        own = {"gates": self.gates.logits, "linear": self.objective.linear, "square": self.objective.square}
        rest = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in own.items()} | rest


def _parts(whole: Batch, rows: slice) -> list[Batch]:
    """Some sequences of a batch, in forwards of bounded size; for as many sequences as many forwards."""
    size = max(1, TOKENS_AT_ONCE // whole.ids.shape[1])
    return [whole.part(slice(at, min(at + size, rows.stop))) for at in range(rows.start, rows.stop, size)]


@contextlib.contextmanager
def _computed_again(sites: tuple[AttentionSite, ...], wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of every layer, as `mixed` reads it, for a block."""
    name = "gradient_checkpointing"
    before = [(site.layer, vars(site.layer).get(name)) for site in sites]
    try:
        if wanted:
            for layer, _ in before:
                layer.__dict__[name] = True
        yield
    finally:
        for layer, had in before:
            layer.__dict__.pop(name, None)
            if had is not None:
                layer.__dict__[name] = had


@contextlib.contextmanager
def bar(shown: bool, steps: int) -> Iterator[Any]:
    """A progress bar on stderr; gives what is told each step's figures."""
    if not shown:
        yield lambda entry: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=steps)

        def tell(entry: dict[str, Any]) -> None:
            bars.update(task, completed=entry["step"], description=figures_line(entry))

        yield tell


def figures_line(entry: dict[str, Any]) -> str:
    """A step's figures in words: the loss, and the part of heads that the gates keep, or of units that they find."""
    if "recall" in entry:
        return f"loss {entry['loss']:.4f}, recall {entry['recall']:.1%}"
    line = f"loss {entry['loss']:.4f}, kept {entry['kept']:.1%}"
    return line + (f" (target {entry['target']:.1%})" if "target" in entry else "")
