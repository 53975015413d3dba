"""Runs the cells of a sweep, in this process or in several, and shows how far it is.

Takes tasks; gives cells as they are done, each written to its file before it is given. Guarantees: a model is left
unoptimised, however the run ends; a policy that cannot run is a skipped cell with the reason; several processes give
what one gives.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcompile.api import optimize, restore
from kvcompile.dsl.diagnostics import PolicyError
from kvcompile.evaluation.answering import answer
from kvcompile.evaluation.budgets import Case, Fitted
from kvcompile.evaluation.cells import SKIPPED, Cell, filled, save_cell
from kvcompile.evaluation.samples import Sample, Suite
from kvcompile.kernels.errors import KvCompileError

Bar = Callable[[int, str], None]  # so many samples more are done, of this case


@dataclass(frozen=True, slots=True)
class Task:
    """A cell that is to be run, with all that it takes."""

    cell: Cell
    case: Case
    fitted: Fitted
    suite: Suite
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class How:
    """How cells are run, and the folder that takes their files, None for none."""

    backend: str
    compile: str
    batch: int
    folder: Path | None


class Runner:
    """Runs cells on a model; from one cell to the next of the same plan the model stays optimised."""

    def __init__(self, model: Any, tokenizer: Any, how: How) -> None:
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.now: tuple[Any, ...] | None = None  # what the model is optimised for

    def run(self, task: Task, tick: Callable[[int], None] | None = None) -> Cell:
        """The cell with its result, or skipped with what was said against it."""
        try:
            self._optimize(task)
            outcome = answer(
                self.model, self.tokenizer, task.suite, task.samples, batch=self.how.batch, tick=tick, fed=task.case.fed
            )
            cell = filled(task.cell, task.samples, outcome)
        except (PolicyError, KvCompileError) as error:
            cell = replace(task.cell, status=SKIPPED, reason=str(error))
        if self.how.folder is not None:
            save_cell(self.how.folder, cell)
        return cell

    def _optimize(self, task: Task) -> None:
        fit, case = task.fitted, task.case
        wanted = task.cell.digest, case.policy, fit.tables  # a plan says of trained scores their names only
        if self.now == wanted:
            return
        self.now = None
        optimize(
            self.model, case.policy, name=case.name, tables=dict(fit.tables), backend=self.how.backend,
            compile=self.how.compile, **fit.params,
        )  # fmt: skip
        self.now = wanted

    def close(self) -> None:
        """Leave the model as it was."""
        restore(self.model)


def results(model: Any, tokenizer: Any, tasks: Sequence[Task], how: How, jobs: int, bar: Bar) -> Iterator[Cell]:
    """The cells of tasks in the order in which they are done. Interrupted, it sees running cells to their end."""
    if jobs > 1 and len(tasks) > 1:
        yield from _in_workers(model, tokenizer, tasks, how, min(jobs, len(tasks)), bar)
        return
    runner = Runner(model, tokenizer, how)
    try:
        for task in tasks:
            told = 0

            def tick(count: int, label: str = task.case.label) -> None:
                nonlocal told
                told += count
                bar(count, label)

            cell = runner.run(task, tick)
            bar(cell.count - told, cell.label)
            yield cell
    finally:
        runner.close()


def _in_workers(model: Any, tokenizer: Any, tasks: Sequence[Task], how: How, jobs: int, bar: Bar) -> Iterator[Cell]:
    context: Any = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (model, tokenizer, how)) as pool:
        waiting: list[Future[Cell]] = [pool.submit(_run, task) for task in tasks]
        try:
            for future in as_completed(waiting):
                cell = future.result()
                bar(cell.count, cell.label)
                yield cell
        finally:
            for future in waiting:
                future.cancel()


_RUNNER: Runner | None = None  # of a worker process


def _start(model: Any, tokenizer: Any, how: How) -> None:
    global _RUNNER
    # The first process is told of an interrupt too: it lets this one finish and write its cell.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _RUNNER = Runner(model, tokenizer, how)


def _run(task: Task) -> Cell:
    assert _RUNNER is not None
    return _RUNNER.run(task)


@contextmanager
def progress_bar(shown: bool, total: int) -> Iterator[Bar]:
    """A bar on stderr with what runs, how much is done, and the time that is left."""
    if not shown or not total:
        yield lambda count, label: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)

        def advance(count: int, label: str) -> None:
            progress.update(task, advance=count, description=label)

        yield advance
