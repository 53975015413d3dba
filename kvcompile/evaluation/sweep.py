"""A sweep: every case on every suite, length and seed, each result kept so that it is never computed twice.

Takes a model, cases and suites; gives cells in a fixed order. Guarantees: what is finished under `out/cells` is read,
not run; interrupted and started again, a sweep gives the same cells; a case that cannot run at its budget is a cell
that says why, not the end; worker processes give what one process gives.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvcompile.dsl.diagnostics import PolicyError
from kvcompile.dsl.printer import canonical
from kvcompile.evaluation import fingerprint
from kvcompile.evaluation.answering import stop_tokens
from kvcompile.evaluation.budgets import Case, Fitted, Unfit, fitted
from kvcompile.evaluation.cells import SKIPPED, Cell, empty, load_cell, renamed
from kvcompile.evaluation.running import How, Task, progress_bar, results
from kvcompile.evaluation.samples import Suite
from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes import Compiled, compile_policy
from kvcompile.passes.facts import model_facts

__all__ = ["Case", "Cell", "sweep"]

_OF_FILES = frozenset({"K610", "K611", "K612", "K613", "K615", "K616", "K618"})


def sweep(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    suites: Sequence[Suite],
    *,
    lengths: Sequence[int],
    count: int = 32,
    seeds: Sequence[int] = (0,),
    batch: int = 16,
    out: str | Path | None = None,
    jobs: int = 1,
    progress: bool = False,
    backend: str = "auto",
    compile: str = "auto",
    note: Callable[[str], None] | None = None,
) -> tuple[Cell, ...]:
    """Run all cells that `out` does not have yet: case by case, within it suites, lengths and seeds.

    out: the folder whose `cells` hold one JSON file per cell; None keeps nothing. jobs: worker processes of one thread
    each, for models on the CPU; a script that asks for more than one needs an `if __name__ == "__main__"` guard.
    note: is told what is worth knowing, on stderr if None.

    Raises Unfit for a budget or chunk that a policy has no parameter for, PolicyError for tables and trained scores
    that are missing or another model's, KvCompileError for the rest. Skipped cells are tried again in the next sweep.
    """
    if "_kvcompile" in vars(model):
        raise KvCompileError("a sweep optimises the model by itself, and this one is optimised: restore it first")
    if jobs < 1 or (jobs > 1 and next(model.parameters()).device.type != "cpu"):
        raise KvCompileError(f"jobs={jobs}: give at least 1, and no more than 1 where the model is on a GPU")
    note = note or (lambda text: print(f"note: {text}", file=sys.stderr))
    folder = None if out is None else Path(out) / "cells"
    how = How(backend, compile, batch, folder)
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else Path(out) / "tables"
        plan = _plan(model, tokenizer, cases, suites, lengths, count, seeds, how, made)
        cells, tasks = _known(plan, folder, note)
        bar = stack.enter_context(progress_bar(progress, len(tasks) * count))
        found = {cell.key: cell for cell in results(model, tokenizer, tasks, how, jobs, bar)}
    return tuple(renamed(found[cell.key], cell) if cell.key in found else cell for cell in cells)


# -- what there is to do ----------------------------------------------------------------------------------------------


def _plan(
    model: Any, tokenizer: Any, cases: Sequence[Case], suites: Sequence[Suite], lengths: Sequence[int], count: int,
    seeds: Sequence[int], how: How, made: Path,
) -> list[Task | Cell]:  # fmt: skip
    """Every cell as a task, or as it is where its policy cannot be compiled."""
    facts = model_facts(model)
    world = {
        "model": fingerprint.model_digest(model),
        "tokenizer": fingerprint.tokenizer_digest(tokenizer),
        "device": next(model.parameters()).device.type,
        "backend": how.backend,
        "compile": how.compile,
        "versions": fingerprint.versions(),
    }
    # Neither the weights nor the words say where the model's generation settings let an answer end.
    if stops := sorted(stop_tokens(model, tokenizer) - {tokenizer.eos_token_id}):
        world["stops"] = stops
    asked = [
        (suite, length, seed, samples, fingerprint.samples_digest(samples))
        for suite in suites
        for length in lengths
        for seed in seeds
        for samples in [suite.samples(count, length, seed, tokenizer)]
    ]
    out: list[Task | Cell] = []
    for case in cases:
        compiled: dict[int, tuple[Fitted, Compiled] | str] = {}
        for length in dict.fromkeys(lengths):
            try:
                fit = fitted(case, length, made, (facts.layers, facts.kv_heads))
                compiled[length] = (
                    fit,
                    compile_policy(case.policy, facts, name=case.name, tables=fit.tables, **fit.params),
                )
            except Unfit:
                raise
            except (PolicyError, KvCompileError) as error:
                if isinstance(error, PolicyError) and any(d.code in _OF_FILES for d in error.diagnostics):
                    raise  # no budget makes it another file
                compiled[length] = str(error)
        for suite, length, seed, samples, told in asked:
            found = compiled[length]
            about = [suite.name, suite.version, told, length, count, seed, sorted(world.items())]
            if isinstance(found, str):
                key = fingerprint.digest([found, *about])
                out.append(replace(empty(key, case, suite, length, seed, count), status=SKIPPED, reason=found))
                continue
            fit, result = found
            trained = {name: fingerprint.file_digest(path) for name, path in result.learned}
            # The plan's digest covers parameters, tables and shares; probes are decided by the model.
            key = fingerprint.digest([result.plan.digest, trained, case.fed, *about])
            cell = _described(empty(key, case, suite, length, seed, count), fit, result)
            out.append(Task(cell, case, fit, suite, samples))
    return out


def _described(cell: Cell, fit: Fitted, compiled: Compiled) -> Cell:
    """The cell with the resolved configuration of its policy."""
    plan, resolved = compiled.plan, compiled.resolved
    clauses = [
        " ".join([*(f"{canonical(prefix)}:" for prefix in p.prefixes), canonical(p.clause)])
        + (f" at {', '.join(map(canonical, p.triggers))}" if p.triggers else "")
        for p in resolved.clauses
    ]
    return replace(
        cell,
        policy=plan.name,
        digest=plan.digest,
        params=dict(plan.params),
        clauses=(*(canonical(head.decl) for head in resolved.heads), *clauses),
        tables={name: {"file": p.name, "sha256": fingerprint.file_digest(p)} for name, p in fit.tables.items()},
        classes=tuple(tuple(plan.classes[c].name for c in row) for row in plan.class_of),
    )


def _known(plan: list[Task | Cell], folder: Path | None, note: Callable[[str], None]) -> tuple[list[Cell], list[Task]]:
    """Cells in order, as far as they are known, and what is to be run; equal cells are run once."""
    cells: list[Cell] = []
    tasks: dict[str, Task] = {}
    for entry in plan:
        if isinstance(entry, Cell):
            cells.append(entry)
            continue
        found = load_cell(folder, entry.cell) if folder is not None else None
        if isinstance(found, str):
            note(f"{folder}/{entry.cell.key}.json cannot be used ({found}), so the cell is computed again")
        if isinstance(found, Cell):
            cells.append(found)
        else:
            cells.append(entry.cell)
            tasks.setdefault(entry.cell.key, entry)
    return cells, list(tasks.values())
