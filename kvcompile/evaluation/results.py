"""`Evaluation`: the cells of a sweep, what follows from them, and the files and figures that are made of them.

Takes cells and the configuration they came from; gives tables, critical footprints, JSON, CSV and plots.
Guarantees: a method is only compared with full attention on the same suite, length and seed; files are replaced in
one step and name no folder of the machine.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from kvcompile.evaluation.cells import Cell
from kvcompile.evaluation.critical import Spread, critical_footprint, spread

FORMAT = 1
Curve = tuple[str, int | None, str, int]  # label, chunk, suite, length
Place = tuple[str, int, int]  # suite, length, seed
_NESTED = ("samples", "footprint_by_head", "classes", "clauses", "tables", "params", "turns")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Cells in the order of the sweep. full: the label of full attention; config: what was asked, of which model, with
    which versions, where."""

    cells: tuple[Cell, ...]
    full: str
    threshold: float
    config: Mapping[str, Any]

    def curves(self) -> dict[Curve, tuple[Cell, ...]]:
        """The finished cells by curve, full attention's among them."""
        found: dict[Curve, list[Cell]] = {}
        for cell in self.cells:
            if cell.done:
                found.setdefault(curve_of(cell), []).append(cell)
        return {curve: tuple(cells) for curve, cells in found.items()}

    def full_scores(self) -> dict[Place, float]:
        """Full attention's scores by suite, length and seed."""
        return {_place(c): c.score for c in self.cells if c.label == self.full and c.score is not None}

    def critical(self) -> list[Spread]:
        """Critical footprints of every curve but full attention's, with their spread over seeds."""
        scores = self.full_scores()
        out = []
        for curve, cells in self.curves().items():
            each = []
            for seed in dict.fromkeys(cell.seed for cell in cells):
                mine = [cell for cell in cells if cell.seed == seed]
                full = scores.get(_place(mine[0]))
                if full is not None:
                    points = [(float(c.footprint or 0), float(c.score or 0)) for c in mine]
                    each.append((seed, critical_footprint(points, full, self.threshold)))
            if curve[0] != self.full and each:
                out.append(spread(*curve, each))
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; what was produced, word by word, stays in the cells."""
        cells = []
        scores = self.full_scores()
        for cell in self.cells:
            data = cell.to_dict()
            data["samples"] = [{k: v for k, v in sample.items() if k != "produced"} for sample in data["samples"]]
            cells.append(data | {"relative": _relative(cell, scores)})
        critical = [asdict(found) for found in self.critical()]
        return {
            "format": FORMAT, "config": dict(self.config), "full": self.full, "threshold": self.threshold,
            "critical": critical, "cells": cells,
        }  # fmt: skip

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `results.json` and `results.csv` into a folder; gives their paths."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        paths = where / "results.json", where / "results.csv"
        _replace(paths[0], json.dumps(self.to_dict(), indent=1) + "\n")
        _replace(paths[1], self._csv())
        return paths

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw what there is to draw as PNG files in a folder; gives their paths. Needs matplotlib."""
        from kvcompile.evaluation.plots import plot_all

        return plot_all(self, Path(folder))

    def _csv(self) -> str:
        plain = [spec.name for spec in fields(Cell) if spec.name not in _NESTED]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*plain, "relative", "params", "turns"])
        scores = self.full_scores()
        for cell in self.cells:
            params = " ".join(f"{key}={value}" for key, value in cell.params.items())
            turns = " ".join(f"{score:.6g}" for score in cell.turns)
            writer.writerow([*(getattr(cell, name) for name in plain), _relative(cell, scores), params, turns])
        return out.getvalue()

    def __str__(self) -> str:
        parts, critical = [], self.critical()
        for suite, length in dict.fromkeys((cell.suite, cell.length) for cell in self.cells):
            mine = [cell for cell in self.cells if (cell.suite, cell.length) == (suite, length)]
            seeds = len({cell.seed for cell in mine})
            parts.append(f"{suite}, {length} tokens, {mine[0].count} samples" + _times(seeds))
            parts.append(_aligned(_HEADS, [_row(same) for same in _same_case(mine)]))
            found = [s for s in critical if (s.suite, s.length) == (suite, length)]
            if found:
                parts.append(f"critical footprint: the smallest with {self.threshold:.0%} of the score of {self.full}")
                parts.append(_aligned(_CRITICAL_HEADS, [_critical_row(s) for s in found]))
        reasons = dict.fromkeys((method(c.label, c.chunk), c.budget, c.reason) for c in self.cells if not c.done)
        parts += [f"skipped: {name}{_at(budget)}: {reason}" for name, budget, reason in reasons]
        return "\n".join(parts)


def curve_of(cell: Cell) -> Curve:
    return cell.label, cell.chunk, cell.suite, cell.length


def _place(cell: Cell) -> Place:
    return cell.suite, cell.length, cell.seed


def _relative(cell: Cell, full: Mapping[Place, float]) -> float | None:
    """A score as a part of full attention's; None where either is not known, or full attention's is 0."""
    of = full.get(_place(cell))
    return cell.score / of if of and cell.score is not None else None


def point_of(cell: Cell) -> float | str:
    """What tells the points of a curve apart: the budget, else the plan. Models may have tables of their own."""
    return cell.digest if cell.budget is None else cell.budget


def method(label: str, chunk: int | None) -> str:
    """A curve's name for people."""
    return label if chunk is None else f"{label}, pieces of {chunk}"


# -- text -------------------------------------------------------------------------------------------------------------

_HEADS = ("method", "budget", "score", "footprint", "peak", "kept", "KiB held")
_CRITICAL_HEADS = ("method", "critical", "lowest", "highest", "interpolated", "seeds that reach it")


def _same_case(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that differ in their seed only, together."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.label, cell.chunk, point_of(cell)), []).append(cell)
    return list(found.values())


def _row(cells: list[Cell]) -> tuple[str, ...]:
    first, done = cells[0], [cell for cell in cells if cell.done]
    budget = "-" if first.budget is None else f"{first.budget:.4g}"
    name = method(first.label, first.chunk)
    if not done:
        return name, budget, "skipped", *[""] * (len(_HEADS) - 3)

    def mean(key: str) -> float:
        return fmean(getattr(cell, key) for cell in done)

    scores = [cell.score or 0.0 for cell in done]
    about = f" ({min(scores):.3f} to {max(scores):.3f})" if len(done) > 1 else ""
    held = f"{mean('bytes_resident') / 1024:.0f} of {mean('bytes_full') / 1024:.0f}"
    figures = (f"{mean(key):.3f}" for key in ("footprint", "peak", "kept"))
    return name, budget, f"{mean('score'):.3f}{about}", *figures, held


def _critical_row(found: Spread) -> tuple[str, ...]:
    crossing = "-" if found.interpolated is None else f"~{found.interpolated:.3f}"
    name = method(found.label, found.chunk)
    if not found.reached:
        return name, "none", "", "", "", f"0 of {found.seeds}"
    figures = (f"{value:.3f}" for value in (found.mean, found.lowest, found.highest))
    return name, *figures, crossing, f"{found.reached} of {found.seeds}"


def _at(budget: float | None) -> str:
    return "" if budget is None else f" at budget {budget:.4g}"


def _times(seeds: int) -> str:
    return f" of {seeds} seeds each" if seeds > 1 else ""


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first one left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for first, *rest in (heads, *rows):
        words = [word.rjust(width) for word, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *words]).rstrip())
    return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
