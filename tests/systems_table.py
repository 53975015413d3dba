"""The README's table of systems, from the library, its cookbook pages, the checker and what property tests showed.

`python -m tests.systems_table` prints it, `--write` puts it into the README. `make systems` runs the property tests
before, which write tests/systems.json; a digest there that is not the policy's own any more makes the table refuse.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from kvcompile.dsl import PolicyError, check, library, load, resolve
from kvcompile.dsl.check_cost import COSTS
from kvcompile.dsl.lower import lower

ROOT = Path(__file__).parents[1]
README, COOKBOOK, SHOWN = ROOT / "README.md", ROOT / "docs" / "cookbook", ROOT / "tests" / "systems.json"
BEGIN, END = "<!-- systems: written by `make systems` -->\n", "<!-- end of systems -->\n"
_ROW = re.compile(r"^\| `(\w+)` \| ([A-F, ]+) \| (.+) \|$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class System:
    """One library policy: the system's name, page and class from its cookbook page."""

    policy: str
    title: str
    page: str
    classes: str
    paper: str


def systems() -> dict[str, System]:
    """Every policy that a cookbook page tells of. ValueError for one that two pages tell of."""
    found: dict[str, System] = {}
    for path in sorted(COOKBOOK.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        for policy, classes, paper in _ROW.findall(text):
            if policy in found:
                raise ValueError(f"{policy} has two pages: {found[policy].page} and {path.name}")
            found[policy] = System(policy, title, path.name, classes.strip(), paper)
    return found


def lines(policy: str) -> int:
    """Lines of a library file that are neither blank nor comments alone."""
    return sum(1 for line in library.read(policy).splitlines() if line.strip() and not line.strip().startswith("#"))


def cost(policy: str) -> str:
    """The class of the dearest score, as the checker finds it."""
    notes = [d.message for d in check(resolve(load(policy))) if d.code == "K501"]
    kinds = [kind for kind, meaning in COSTS.items() if any(meaning in note for note in notes)]
    return kinds[-1] if kinds else "position"


def status(policy: str, shown: dict[str, dict[str, object]]) -> str:
    """What holds where, or the codes of what this version refuses. ValueError where the record is of another policy."""
    try:
        lower(resolve(load(policy)))
    except PolicyError as error:
        return "checked, not run: " + ", ".join(sorted({d.code for d in error.diagnostics}))
    entry = shown.get(policy, {})
    if entry and entry["digest"] != resolve(load(policy)).digest:
        raise ValueError(f"tests/systems.json is about another {policy}: run `make systems`")
    holds = entry.get("holds", {})
    assert isinstance(holds, dict)
    both = [shown for shown, backends in sorted(holds.items()) if {"cpu", "reference"} <= set(backends)]
    cpu = [shown for shown, backends in sorted(holds.items()) if backends == ["cpu"]]
    if not both + cpu:
        return "runs, no property recorded"
    return "runs: " + " ".join(sorted(both + cpu))


def table() -> str:
    """The table as Markdown. `heads` and `learn` blocks count as lines of their file."""
    shown = json.loads(SHOWN.read_text(encoding="utf-8"))
    out = ["| system | policy | lines | class | cost | status |", "|---|---|---|---|---|---|"]
    known = systems()
    missing = sorted(set(library.names()) - set(known))
    if missing:
        raise ValueError(f"no cookbook page for {', '.join(missing)}")
    for policy in sorted(known, key=lambda p: (status(p, shown).startswith("checked"), known[p].title.lower(), p)):
        system = known[policy]
        name = f"[{system.title}](docs/cookbook/{system.page})"
        out.append(
            f"| {name} | `{policy}` | {lines(policy)} | {system.classes} | {cost(policy)} | {status(policy, shown)} |"
        )
    return "\n".join(out) + "\n"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = before + BEGIN + table() + END + after
    if "--write" in sys.argv[1:]:
        README.write_text(new, encoding="utf-8")
    else:
        print(table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
