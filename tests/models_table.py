"""The tables of docs/models.md, from the definitions of the families, what property tests showed, and the refusals.

`python -m tests.models_table` prints them, `--write` puts them into the page. `make models` runs the property tests
before, which write tests/models.json; a digest there that is not the family's own any more makes the table refuse.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.facts import model_facts
from kvcompile.passes.families import WAY_OUT
from tests.families import FAMILIES, REFUSED, SIZES, config_of, digest_of

ROOT = Path(__file__).parents[1]
PAGE, SHOWN = ROOT / "docs" / "models.md", ROOT / "tests" / "models.json"
SECTIONS = ("supported", "refused")
POLICIES = ("adakv", "h2o", "keep_all", "prulong", "snapkv")
# Per property: on which backends, for which policies it has to have passed.
WHOLE = {
    "P1": (("cpu", "reference"), POLICIES),
    "P2": (("cpu", "reference"), POLICIES),
    "P5": (("cpu",), POLICIES),
    "P8": (("cpu", "reference"), ("keep_all",)),
}


def status(name: str, shown: dict[str, Any]) -> str:
    """The properties that hold for a family as `WHOLE` says. ValueError where the record is of another model."""
    entry = shown.get(name)
    if entry is None:
        return "runs, no property recorded"
    if entry["digest"] != digest_of(name):
        raise ValueError(f"tests/models.json is about another {name}: run `make models`")
    holds = entry["holds"]
    return " ".join(
        key
        for key, (backends, policies) in WHOLE.items()
        if all(set(policies) <= set(holds.get(key, {}).get(backend, ())) for backend in backends)
    )


def supported() -> str:
    shown = json.loads(SHOWN.read_text(encoding="utf-8"))
    out = ["| family | `model_type` | what its attention has | `positions compact` | holds |", "|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        heads = family.options.get("num_key_value_heads", SIZES["num_key_value_heads"])
        features = ["grouped heads" if heads else "a KV head for each query head", *family.features]
        place = "refused" if family.compact else "yes"
        out.append(f"| {family.title} | `{family.kind}` | {', '.join(features)} | {place} | {status(name, shown)} |")
    return "\n".join(out) + "\n"


def refused() -> str:
    out = ["| family | `model_type` | why |", "|---|---|---|"]
    for title, kind, options, _ in REFUSED.values():
        out.append(f"| {title} | `{kind}` | {_reason(config_of(kind, **options))} |")
    return "\n".join(out) + "\n"


def _reason(config: Any) -> str:
    """What the refusal says, without the family's name and the way out."""
    try:
        model_facts(config)
    except KvCompileError as error:
        return str(error).removesuffix(f". {WAY_OUT}").split(": ", 1)[1]
    raise ValueError(f"{type(config).__name__} is not refused")


def page(text: str) -> str:
    """The page with its tables as they are now."""
    for section, table in zip(SECTIONS, (supported(), refused()), strict=True):
        pattern = re.compile(rf"(<!-- {section}: [^\n]*-->\n).*?(<!-- end of {section} -->\n)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"docs/models.md has no place for the table of what is {section}")
        text = pattern.sub(lambda found, table=table: found.group(1) + table + found.group(2), text)
    return text


def main() -> int:
    new = page(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(new, encoding="utf-8")
    else:
        print(new, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
