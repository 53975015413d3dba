"""The language page tells the truth: its examples, its fragments, its lists and its catalogue of codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcompile.dsl import Diagnostic, PolicyError, check, library, load, parse, resolve, words
from kvcompile.dsl.check_learn import LEARNABLE, check_block
from kvcompile.dsl.codes import CATALOGUE
from kvcompile.dsl.context import Context
from kvcompile.dsl.learn_block import Block
from kvcompile.dsl.lower import lower

PAGE = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = [body for language, body in FENCES if language == "kvp"]
MARK = re.compile(r"# (error|refused): (K\d{3})\n")

# What a fragment may name without declaring it.
GIVEN = {
    "page": "unit page(16) with centre = mean[i] k",
    "acc": "state acc = 0",
    "b": "share b = 64 by pyramid(20)",
    "s": "score s = norm(k)",
}


def findings(text: str) -> list[Diagnostic]:
    """What resolving and checking say about every policy of a text."""
    found: list[Diagnostic] = []
    for policy in parse(text).policies:
        try:
            found += check(resolve(load(text, policy.name)))
        except PolicyError as error:
            found += error.diagnostics
    return found


def errors(text: str) -> list[str]:
    return [diagnostic.code for diagnostic in findings(text) if diagnostic.severity == "error"]


def refusals(text: str) -> list[str]:
    """The codes that lowering gives, over every policy of a text."""
    found: list[str] = []
    for policy in parse(text).policies:
        try:
            lower(resolve(load(text, policy.name)))
        except PolicyError as error:
            found += [diagnostic.code for diagnostic in error.diagnostics]
    return found


def rows(header: str) -> list[list[str]]:
    """The cells of the table below a header line, escaped bars put right."""
    below = PAGE.split(f"\n{header}\n", 1)[1].splitlines()[1:]
    table = below[: next((i for i, line in enumerate(below) if not line.startswith("|")), len(below))]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def fragments(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def policy_around(fragment: str) -> str:
    """A whole policy with one clause or head class in it, and what that needs around it."""
    before, clauses = "", [fragment]
    if fragment.startswith("heads "):
        name = fragment.split()[1]
        before, clauses = f"{fragment}\n", [f"{name}: keep all", "rest: keep recent(4)"]
    elif not fragment.startswith(("keep", "attend", "layers")):
        clauses.insert(0, "keep top(b) by s" if fragment.startswith("share") else "keep recent(4)")
    if not fragment.startswith("at "):
        clauses.append("at prefill.end" if "peek" not in fragment else "at chunk(8)")
    for name, clause in GIVEN.items():
        declared = re.search(rf"\b(unit|state|share|score) {name}\b", fragment)
        if not declared and any(re.search(rf"\b{name}s?\b", line) for line in clauses):
            clauses.insert(0, clause)
    return f"{before}policy around():\n" + "".join(f"    {line}\n" for line in clauses)


RUNS = [f for row in rows("| runs | for example |") for f in fragments(row[1])]
REFUSED = [
    (f, row[2]) for row in rows("| parsed and checked, then refused | for example | code |") for f in fragments(row[1])
]


def test_there_is_something_to_test() -> None:
    assert len(EXAMPLES) >= 12 and len(RUNS) >= 20 and len(REFUSED) >= 25
    assert {match[1] for body in EXAMPLES if (match := MARK.match(body))} == {"error", "refused"}


@pytest.mark.parametrize("body", EXAMPLES, ids=[re.findall(r"policy (\w+)", body)[0] for body in EXAMPLES])
def test_example(body: str) -> None:
    mark = MARK.match(body)
    if mark is None:
        assert (errors(body), refusals(body)) == ([], [])
    elif mark[1] == "error":
        assert errors(body) == [mark[2]]
    else:
        assert (errors(body), set(refusals(body))) == ([], {mark[2]})


@pytest.mark.parametrize("fragment", RUNS)
def test_what_runs_lowers(fragment: str) -> None:
    text = policy_around(fragment)
    assert (errors(text), refusals(text)) == ([], []), text


@pytest.mark.parametrize(("fragment", "code"), REFUSED)
def test_what_is_refused_is_checked_first(fragment: str, code: str) -> None:
    text = policy_around(fragment)
    assert (errors(text), set(refusals(text))) == ([], {code}), text


def test_every_refusal_has_an_example() -> None:
    assert {code for _, code in REFUSED} == {code for code in CATALOGUE if code.startswith("K9")}


def test_library_policies_that_run() -> None:
    sentence = PAGE.split("Of the library these run:", 1)[1].split("`kvcompile check", 1)[0]
    lowered = {name for name in library.names() if not refusals(library.read(name))}
    assert set(fragments(sentence)) == lowered


def test_finding_is_shown_as_it_is_rendered() -> None:
    shown = [(FENCES[i - 1][1], body) for i, (language, body) in enumerate(FENCES) if language == "text"]
    assert len(shown) == 1
    source, rendered = shown[0]
    assert rendered.rstrip() == next(str(d) for d in findings(source) if d.severity == "error")


def test_catalogue_is_the_catalogue() -> None:
    listed = rows("| code | severity | title |")
    assert listed == [[code, entry.severity, entry.title] for code, entry in CATALOGUE.items()]


def test_codes_in_the_text_exist_with_the_severity_said() -> None:
    assert set(re.findall(r"\bK\d{3}\b", PAGE)) == set(CATALOGUE)
    said = re.findall(r"\((error|warning|note) (K\d{3})\)", PAGE)
    assert said and all(CATALOGUE[code].severity == severity for severity, code in said)


def learned(gate: str, loss: str) -> Block | None:
    """The example of a learn block with another gate and loss."""
    text = next(body for body in EXAMPLES if "learn far for learned" in body)
    text = re.sub("gate z = .*", f"gate z = {gate}", re.sub("loss .*", f"loss {loss}", text))
    context = Context.of(resolve(load(text)))
    return check_block(context, context.resolved.learns[0])


def test_gates_are_listed_with_the_values_of_what_is_not_written() -> None:
    listed = [fragments(row[0])[0] for row in rows("| gate | a KV head's number |")]
    assert [gate.split("(")[0] for gate in listed] == list(words.GATES)
    for gate in listed:
        name = gate.split("(")[0]
        loss = "next_token" if name == "sparsemax" else "next_token + mean(z)"
        assert set(re.findall(r"(\w+)=", gate)) == set(words.GATES[name])
        bare = learned("sparsemax(keep=30%)" if name == "sparsemax" else f"{name}()", loss)
        assert bare is not None and learned(gate, loss) == bare


def test_terms_of_a_loss_are_listed() -> None:
    listed = [fragments(row[0])[0] for row in rows("| term of the loss | becomes small where |")]
    found = learned("clamp01()", " + ".join(listed))
    assert found is not None and [term.kind for term in found.terms] == list(words.LOSSES)


@pytest.mark.parametrize(
    "known",
    [
        words.AXES, words.FIELDS, words.PORTIONS, words.REDUCTIONS, words.QUERY_SOURCES, words.FUNCTIONS, words.SHARES,
        words.REGIONS, words.UNIT_REGIONS, words.TRIGGERS, words.EVENTS, words.POSITIONS, words.FORMATS, words.GRAINS,
        words.TIERS, words.FOLDS, words.HEAD_SOURCES, [f"{kind} {what}" for kind in words.SCOPES for what in
        words.SCOPES[kind]], words.GATES, words.BLOCK_GATES, words.LOSSES, LEARNABLE,
    ],
)  # fmt: skip
def test_every_word_of_the_language_is_on_the_page(known: list[str]) -> None:
    code = " ".join(re.findall(r"```kvp\n.*?```|`[^`\n]+`", PAGE, re.DOTALL))
    assert [word for word in known if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", code)] == []
