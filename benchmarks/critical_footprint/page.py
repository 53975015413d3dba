"""The page of results: critical footprints by task and method, which heads were named, and the plots.

Takes a sweep over all models; writes Markdown, JSON, CSV and PNG. All figures are of this run; where a method has no
critical footprint the page says so.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from heads import SINK, WINDOW
from models import LENGTH

from kvcompile.evaluation import tales
from kvcompile.evaluation.critical import Spread
from kvcompile.evaluation.results import Evaluation
from kvcompile.evaluation.samples import suite
from kvcompile.learning.masks import load_scores

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import ablation

TASKS = {
    "recall": "one fact, the question ends the prompt",
    "recall_later": "three facts, asked for after the prompt",
    "topic": "the topic, the question ends the prompt",
    "topic_later": "the topic, asked for after the prompt",
}
OURS = "prulong"  # the method whose margin over the others is reported
SHOWN = 50  # per cent of the heads, of which the table of heads tells
METHODS = ("prulong", "duo", "induction", "echo")
MATERIAL = 0.1  # part of the largest rise of the loss from which on a head counts


def write(
    found: Evaluation, rise: dict[int, dict[str, torch.Tensor]], named: dict[int, dict[str, Path]], out: Path
) -> None:
    """Everything about a sweep, into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    critical = found.critical()
    chunks = sorted({s.chunk for s in critical if s.chunk is not None})
    parts = [_head(found), _story(critical, chunks), *(_table(critical, chunk) for chunk in chunks)]
    parts += [_full(found), _heads(rise, named), _plots(found, out), _how(found)]
    (out / "critical_footprint.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        _, table = found.save(folder)
        shutil.copy(table, out / "critical_footprint.csv")
    data = found.to_dict()
    data["cells"] = len(data["cells"])  # one by one they are in the CSV
    (out / "critical_footprint.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def ablated(folder: Path) -> dict[str, torch.Tensor]:
    """Rise of the answers' loss where one KV head alone is local, [layers, KV heads] in nats, by skill."""
    from transformers import AutoTokenizer

    model, tokenizer = ablation.load(folder), AutoTokenizer.from_pretrained(folder)
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    out = {}
    for skill in ("recall", "topic"):
        samples = suite(skill).samples(32, LENGTH, 98, tokenizer)
        asked = [tales.Prompt(s.prompt, "", s.turns[0].answer, 0) for s in samples]
        none = torch.zeros(shape, dtype=torch.bool)
        # As a step reads: sink, the window before the query, and the query's own entry.
        width = SINK + WINDOW + 1
        base, _ = ablation.recall(model, asked, none, local_width=width)
        rise = torch.zeros(shape)
        for layer in range(shape[0]):
            for head in range(shape[1]):
                one = none.clone()
                one[layer, head] = True
                rise[layer, head] = ablation.recall(model, asked, one, local_width=width)[0] - base
        out[skill] = rise.clamp(min=0)
    return out


def _head(found: Evaluation) -> str:
    tasks = "\n".join(f"- `{name}`: {what}" for name, what in TASKS.items())
    return (
        "# Critical KV footprint\n\n"
        "The smallest KV footprint at which a method keeps 90 % of full attention's score on a task (PruLong, arXiv "
        f"2506.17121). {len(found.config['seeds'])} small models trained for this, prompts of {LENGTH} tokens, "
        f"{found.cells[0].count} prompts per model and point; parts kept from 10 to 90 %. Written by\n"
        "`python benchmarks/critical_footprint`; every figure comes from the compiled chunk-by-chunk run, footprints "
        f"from the cache's own count.\n\n{tasks}"
    )


def _story(critical: list[Spread], chunks: list[int]) -> str:
    """How far PruLong's head masks are from DuoAttention's, and from the best of all others."""
    lines = [
        "## PruLong against the others",
        "",
        "Means over models, a model without a critical footprint counted as 1.0; below 0 PruLong needs less.",
        "`razor, echo` ranks heads by the echo probe alone; as published, RazorAttention takes 14 of its 15 % by",
        "induction, which is `razor, induction`. The lowest point of all of these keeps one head of twelve whole.",
        "",
        "| task | piece | PruLong | Duo | against Duo | best other | which | against it |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for task in TASKS:
        for chunk in chunks[:-1]:
            mine = {s.label: s for s in critical if (s.suite, s.chunk) == (task, chunk)}
            own, duo = mine.pop(OURS), mine["duo"]
            best = min(mine.values(), key=lambda s: s.mean)
            gaps = [f"{own.mean / other.mean - 1:+.1%}" for other in (duo, best)]
            lines.append(
                f"| {task} | {chunk} | {own.mean:.3f} | {duo.mean:.3f} | {gaps[0]} | {best.mean:.3f} | {best.label} | "
                f"{gaps[1]} |"
            )
    return "\n".join(lines)


def _table(critical: list[Spread], chunk: int) -> str:
    what = (
        "the whole prompt: post-fill eviction"
        if chunk == LENGTH
        else f"{chunk} tokens, 1/{LENGTH // chunk} of the prompt"
    )
    lines = [f"## Pieces of {what}", "", f"| method | {' | '.join(TASKS)} |", "|---|" + "---|" * len(TASKS)]
    mine = [s for s in critical if s.chunk == chunk]
    for label in sorted({s.label for s in mine}):
        row = {s.suite: s for s in mine if s.label == label}
        lines.append(f"| {label} | {' | '.join(_shown(row.get(task)) for task in TASKS)} |")
    lines += ["", "Mean over models, 1.0 for one that has none (lowest to highest; how many have one, if not all; `~`: "
              "where the line between measured points crosses 90 %)."]  # fmt: skip
    return "\n".join(lines)


def _shown(found: Spread | None) -> str:
    if found is None or not found.reached:
        return "none"
    text = f"{found.mean:.3f} ({found.lowest:.3f} to {found.highest:.3f})"
    if found.reached < found.seeds:
        text += f", {found.reached} of {found.seeds}"
    return text if found.interpolated is None else f"{text} ~{found.interpolated:.3f}"


def _full(found: Evaluation) -> str:
    lines = ["## Full attention", "", f"| model | {' | '.join(TASKS)} |", "|---|" + "---:|" * len(TASKS)]
    for seed in found.config["seeds"]:
        scores = {cell.suite: cell.score for cell in found.cells if (cell.label, cell.seed) == (found.full, seed)}
        lines.append(f"| seed {seed} | {' | '.join(f'{scores[task]:.3f}' for task in TASKS)} |")
    return "\n".join(lines)


def _heads(rise: dict[int, dict[str, torch.Tensor]], named: dict[int, dict[str, Path]]) -> str:
    """Which heads carry each skill, by ablation, and which of them each method names among its first half."""
    lines = [
        "## Heads",
        "",
        f"Heads that carry a skill: each alone, made local (sink {SINK}, window {WINDOW}), raises the loss of the "
        f"answers by at least {MATERIAL:.0%} of the largest rise. Then how many each method keeps with {SHOWN} % "
        "of the heads.",
        "",
        "| model | skill | heads (layer.head: rise in nats) | PruLong | Duo | induction | echo |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for seed, skills in rise.items():
        kept = {name: load_scores(_scores(named[seed], name)).chosen(f"{SHOWN}%") for name in METHODS}
        for skill, values in skills.items():
            carry = [(i, j) for i, j in (values >= MATERIAL * values.max()).nonzero().tolist()]
            carry.sort(key=lambda place, values=values: -float(values[place]))
            told = ", ".join(f"{i}.{j}: {float(values[i, j]):.2f}" for i, j in carry)
            counts = " | ".join(f"{sum(place in kept[name] for place in carry)} of {len(carry)}" for name in kept)
            lines.append(f"| seed {seed} | {skill} | {told} | {counts} |")
    return "\n".join(lines)


def _scores(named: dict[str, Path], method: str) -> Path:
    return named[f"prulong-{SHOWN}"].with_suffix(".safetensors") if method == "prulong" else named[method]


def _plots(found: Evaluation, out: Path) -> str:
    """Score over footprint, one picture per task; pieces of an eighth of the prompt."""
    from kvcompile.evaluation.plots import accuracy

    chunk = LENGTH // 8
    cells = tuple(cell for cell in found.cells if cell.label == found.full or cell.chunk == chunk)
    small = Evaluation(cells, found.full, found.threshold, found.config)
    lines = [f"## Score over footprint, pieces of {chunk}"]
    for task in TASKS:
        path = accuracy(small, task, LENGTH, "footprint", out / f"critical_footprint_{task}.png")
        lines.append(f"![{task}]({path.name})")
    return "\n\n".join(lines)


def _how(found: Evaluation) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.config["versions"].items())
    machine = ", ".join(f"{key} {value}" for key, value in found.config["machine"].items())
    skipped = sum(not cell.done for cell in found.cells)
    seconds = fmean(cell.seconds for cell in found.cells if cell.done)
    return (
        "## How\n\n"
        f"{len(found.cells)} cells, {skipped} of them skipped; {seconds:.1f} s each. {machine}; {versions}. Methods "
        "and their policies: `benchmarks/critical_footprint/methods.py`.\n\n"
        "Naive: pieces are judged by their own last queries; patched: by the prompt's last (`peek`), whose entries "
        "count while they are read. All keep the same part of each piece, and what a piece keeps stays. PruLong learns "
        "one table per target on plain tales with facts and topics, DuoAttention one on facts alone; their local heads "
        f"keep {SINK} sinks and a window of {WINDOW}. Tasks and their data: `docs/evaluation.md`."
    )
