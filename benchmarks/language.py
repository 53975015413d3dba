"""How long a policy takes from text to IR, and the command line from its start, for every policy of the library.

    python benchmarks/language.py

Each policy is parsed, checked and lowered in one process that has done so before, so that nothing is built on first
use; the median of the rounds is given. The commands run in processes of their own, from start to exit. What a version
refuses to run is checked only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _common import machine, versions

from kvcompile.dsl import PolicyError, check, library, load, parse, resolve
from kvcompile.dsl.lower import lower

RESULTS = Path(__file__).parent / "results"
COMMANDS = (["check", "snapkv"], ["check", "d2o"], ["fmt", "--check", "dsl/library/snapkv.kvp"])


def milliseconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e3, result


def stages(name: str) -> dict[str, float]:
    """Milliseconds of one policy by stage; no `lower` where it is refused."""
    text = library.read(name)
    out: dict[str, float] = {}
    out["parse"], file = milliseconds(lambda: parse(text))
    out["resolve"], resolved = milliseconds(lambda: resolve(load(file)))
    out["check"], _ = milliseconds(lambda: check(resolved))
    with contextlib.suppress(PolicyError):
        out["lower"], _ = milliseconds(lambda: lower(resolved))
    return out


def measure(rounds: int) -> dict[str, object]:
    policies: dict[str, dict[str, float]] = {}
    for name in library.names():
        stages(name)
        found = [stages(name) for _ in range(rounds)]
        policies[name] = {stage: round(statistics.median(f[stage] for f in found), 2) for stage in found[0]}
    commands = {}
    for command in COMMANDS:
        took = [
            milliseconds(
                lambda c=command: subprocess.run(
                    [sys.executable, "-m", "kvcompile", *c], check=True, capture_output=True, cwd=RESULTS.parents[1]
                )
            )[0]
            for _ in range(rounds)
        ]
        commands[" ".join(command)] = round(statistics.median(took), 0)
    used = versions("lark", "xdsl", "typer")
    return {"machine": machine(), "versions": used, "rounds": rounds, "policies": policies, "commands": commands}


def page(found: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# From text to IR",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores, Python {found['machine']['python']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f"; medians of {found['rounds']} rounds, milliseconds. Made by `python benchmarks/language.py`.",
        "",
        "| command, from start to exit | ms |",
        "|---|---|",
        *(f"| `kvcompile {command}` | {ms:.0f} |" for command, ms in found["commands"].items()),
        "",
        "| policy | parse | resolve | check | lower | together |",
        "|---|---|---|---|---|---|",
    ]
    for name, took in sorted(found["policies"].items(), key=lambda item: -sum(item[1].values())):
        cells = [
            f"{took[stage]:.1f}" if stage in took else "refused" for stage in ("parse", "resolve", "check", "lower")
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {sum(took.values()):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9, help="how often each is measured")
    found = measure(options.parse_args().rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "language.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "language.md").write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
