"""The results of the attention benchmark as a Markdown page and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HOW = """\
All contestants of a table ran in one process and took turns, each round another one first; milliseconds are medians
over the rounds of the median of a round's calls. Ratios are those of the medians, with those of each round beside them.
Before each call {sweep} MiB are written, so that keys and values come from memory, as they do in a model; what
compiles was compiled before, and results were compared before they were timed. Rows have {q}/{kv} heads, head_dim {d}.
kvcompile ran {kernels}; its time includes appending the step's entry. GB/s
counts the keys and values that must be read ("copy": read and written); "read" is a sum over the same bytes, the
ceiling of this machine in this run."""


def page(found: dict[str, Any], drawn: bool) -> str:
    """The Markdown page; `drawn`: whether the plot lies beside it."""
    setting, host = found["setting"], found["machine"]
    used = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "# Attention on a CPU",
        "",
        f"{host['cpu']}, {host['cores']} cores, {setting['threads']} threads, Python {host['python']}, {used}; "
        f"{setting['rounds']} rounds of {setting['calls']} calls, prefill {setting['slow_rounds']} rounds. "
        "Made by `python benchmarks/attention_cpu.py`.",
        "",
        HOW.format(sweep=setting["sweep"], q=32, kv=8, d=128, kernels=found["kernels"]),
    ]
    if drawn:
        lines += ["", "![Decode: bytes a second by length](attention_cpu.png)"]
    claims = [(section["title"], claim) for section in found["sections"] for claim in section["claims"]]
    if claims:
        lines += ["", "| comparison | ratio | each round | asked for | holds |", "|---|---|---|---|---|"]
        lines += [claim_line(title, claim) for title, claim in claims]
    for section in found["sections"]:
        lines += ["", f"## {section['title']}", "", *table(section["rows"], section["base"])]
    return "\n".join(lines) + "\n"


def claim_line(title: str, claim: dict[str, Any]) -> str:
    what = f"{title}: {claim['ours']} / {claim['theirs']}"
    if claim["ratio"] is None:
        return f"| {what} | not measured | | at most {claim['limit']:.2f} | unknown |"
    each = ", ".join(f"{ratio:.2f}" for ratio in claim["ratio_of_each_round"])
    holds = "yes" if claim["holds"] else "no"
    return f"| {what} | {claim['ratio']:.3f} | {each} | at most {claim['limit']:.2f} | {holds} |"


def table(rows: dict[str, Any], base: str) -> list[str]:
    """One line a contestant; times are also given as parts of the base's, where that ran."""
    whole = rows.get(base, {}).get("ms")
    speeds = any("gb_s" in row for row in rows.values())
    heads = ["contestant", "ms", *([f"of {base}"] if whole else []), *(["GB/s"] if speeds else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['ms']:.3f}" if "ms" in row else row["error"].replace("|", "/")]
        if whole:
            cells.append(f"{row['ms'] / whole:.2f}" if "ms" in row else "")
        if speeds:
            cells.append(f"{row['gb_s']:.1f}" if "gb_s" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(found: dict[str, Any], path: Path) -> bool:
    """Attained GB/s of decode by length, one panel a dtype; False where matplotlib or a second length is missing."""
    sections = [s for s in found["sections"] if s["kind"] == "decode"]
    dtypes = list(dict.fromkeys(s["dtype"] for s in sections))
    if len({s["entries"] for s in sections}) < 2:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4.4), squeeze=False, layout="constrained")
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        here = [s for s in sections if s["dtype"] == dtype]
        for name in dict.fromkeys(name for s in here for name in s["rows"]):
            points = [(s["entries"], s["rows"][name]["gb_s"]) for s in here if "gb_s" in s["rows"].get(name, {})]
            if points:
                style = {"linestyle": "--", "color": "grey"} if name in ("read", "copy") else {"marker": "o"}
                panel.plot(*zip(*points, strict=True), label=name, alpha=0.5 if name == "copy" else 1, **style)
        panel.set(xscale="log", title=f"decode, {dtype}", xlabel="entries a row", ylabel="GB/s", ylim=(0, None))
        ticks = sorted({s["entries"] for s in here})
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
