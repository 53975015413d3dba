"""The GPU benchmarks without a GPU: every part runs on the interpreter, claims are judged, gaps are named."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.triton_interpreted.plans import no_interpreter

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the folder, by name; they go again, because other benchmarks use the same names."""
    names = [path.stem for path in FOLDER.glob("*.py") if path.stem != "__main__"]
    monkeypatch.syspath_prepend(str(FOLDER))
    hidden = {name: sys.modules.pop(name, None) for name in names}
    found: dict[str, ModuleType] = {name: importlib.import_module(name) for name in names}
    try:
        yield SimpleNamespace(**found)
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in hidden.items() if module is not None})


def run(*options: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER), *options, "--out", str(folder / "out")],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "KVC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SLOW = pytest.mark.slow


@pytest.mark.skipif(bool(no_interpreter()), reason=no_interpreter())
@pytest.mark.parametrize(
    "part",
    ["copy", "evict", *[pytest.param(name, marks=SLOW) for name in ("decode", "prefill", "model", "pages", "blocks")]],
)
def test_a_dry_run_of_each_part_works_and_files_nothing(part: str, tmp_path: Path) -> None:
    done = run("--dry", "--part", part, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"{part} ")]
    assert rows and all(": measured {" in line for line in rows)
    figures = [json.loads(line.split(": measured ")[1]) for line in rows]
    for row in figures:
        assert "notes" not in row
        assert row.get("error", 0.0) < 1e-5  # ours against SDPA or FlexAttention on the same entries


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--part", "copy", folder=tmp_path)
    assert done.returncode != 0
    assert "torch sees no CUDA device here; nothing was run" in done.stderr


def test_the_page_that_is_filed_is_that_of_its_figures(gpu: Any) -> None:
    folder = ROOT / "benchmarks" / "results"
    results = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    parts = tuple(m.PART for m in (gpu.copying, gpu.decoding, gpu.prefilling, gpu.evicting, gpu.generating))
    parts += (gpu.reading.PAGED, gpu.reading.BLOCKED)
    plot = "gpu.png" if (folder / "gpu.png").exists() else None
    assert gpu.page.markdown(results, parts, plot) == (folder / "gpu.md").read_text(encoding="utf-8")
    claims = [claim.judged(gpu.page.flat(results["parts"])) for claim in gpu.claims.CLAIMS]
    assert results["claims"] == claims
    for name, rows in results["parts"].items():
        for row in rows:
            assert (row["figures"] is None) == (row["status"] != "measured"), (name, row)
    if results["machine"] is None:
        assert {row["status"] for rows in results["parts"].values() for row in rows} == {gpu.page.ABSENT}
        assert {claim["holds"] for claim in claims} == {"unmeasured"}


def rows_of(gpu: Any, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    """Results under which every claim holds, but for what is changed: part__figure=value of the last row."""
    decode = {"entries": 32768, "batch": 16, "mib": 2048, "of_copy": 0.9, "ours": 100.0, "scored": 104.0}
    rows = {
        "decode": [
            decode | {"entries": 512, "batch": 4, "mib": 8, "of_copy": 0.4, "scored": 180.0, "flex_asked": False},
            decode | {"ragged": 102.0, "flex_ragged": 160.0, "flex_asked": True},
        ],
        "prefill": [
            {"tokens": 65536, "local": 0, "live": 1.0, "ours": 50.0, "over_dense": 0.8},
            {"tokens": 65536, "local": 50, "live": 0.52, "ours": 30.0, "over_dense": 1.7},
        ],
        "evict": [{"part": 0.1}, {"part": 0.4}],
        "pages": [
            {"entries": 131072, "batch": 8, "over_dense": 1.0}, {"entries": 65536, "batch": 8, "over_dense": 4.5},
        ],
        "blocks": [
            {"tokens": 65536, "sparse": 50, "over_dense": 1.1}, {"tokens": 65536, "sparse": 90, "over_dense": 4.2},
        ],
        "model": [
            {"batch": batch, "context": 32768, "keep": keep, "compile": "cudagraph", "policy": policy, "tokens": tokens}
            for batch, keep, policy, tokens in (
                (16, 100, "keep_all", 800.0), (64, 25, "snapkv", 2500.0), (16, 25, "streaming", 1.0),
                (16, 25, "snapkv", 1900.0),
            )
        ],
    }  # fmt: skip
    for name, value in changes.items():
        part, figure = name.split("__")
        rows[part][-1][figure] = value
    return rows


def test_claims_hold_on_what_was_measured(gpu: Any) -> None:
    found = [claim.judged(rows_of(gpu)) for claim in gpu.claims.CLAIMS]
    assert [claim["holds"] for claim in found] == ["yes"] * 10
    values = [0.9, 1.04, 160 / 102, 1.7, 30 / 0.52 / 50, 0.4, 1900 / 800, 2500 / 800, 4.5, 4.2]
    assert [claim["found"] for claim in found] == pytest.approx(values)


@pytest.mark.parametrize(
    ("which", "changed", "holds"),
    [
        (0, {"decode__of_copy": 0.84}, "no"),
        (8, {"pages__over_dense": 3.9}, "no"),
        (9, {"blocks__over_dense": None}, "unmeasured"),
        (0, {"decode__of_copy": None}, "unmeasured"),
        (1, {"decode__scored": 106.0}, "no"),
        (2, {"decode__ragged": 150.0}, "no"),
        (2, {"decode__flex_ragged": None}, "unmeasured"),
        (3, {"prefill__over_dense": 1.5}, "no"),
        (4, {"prefill__ours": 40.0}, "no"),
        (4, {"prefill__tokens": 131072}, "unmeasured"),  # nothing dense of that length to compare with
        (5, {"evict__part": 0.6}, "no"),
        (6, {"model__tokens": 1700.0}, "no"),
        (6, {"model__tokens": None}, "unmeasured"),
    ],
)
def test_a_claim_that_fails_or_lacks_figures_says_so(gpu: Any, which: int, changed: dict[str, Any], holds: str) -> None:
    claims = [claim.judged(rows_of(gpu, **changed))["holds"] for claim in gpu.claims.CLAIMS]
    assert claims[which] == holds


def test_a_row_without_figures_leaves_a_claim_open_or_refuted_by_the_others(gpu: Any) -> None:
    for of_copy, holds in ((0.9, "unmeasured"), (0.7, "no")):
        rows = rows_of(gpu, decode__of_copy=of_copy)
        rows["decode"].append({"entries": 131072, "batch": 32, "flex_asked": False})  # it failed as a whole
        judged = gpu.claims.CLAIMS[0].judged(rows)
        assert (judged["holds"], judged["found"]) == (holds, of_copy)


def test_a_form_that_a_kernel_refuses_costs_only_itself(gpu: Any) -> None:
    def refused() -> float:
        raise RuntimeError("no kernel takes this")

    bench = SimpleNamespace(seconds=lambda run: run())
    assert gpu.peers.fastest(bench, [lambda: 3.0, refused, lambda: 2.0]) == 2.0
    with pytest.raises(RuntimeError, match="no kernel takes this"):
        gpu.peers.fastest(bench, [refused, refused])


def test_pairs_are_counted_as_a_mask_would(gpu: Any) -> None:
    for tokens, sink, window in ((50, 8, 16), (10, 4, 16), (30, 20, 5), (20, 8, 16), (40, 0, 7)):
        q, k = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        causal = k <= q
        local = causal & ((k > q - window) | (k < sink))
        assert gpu.prefilling.pairs(tokens, sink, window) == (int(causal.sum()), int(local.sum()))


def test_ragged_lengths_spread_around_their_mean(gpu: Any) -> None:
    lengths = gpu.rows.spread(1000, 64)
    assert sum(lengths) == pytest.approx(64000, rel=0.01)
    assert min(lengths) < 150 and max(lengths) > 1850
    assert lengths == gpu.rows.spread(1000, 64) != sorted(lengths)


def test_figures_make_a_plot(gpu: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = {
        name: [{"cell": {}, "figures": row, "status": "measured"} for row in rows]
        for name, rows in rows_of(gpu).items()
    }
    assert gpu.page.plot({"parts": parts}, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert not gpu.page.plot({"parts": {}}, tmp_path / "none.png")
