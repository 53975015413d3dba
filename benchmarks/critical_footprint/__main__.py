"""The critical KV footprint of twelve methods on tasks of long memory: PruLong's experiment, on models trained here.

    python benchmarks/critical_footprint [--work build/critical_footprint] [--models 3] [--count 32] [--jobs 2]

Trains the models, learns their head tables, sweeps methods x parts kept x piece sizes x tasks through the compiled
chunk-by-chunk run, and writes benchmarks/results/critical_footprint.md, .json, .csv and the plots. What is done is
kept in the work folder, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import heads
import methods
import models
import page
import torch

from kvcompile.evaluation.evaluate import evaluate
from kvcompile.evaluation.results import Evaluation

ROOT = Path(__file__).parents[2]
TASKS = ("recall", "recall_later", "topic", "topic_later")
CHUNKS = (models.LENGTH // 8, models.LENGTH // 4, models.LENGTH)


def tables(folder: Path, seed: int) -> dict[str, Path]:
    """All head tables of one model, learned where they are not there yet."""
    model, _ = models.load(folder)
    where = folder.with_name(f"heads-{seed}")
    where.mkdir(exist_ok=True)
    found = {f"prulong-{keep}": heads.prulong(model, keep, seed, where) for keep in methods.KEEPS}
    probed = {kind: heads.razor(model, kind, where) for kind in ("induction", "echo")}
    return found | probed | {"duo": heads.duo(model, seed, where)}


def swept(folder: Path, seed: int, found: dict[str, Path], work: Path, count: int, jobs: int) -> Evaluation:
    """All methods on one model, at every piece size."""
    model, tokenizer = models.load(folder)
    layers = model.config.num_hidden_layers
    cases = [case for chunk in CHUNKS for case in methods.cases(models.LENGTH, chunk, layers, found)]
    return evaluate(
        model, cases, list(TASKS), tokenizer=tokenizer, length=models.LENGTH, count=count, seeds=(seed,), out=work,
        batch=count, jobs=jobs, progress=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "critical_footprint")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--models", type=int, default=3, help="seeds that must have learned")
    parser.add_argument("--count", type=int, default=32, help="prompts per cell")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    options.work.mkdir(parents=True, exist_ok=True)
    folders = models.trained(options.models, options.work)
    named = {seed: tables(folder, seed) for seed, folder in folders.items()}
    found = [swept(f, seed, named[seed], options.work, options.count, options.jobs) for seed, f in folders.items()]
    cells = tuple(cell for one in found for cell in one.cells)
    config = dict(found[0].config) | {"seeds": list(folders), "model": [dict(one.config)["model"] for one in found]}
    whole = Evaluation(cells, found[0].full, found[0].threshold, config)
    rise = {seed: page.ablated(folder) for seed, folder in folders.items()}
    page.write(whole, rise, named, options.out)
    print(f"{options.out / 'critical_footprint.md'}: {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
