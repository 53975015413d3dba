"""The results page: JSON in, Markdown and a plot out; what was not measured says so in its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from claims import CLAIMS
from measuring import Part

ABSENT = "unmeasured: no GPU at hand"


def flat(entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Part -> rows with cell and figures side by side; `flex_asked` is whether the cell asked for it."""
    found = {}
    for name, rows in entry.items():
        found[name] = [{**row["cell"], "flex_asked": row["cell"].get("flex"), **(row["figures"] or {})} for row in rows]
    return found


def markdown(results: dict[str, Any], parts: tuple[Part, ...], plot: str | None) -> str:
    """The page of a results file."""
    lines = ["# GPU benchmarks", ""]
    if results["machine"]:
        about = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
        lines += [f"One run of `python benchmarks/gpu`: {about}.", ""]
    else:
        lines += [
            "No GPU was at hand for this version: nothing below was measured. `make gpu` runs the checks, tunes the "
            "kernels and fills this page.",
            "",
        ]
    lines += [
        "Each figure is the median of replays between two events, with a cold L2; contestants of a row ran in one "
        "process. A dash stands for what did not run; notes say why.",
        "",
        "## What it must show",
        "",
        "| claim | limit | found | holds |",
        "|---|---|---|---|",
    ]
    flattened = flat(results["parts"])
    for claim in CLAIMS:
        judged = claim.judged(flattened)
        value = "-" if judged["found"] is None else f"{judged['found']:.3f}"
        lines.append(f"| {judged['claim']} | {judged['limit']} | {value} | {judged['holds']} |")
    if plot:
        lines += ["", f"![decode, prompts, whole model]({plot})"]
    for part in parts:
        lines += ["", f"## {part.title}", "", part.says, "", *table(part, results["parts"].get(part.name, []))]
    return "\n".join(lines) + "\n"


def table(part: Part, rows: list[dict[str, Any]]) -> list[str]:
    """One part's rows, then its notes."""
    rows = rows or unmeasured(part)
    keys = [key for key in rows[0]["cell"] if key != "flex"]
    heads = [title + (f", {unit}" if unit else "") for _, title, unit in part.figures]
    lines = ["| " + " | ".join([*keys, *heads, "status"]) + " |", "|---" * (len(keys) + len(heads) + 1) + "|"]
    notes: list[str] = []
    for row in rows:
        figures = row["figures"] or {}
        shown = [str(row["cell"][key]) for key in keys] + [_number(figures.get(key)) for key, _, _ in part.figures]
        lines.append("| " + " | ".join([*shown, row["status"]]) + " |")
        where = ", ".join(f"{key} {row['cell'][key]}" for key in keys)
        notes += [f"- {where}: {note}" for note in figures.get("notes", [])]
    return [*lines, *(["", *notes] if notes else [])]


def unmeasured(part: Part) -> list[dict[str, Any]]:
    """The rows that a full run has."""
    return [{"cell": cell, "figures": None, "status": ABSENT} for cell in part.cells("full")]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(results: dict[str, Any], path: Path) -> bool:
    """Three panels of what there is; False, and no file, where there is nothing or no matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    parts = flat(results["parts"])
    decode = [row for row in parts.get("decode", []) if row.get("of_copy")]
    prefill = [row for row in parts.get("prefill", []) if row.get("over_dense")]
    model = [row for row in parts.get("model", []) if row.get("tokens")]
    if not (decode or prefill or model):
        return False
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for batch in sorted({row["batch"] for row in decode}):
        some = [row for row in decode if row["batch"] == batch]
        left.plot([row["mib"] for row in some], [row["of_copy"] for row in some], marker="o", label=f"batch {batch}")
    left.set(
        xscale="log", xlabel="keys and values, MiB", ylabel="part of the copy's bytes/s", title="decode, one layer"
    )
    left.axhline(0.85, color="grey", linestyle=":")
    for tokens in sorted({row["tokens"] for row in prefill}):
        some = [row for row in prefill if row["tokens"] == tokens]
        middle.plot(
            [row["local"] for row in some], [row["over_dense"] for row in some], marker="o", label=f"{tokens} tokens"
        )
    middle.set(
        xlabel="local heads, %", ylabel="times faster than dense SDPA", title="attention of a prompt", yscale="log"
    )
    names = [f"{row['policy']} {row['keep']} %\nbatch {row['batch']}\n{row['compile']}" for row in model]
    right.barh(names, [row["tokens"] for row in model])
    right.set(xlabel="tokens/s", title="8B-shaped model, decode")
    for panel, some in ((left, decode), (middle, prefill)):
        if some:
            panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
