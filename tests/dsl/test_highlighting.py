"""The TextMate grammar under editors/ colours what the language means: every library file, every word of the language.

The grammar is flat (`match` patterns only), so a highlighter is a loop: at each place the pattern that matches earliest
wins, the first one on ties. That is what an editor does with it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcompile.dsl import library, words

GRAMMAR = json.loads(
    (Path(__file__).parents[2] / "editors/vscode/syntaxes/kvp.tmLanguage.json").read_text(encoding="utf-8")
)
WORDS = set(re.findall(r'"([a-z]+)"', (Path(library.__file__).parents[1] / "grammar.lark").read_text(encoding="utf-8")))
PATTERNS = [(re.compile(p["match"], re.MULTILINE), p) for p in GRAMMAR["patterns"]]


def highlight(line: str) -> list[tuple[str, str]]:
    """(text, scope) of a line's tokens; white space has none."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(line):
        hits = [(m.start(), i, m, p) for i, (regex, p) in enumerate(PATTERNS) if (m := regex.search(line, at))]
        if not hits:
            assert not line[at:].strip(), f"no colour for {line[at:]!r}"
            break
        start, _, match, pattern = min(hits, key=lambda hit: hit[:2])
        assert not line[at:start].strip(), f"no colour for {line[at:start]!r}"
        if "name" in pattern:
            found.append((match.group(), pattern["name"]))
        else:
            found += [(match.group(int(n)), c["name"]) for n, c in pattern["captures"].items()]
        at = match.end()
    return found


def scopes(text: str) -> dict[str, set[str]]:
    """What each word of a text is coloured as."""
    out: dict[str, set[str]] = {}
    for line in text.splitlines():
        for word, scope in highlight(line):
            out.setdefault(word, set()).add(scope)
    return out


@pytest.mark.parametrize("name", library.names())
def test_every_token_of_the_library_has_a_colour(name: str) -> None:
    text = library.read(name)
    for line in text.splitlines():
        coloured = "".join(word for word, _ in highlight(line))
        assert coloured.replace(" ", "") == re.sub(r"\s", "", line), line
    for line in text.splitlines():
        code = re.sub(r"\"[^\"]*\"", "", line.split("#")[0])
        for word, scope in highlight(code):
            assert not scope.startswith(("comment", "string")), (word, line)


def test_declarations_comments_and_numbers() -> None:
    found = scopes("policy mine(n=30%, m=32k) extends snapkv:   # by h2o\n    keep frozen | top(n) by acc per head\n")
    assert found["policy"] == found["extends"] == found["keep"] == {"keyword.control.kvp"}
    assert found["mine"] == found["snapkv"] == {"entity.name.kvp"}
    assert found["30%"] == found["32k"] == {"constant.numeric.kvp"}
    assert found["# by h2o"] == {"comment.line.number-sign.kvp"}
    assert found["frozen"] == {"support.constant.region.kvp"}
    assert found["top"] == {"keyword.other.selection.kvp"}
    assert found["per"] == {"storage.modifier.scope.kvp"} and found["head"] == {"storage.type.kvp"}


def coloured_as(word: str, after: str = "") -> str:
    return highlight(f"{word}{after}")[0][1]


def test_the_words_of_the_language_are_those_of_the_grammar() -> None:
    """A word that the language gains must gain a colour, or this fails."""
    assert len(WORDS) > 40
    for word in sorted(WORDS - {"all", "rest", "last"}):
        named = word in ("policy", "heads", "learn", "extends", "for", "score", "share", "unit", "pick", "gate")
        shown = {"on": " attend", **dict.fromkeys(words.SCOPES, " heads")}.get(word, " name" if named else " ")
        assert coloured_as(word, shown).startswith(("keyword", "storage.modifier")), word
    for region in sorted({*words.REGIONS, *words.UNIT_REGIONS} - {"prompt"}):
        assert coloured_as(region, " ") == "support.constant.region.kvp", region
    for field in sorted(words.FIELDS):
        assert coloured_as(field, " ") == "variable.language.kvp", field
    for function in sorted(words.FUNCTIONS):
        assert coloured_as(function, "(x)") == "support.function.kvp", function
    for reduction in sorted(words.REDUCTIONS):
        assert coloured_as(reduction, "[q] attn") == "support.function.reduction.kvp", reduction
    for scope in sorted(words.SCOPES):
        assert coloured_as(scope, " heads") == "storage.modifier.scope.kvp", scope


def test_the_extension_points_at_its_files() -> None:
    folder = Path(__file__).parents[2] / "editors/vscode"
    package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    (language,) = package["contributes"]["languages"]
    (grammar,) = package["contributes"]["grammars"]
    assert (
        json.loads((folder / language["configuration"]).read_text(encoding="utf-8"))["comments"]["lineComment"] == "#"
    )
    assert (folder / grammar["path"]).exists() and grammar["scopeName"] == GRAMMAR["scopeName"]
    assert language["extensions"] == [".kvp"]
