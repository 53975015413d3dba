"""Figures of an evaluation, as PNG files: accuracy over footprint and peak, needle depth, heads.

Takes an `Evaluation`, or numbers; gives paths. Needs matplotlib (the optional extra `eval`), which is only imported
here and draws without a display. Guarantees: lines differ by colour, marker and dash, so that they stay apart in grey
and for colour-blind readers; every axis says its unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kvcompile.evaluation.cells import Cell
from kvcompile.evaluation.critical import Spread
from kvcompile.evaluation.fingerprint import digest
from kvcompile.evaluation.results import method, point_of
from kvcompile.kernels.errors import KvCompileError

if TYPE_CHECKING:
    from kvcompile.evaluation.results import Evaluation

# Okabe and Ito's colours, which stay apart for colour-blind eyes; yellow, which paper swallows, is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
DPI = 150
DEPTHS = 10  # rows of a heat map at most
PANELS = 12  # panels of a figure at most
LETTERS = 80  # of a text in a file's name

Point = tuple[float, float, float, float]  # x, mean score, lowest and highest over seeds


def plot_all(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Every figure that the evaluation has numbers for."""
    canvas(1, 1)  # before anything is written: is matplotlib there?
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for suite, length in dict.fromkeys((cell.suite, cell.length) for cell in evaluation.cells if cell.done):
        for axis in ("footprint", "peak"):
            path = folder / f"accuracy_over_{axis}_{slug(suite)}_{length}.png"
            made.append(accuracy(evaluation, suite, length, axis, path))
    for title, cells in _by_label(evaluation).items():
        made += depths(title, cells, folder / f"depth_{slug(title)}.png")
        made += footprints_by_head(title, cells, folder / f"footprint_by_head_{slug(title)}.png")
        made += head_classes(title, cells, folder / f"heads_{slug(title)}.png")
    return made


def accuracy(evaluation: Evaluation, suite: str, length: int, axis: str, path: Path) -> Path:
    """Scores over `footprint` or `peak`, a line per method, means over seeds with their range; the line at the
    threshold of full attention's score, and over the footprint the critical points, ringed."""
    figure = canvas(7.5, 4.8)
    axes = figure.add_subplot()
    curves = {c: cells for c, cells in evaluation.curves().items() if c[2:] == (suite, length)}
    drawn = [(curve, cells) for curve, cells in curves.items() if curve[0] != evaluation.full]
    critical = {(s.label, s.chunk, s.suite, s.length): s for s in evaluation.critical()}
    for number, (curve, cells) in enumerate(drawn):
        points = _points(cells, axis)
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        }
        x, y, low, high = zip(*points, strict=True)
        axes.plot(x, y, label=method(curve[0], curve[1]), linewidth=1.4, markersize=5, **style)
        if low != high:
            shade = min(0.15, 0.6 / len(drawn))  # many of them lie on each other
            axes.fill_between(x, low, high, color=style["color"], alpha=shade, linewidth=0)
        if axis == "footprint":
            _ring(axes, critical.get(curve), style["color"], points)
    full = [cell for curve, cells in curves.items() if curve[0] == evaluation.full for cell in cells]
    if full:
        top = fmean(cell.score or 0.0 for cell in full)
        axes.plot([1.0], [top], color="k", marker="*", markersize=11, linestyle="none", label="full attention")
        line = f"{evaluation.threshold:.0%} of full attention"
        axes.axhline(evaluation.threshold * top, color="#666666", linestyle=(0, (6, 3)), linewidth=1, label=line)
    what = "KV footprint" if axis == "footprint" else "peak of the cache"
    axes.set_xlabel(f"{what} (part of full attention's)")
    axes.set_ylabel("score (0 to 1)")
    axes.set_title(f"{suite}, {length} tokens", fontsize=10)
    axes.set_xlim(0, 1.05)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path)


def depths(title: str, cells: Sequence[Cell], path: Path) -> list[Path]:
    """Heat maps of the first turn's score over needle depth and prompt length, one per budget; none without needles
    at several depths."""
    panels: list[tuple[str, list[str], list[str], list[list[float]]]] = []
    for budget, mine in _by_budget(cells).items():
        found: dict[tuple[int, int], list[float]] = {}
        for cell in mine:
            for sample in cell.samples:
                if sample["depth"] is not None and sample["scores"]:
                    row = min(int(sample["depth"] * DEPTHS), DEPTHS - 1)
                    found.setdefault((row, cell.length), []).append(sample["scores"][0])
        lengths = sorted({length for _, length in found})
        if len({row for row, _ in found}) < 2:
            continue
        grid = [
            [fmean(found[row, length]) if (row, length) in found else math.nan for length in lengths]
            for row in range(DEPTHS)
        ]
        rows = [f"{row * 100 // DEPTHS} to {(row + 1) * 100 // DEPTHS} %" for row in range(DEPTHS)]
        panels.append((budget, rows, [str(length) for length in lengths], grid))
    if not panels:
        return []
    labels = ("prompt length (tokens)", "needle depth (part of the prompt)", "score of the first question (0 to 1)")
    return [_panels(title, panels, labels, path, (0.0, 1.0))]


def footprints_by_head(title: str, cells: Sequence[Cell], path: Path) -> list[Path]:
    """Heat maps of the footprint of each KV head, one per budget; none where it was not measured."""
    panels = []
    for budget, mine in _by_budget(cells).items():
        grids = [cell.footprint_by_head for cell in mine if cell.footprint_by_head]
        if grids:
            grid = [[fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*grids, strict=True)]
            panels.append((budget, _count(len(grid)), _count(len(grid[0])), grid))
    labels = ("KV head", "layer", "KV footprint (part of full attention's)")
    return [_panels(title, panels, labels, path, (0.0, 1.0))] if panels else []


def head_classes(title: str, cells: Sequence[Cell], path: Path) -> list[Path]:
    """The head class of each KV head, one map per budget; none where a policy has one class only."""
    maps = {budget: mine[0].classes for budget, mine in _by_budget(cells).items() if mine[0].classes}
    names = list(dict.fromkeys(name for classes in maps.values() for row in classes for name in row))
    if len(names) < 2:
        return []
    panels = [
        (
            budget,
            _count(len(classes)),
            _count(len(classes[0])),
            [[float(names.index(n)) for n in row] for row in classes],
        )
        for budget, classes in maps.items()
    ]
    return [_panels(title, panels, ("KV head", "layer", "head class"), path, (-0.5, len(names) - 0.5), names)]


def head_map(
    scores: Sequence[Sequence[float]], kept: Sequence[tuple[int, int]] | frozenset[tuple[int, int]], path: Path,
    title: str = "",
) -> Path:  # fmt: skip
    """Scores of KV heads, [layer][head], with the kept (layer, head) pairs framed."""
    figure = canvas(1.6 + 0.45 * len(scores[0]), 1.4 + 0.35 * len(scores))
    axes = figure.add_subplot()
    image = axes.imshow(scores, cmap="cividis", aspect="auto")
    for layer, head in kept:
        axes.add_patch(_frame(head - 0.5, layer - 0.5))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    _ticks(axes, _count(len(scores)), _count(len(scores[0])))
    axes.set_title(title or f"{len(kept)} heads kept (framed)", fontsize=10)
    figure.colorbar(image, ax=axes, label="score (higher: keep)")
    return _save(figure, path)


def slug(text: str) -> str:
    """A text as part of a file's name; what is cut off a long one stays in a few letters of its digest."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_") or "x"
    return plain if len(plain) <= LETTERS else f"{plain[: LETTERS - 9]}_{digest(text)[:8]}"


# -- parts ------------------------------------------------------------------------------------------------------------


def canvas(width: float, height: float) -> Any:
    """An empty figure, sizes in inches. KvCompileError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KvCompileError('plots need matplotlib, which is not installed: pip install "kvcompile[eval]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _frame(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2)


def _by_label(evaluation: Evaluation) -> Mapping[str, list[Cell]]:
    """Finished cells of a method on a suite, all lengths together, by title."""
    found: dict[str, list[Cell]] = {}
    for cell in evaluation.cells:
        if cell.done:
            found.setdefault(f"{method(cell.label, cell.chunk)} on {cell.suite}", []).append(cell)
    return found


def _by_budget(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault("as it is" if cell.budget is None else f"budget {cell.budget:.3g}", []).append(cell)
    return found


def _points(cells: Sequence[Cell], axis: str) -> list[Point]:
    """One point per budget, means over seeds, by x."""
    found: dict[float | str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(point_of(cell), []).append(cell)
    out = []
    for same in found.values():
        scores = [cell.score or 0.0 for cell in same]
        out.append((fmean(getattr(c, axis) for c in same), fmean(scores), min(scores), max(scores)))
    return sorted(out)


def _ring(axes: Any, found: Spread | None, colour: str, points: list[Point]) -> None:
    """Mark the critical footprint, a mean over seeds that all have one, at the point of the line that is nearest."""
    if found is None or found.reached < found.seeds:
        return
    x, y, *_ = min(points, key=lambda point: abs(point[0] - found.mean))
    axes.plot([x], [y], marker="o", markersize=12, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.6)


def _panels(
    title: str, panels: Sequence[tuple[str, list[str], list[str], list[list[float]]]], labels: tuple[str, str, str],
    path: Path, limits: tuple[float, float], kinds: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Heat maps side by side with one colour bar: (heading, names of rows, names of columns, values). With `kinds`
    a value is the number of one of them."""
    from matplotlib import colormaps

    colours = colormaps["cividis"].resampled(len(kinds)) if kinds else colormaps["cividis"]
    panels = panels[:PANELS]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    wide, high = max(len(p[2]) for p in panels), max(len(p[1]) for p in panels)
    figure = canvas(columns * (1.2 + 0.38 * wide) + 2.0, rows * (1.0 + 0.28 * high) + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_axis_off()
            continue
        heading, names, tops, values = panels[number]
        image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        axes.set_title(heading, fontsize=8)
        axes.set_xlabel(labels[0], fontsize=7)
        axes.set_ylabel(labels[1], fontsize=7)
        _ticks(axes, names, tops)
    bar = figure.colorbar(image, ax=grid, label=labels[2])
    if kinds:
        bar.set_ticks(range(len(kinds)), labels=kinds)
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def _ticks(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        step = max(1, len(names) // 12)
        axis.set_ticks(range(0, len(names), step), names[::step], fontsize=7)


def _count(n: int) -> list[str]:
    return [str(i) for i in range(n)]
