"""Plots: every figure that an evaluation has numbers for, legible in print; what is said without matplotlib."""

import sys
from dataclasses import replace

import pytest

from kvcompile.evaluation.cells import Cell
from kvcompile.evaluation.results import Evaluation
from kvcompile.kernels.errors import KvCompileError

CLASSES = (("local", "retrieval"), ("local", "local"))


def cell(label, budget, score, footprint, length=128, seed=0, **more):
    samples = tuple({"depth": d / 10, "tokens": length, "scores": (float(d > 4),)} for d in range(11))
    return Cell(
        f"{label}{budget}{length}{seed}", label, budget, None, "recall", False, length, seed, 11,
        score=score, footprint=footprint, peak=footprint / 2, kept=footprint, samples=samples,
        digest=f"{budget}", **more,
    )  # fmt: skip


@pytest.fixture
def evaluation():
    cells = [cell("full", None, 1.0, 1.0, length, seed) for length in (128, 256) for seed in (0, 1)]
    for budget in (0.1, 0.3, 0.6):
        for length in (128, 256):
            for seed in (0, 1):
                grid = ((budget, 1.0), (budget, budget))
                cells.append(cell("duo & co", budget, budget + 0.35 + seed / 10, budget + 0.2, length, seed,
                                  classes=CLASSES, footprint_by_head=grid))  # fmt: skip
    return Evaluation(tuple(cells), "full", 0.9, {})


def test_every_figure_is_drawn(evaluation, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    paths = evaluation.plot(tmp_path / "figures")
    assert sorted(path.name for path in paths) == [
        "accuracy_over_footprint_recall_128.png", "accuracy_over_footprint_recall_256.png",
        "accuracy_over_peak_recall_128.png", "accuracy_over_peak_recall_256.png",
        "depth_duo_co_on_recall.png", "depth_full_on_recall.png",
        "footprint_by_head_duo_co_on_recall.png", "heads_duo_co_on_recall.png",
    ]  # fmt: skip
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[1] > 300 and pixels[..., :3].std() > 0.02, path.name


def test_lines_axes_and_marks(evaluation, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from kvcompile.evaluation import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    plots.accuracy(evaluation, "recall", 128, "footprint", tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "KV footprint (part of full attention's)" and axes.get_ylabel() == "score (0 to 1)"
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["duo & co"].get_xdata()) == pytest.approx([0.3, 0.5, 0.8])
    assert list(lines["duo & co"].get_ydata()) == pytest.approx([0.5, 0.7, 1.0])
    assert list(lines["90% of full attention"].get_ydata()) == [0.9, 0.9]
    rings = [line for line in axes.lines if line.get_markersize() == 12]
    assert [list(ring.get_xdata()) for ring in rings] == [pytest.approx([0.8])]  # both seeds reach 90 % there only


def test_each_seed_may_have_tables_and_so_a_plan_of_its_own(evaluation, tmp_path, monkeypatch):
    """One point per budget, and one row of text, whatever the plans' digests."""
    pytest.importorskip("matplotlib")
    from kvcompile.evaluation import plots

    apart = replace(evaluation, cells=tuple(replace(c, digest=c.digest + str(c.seed)) for c in evaluation.cells))
    mine = [c for c in apart.cells if c.label == "duo & co" and c.length == 128]
    points = plots._points(mine, "footprint")
    assert [point[:2] for point in points] == [pytest.approx(xy) for xy in ((0.3, 0.5), (0.5, 0.7), (0.8, 1.0))]
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    plots.accuracy(apart, "recall", 128, "footprint", tmp_path / "x.png")
    assert {len(line.get_xdata()) for line in drawn[0].axes[0].lines if line.get_label() == "duo & co"} == {3}


def test_no_ring_where_a_seed_has_no_critical_footprint(evaluation, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from kvcompile.evaluation import plots

    worse = tuple(replace(c, score=c.score / 2) if c.seed == 1 and c.budget else c for c in evaluation.cells)
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    plots.accuracy(replace(evaluation, cells=worse), "recall", 128, "footprint", tmp_path / "x.png")
    assert not [line for line in drawn[0].axes[0].lines if line.get_markersize() == 12]


def test_names_of_files_stay_apart():
    from kvcompile.evaluation.plots import LETTERS, slug

    long = "a method of a long name on a suite of " + "a" * 60
    assert slug("duo & co") == "duo_co" and slug("!") == "x"
    assert slug(long + " b") != slug(long + " c") and len(slug(long)) == LETTERS


def test_styles_stay_apart_in_grey():
    from kvcompile.evaluation.plots import COLOURS, DASHES, MARKERS

    styles = {(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
              for i in range(20)}  # fmt: skip
    assert len(styles) == 20
    assert len({(MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i in range(12)}) == 12


def test_without_depths_classes_or_heads_there_is_no_such_figure(evaluation, tmp_path):
    pytest.importorskip("matplotlib")
    plain = tuple(
        replace(c, samples=({"depth": None, "tokens": 9, "scores": (1.0,)},), classes=(), footprint_by_head=None)
        for c in evaluation.cells
    )
    names = [path.name for path in replace(evaluation, cells=plain).plot(tmp_path)]
    assert names and all(name.startswith("accuracy_over_") for name in names)


def test_a_head_map_frames_what_is_kept(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from kvcompile.evaluation import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    plots.head_map(((0.1, 0.9), (0.2, 0.3)), frozenset({(0, 1)}), tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, -0.5)]
    assert axes.images[0].get_array().tolist() == [[0.1, 0.9], [0.2, 0.3]]


def test_matplotlib_missing_is_said_before_anything_is_written(evaluation, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KvCompileError, match=r'pip install "kvcompile\[eval\]"'):
        evaluation.plot(tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
