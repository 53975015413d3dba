"""Broken texts: the code, the place, the words, and that nothing but PolicyError comes out."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompile.dsl import PolicyError, check, library, load, parse, resolve

HEAD = "policy p(n=4):\n"

# text, code, line, column, a part of the message or hint
BROKEN = [
    ("polcy x():\n    keep all\n", "K001", 1, 1, "did you mean `policy`"),
    ("keep all\n", "K001", 1, 1, "outside a policy"),
    ("policy x()\n    keep all\n", "K006", 1, 10, "lacks its `:`"),
    ("policy x():\n", "K006", 1, 11, "no clauses follow"),
    ("policy x():", "K006", 1, 11, "no clauses follow"),
    (HEAD + "    keep all\npolicy q():\n", "K006", 3, 11, "no clauses follow"),
    (HEAD + "    # a comment is no clause\n", "K006", 1, 14, "no clauses follow"),
    (HEAD + "    keep all:\n        at step\n", "K001", 2, 13, "only headers and prefixes end in one"),
    (HEAD + "    kep all\n", "K001", 2, 5, "did you mean `keep`"),
    (HEAD + "    keep sink(n\n    at step\n", "K003", 2, 14, "never closed"),
    (HEAD + "    keep all\n    score s = mean[q attn\n", "K003", 3, 19, "never closed"),
    (HEAD + "    keep sink(n]\n    at step\n", "K003", 2, 16, "`)` is due"),
    (HEAD + "    keep sink(n))\n    at step\n", "K003", 2, 17, "closes nothing"),
    (HEAD + '    keep span("a)\n', "K003", 2, 15, "not closed on its line"),
    (HEAD + "    keep top(n) per head\n    at step\n", "K201", 2, 10, "by which score"),
    (HEAD + "    keep recent(2) | top(n - (1 + 1))\n    at step\n", "K201", 2, 22, "by which score"),
    (HEAD + "    keep sink(n)\n    else drop\n    at step\n", "K005", 3, 5, "indent it deeper"),
    (HEAD + "\tkeep all\n", "K004", 2, 1, "spaces"),
    (HEAD + "    keep all\n  at step\n", "K004", 3, 1, "no block above"),
    ("   policy p():\n     keep all\n policy q():\n  keep all\n", "K004", 3, 1, "no block above"),
    (HEAD + "    keep 'a'\n", "K002", 2, 10, "double quotes"),
    (HEAD + "    keep sink(4) \N{EN DASH} recent(4)\n", "K002", 2, 18, "U+2013 EN DASH"),
    (HEAD + "    keep sink(4) & recent(4)\n", "K002", 2, 18, "sets are joined by `|`"),
    (HEAD + "    keep sink(n)\r    at step\n", "K002", 2, 17, "line feed"),
    (HEAD + "    keep \x00all\n", "K002", 2, 10, "U+0000"),
    (HEAD + "    score s = \n    keep all\n", "K001", 2, 15, "ends too early"),
    (HEAD + "    score s = attn attn\n", "K001", 2, 20, "does not belong"),
    (HEAD + "    state acc\n", "K001", 2, 14, "expected `=`"),
    (HEAD + "    at\n", "K001", 2, 7, "prefill.end, step"),
    (HEAD + "    store all fp16\n", "K001", 2, 15, "store SET as FORMAT"),
    (HEAD + "    on attend acc += 1\n", "K001", 2, 15, "on attend [where CONDITION]:"),
    (HEAD + "    keep sink(a=1, 2)\n", "K014", 2, 20, "positional"),
    (HEAD + "    keep sink(a=1, a=2)\n", "K014", 2, 20, "twice"),
    ("policy p(n):\n    keep all\n", "K001", 1, 11, "NAME(param=default"),
    ("learn a for b:\n    keep all\n", "K001", 2, 5, "gate, mix, loss, freeze"),
    ("heads a = rest:\n    keep all\n", "K001", 1, 15, "`heads` line"),
    ("policyp():\n    keep all\n", "K001", 1, 1, "between `policy` and `p`"),
    ("headsegment = rest\n", "K001", 1, 1, "`headsegment` is no word"),
    (HEAD + "    keep sink(4) elsedrop\n", "K001", 2, 18, "between `else` and `drop`"),
    (HEAD + "    keep sink(4) elsewhere drop\n", "K001", 2, 18, "`elsewhere` is no word"),
    (HEAD + "    at step ifx > 3\n", "K001", 2, 13, "between `if` and `x`"),
    (HEAD + "    layers last2: keep all\n", "K001", 2, 12, "`last2` is no word"),
    (HEAD + "    score s = 4x\n", "K001", 2, 15, "`4 * x`"),
    ("| x\n", "K001", 1, 1, "a file holds"),
]


@pytest.mark.parametrize(("source", "code", "line", "column", "words"), BROKEN)
def test_broken_text(source: str, code: str, line: int, column: int, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(source, "p.kvp")
    found = caught.value.diagnostics[0]
    assert (found.code, found.line, found.column) == (code, line, column)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"p.kvp:{line}:{column}: error[{code}]: ")


def codes(source: str) -> list[tuple[str, int, int]]:
    with pytest.raises(PolicyError) as caught:
        parse(source, "p.kvp")
    assert all(d.hint and d.span.source.text == source for d in caught.value.diagnostics)
    return [(d.code, d.line, d.column) for d in caught.value.diagnostics]


def test_every_broken_clause_is_told() -> None:
    source = """\
policy p(n=4):
    kep all  # a comment stays out of it
    keep sink((n) | recent(4)
        | top(3) by s

    at prefill.end
    score s = norm k
    layers 0 1:
        keep all
    on attend:
        acc + 1
polic q():
    keep all
learn a for p:
    mix 1 -
policy r(a):
    keep $
"""
    assert codes(source) == [
        ("K001", 2, 5),
        ("K003", 3, 14),
        ("K001", 7, 20),
        ("K001", 8, 14),
        ("K001", 11, 13),
        ("K001", 12, 1),
        ("K001", 15, 12),
        ("K001", 16, 11),
    ]


def test_numbers_and_arguments_are_told_beside_words() -> None:
    source = HEAD + "    keep sink(a=1, 2)\n    at chunk(" + "9" * 40 + ")\n    keep %\n"
    assert codes(source) == [("K014", 2, 20), ("K007", 3, 14), ("K002", 4, 10)]


def test_a_block_of_one_broken_clause_causes_no_second_finding() -> None:
    assert codes(HEAD + "    x\npolicy q():\n    keep $\n")[0] == ("K001", 2, 5)
    assert codes(HEAD + "    on attend:\n        acc + 1\n    keep all\n") == [("K001", 3, 13)]
    assert codes(HEAD + "    layers 0:\n        keep [\n    keep all\n    at $\n") == [("K001", 3, 14), ("K002", 5, 8)]


def test_faults_of_the_layout_end_the_search() -> None:
    assert codes(HEAD + "\tkeep all\n\tkeep $\n") == [("K004", 2, 1)]


def test_there_is_an_end_to_findings() -> None:
    assert 10 < len(codes(HEAD + "    keep $\n" * 300)) <= 21


def test_rendering_is_exact() -> None:
    with pytest.raises(PolicyError) as caught:
        parse("policy p():\n    keep top(4) per head\n    at step\n", "p.kvp")
    assert str(caught.value) == (
        "p.kvp:2:10: error[K201]: `top` does not say by which score\n"
        " 2 |     keep top(4) per head\n"
        "   |          ^^^^^^\n"
        "hint: write `top(4) by SCORE per head`"
    )


@pytest.mark.parametrize(
    ("clauses", "hint"),
    [
        ("    keep sink(4) + recent(8)\n", "joined by `|`"),
        ("    keep sink(4), recent(8)\n", "joined by `|`"),
        ("    keep pos < 4 | recent(8)\n", "`where pos < 4`"),
        ("    keep recent(8)\n      at step\n", "indent `at` as far as `keep`"),
        ("    keep recent(8) else merge\n", "merge into nearest by cos(k)"),
        ("    keep recent(8)\n    at step if len = 9\n", "`==`"),
        ("    score s = pos ** 2\n", "x * x"),
        ("    keep top(10 MB) by norm(k)\n", "write `10MB`"),
        ("    keep recent(1.5k)\n", "in full"),
        ("    layers 1: far: keep all\n", "a line of its own, indented"),
        ("    keep top(8 - 4)\n", "`top(8 - 4) by SCORE per head`"),
        ("    keep top(8 -\n        4)\n", "`top(n) by SCORE per head`"),
    ],
)
def test_usual_mistakes_get_a_hint_of_their_own(clauses: str, hint: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(HEAD + clauses, "p.kvp")
    assert hint in caught.value.diagnostics[0].hint


def test_a_fault_inside_a_count_is_shown_where_it_is() -> None:
    assert codes(HEAD + "    keep top(4 tokens) by norm(k)\n    at step\n") == [("K001", 2, 16)]


def test_long_lines_are_clipped_around_the_caret() -> None:
    with pytest.raises(PolicyError) as caught:
        parse("policy p():\n    keep " + "sink(4) | " * 500 + "$\n", "p.kvp")
    lines = str(caught.value).split("\n")
    assert max(map(len, lines)) < 140
    assert lines[1][lines[2].index("^")] == "$"


def test_control_characters_never_reach_the_terminal() -> None:
    with pytest.raises(PolicyError) as caught:
        parse("policy p():\n    keep \x1b[31m all\n", "p\x1b.kvp")
    assert "\x1b" not in str(caught.value)


TEXTS = [library.read(name) for name in library.names()]
PIECES = [
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "\n",
    "    ",
    "\t",
    ",",
    "=",
    "%",
    "#",
    '"',
    "-",
    "..",
    "keep",
    "top(",
    "by",
    "else",
    "at",
    "9" * 30,
    "\r",
    "\x00",
    "\N{SNOWMAN}",
    "\ud800",
    "rest",
    "of",
    "if",
    "policy x():\n",
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A library text with a few cuts, doublings and insertions."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        to = min(len(text), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(["cut", "insert", "double"]))
        if kind == "cut":
            text = text[:at] + text[to:]
        elif kind == "insert":
            text = text[:at] + draw(st.sampled_from(PIECES)) + text[at:]
        else:
            text = text[:to] + text[at:to] + text[to:]
    return text


def test_work_grows_with_the_text_not_with_its_square() -> None:
    def calls(clauses: int) -> int:
        """Calls of functions, ours and others', that a text of so many clauses takes: the same on any machine."""
        text = "policy p():\n" + "    keep sink(4)\n    at step\n" * clauses
        count = 0

        def one_more(frame: object, event: str, arg: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(one_more)
        try:
            found = check(resolve(load(text)))
        finally:
            sys.setprofile(before)
        assert any(d.code == "K106" for d in found)
        return count

    calls(10)  # builds the grammar
    assert calls(1000) < 6 * calls(250)  # in proportion: 4 times; by the square: 16 times


def test_depth_at_the_limit_passes_every_stage() -> None:
    inner = "(" * 60 + "norm(k)" + " + 1)" * 60
    assert check(resolve(load(f"policy p():\n    score s = {inner}\n    keep top(4) by s\n    at step\n")))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_only_policy_errors_come_out(text: str) -> None:
    try:
        loaded = load(parse(text))
        for diagnostic in check(resolve(loaded)):
            assert str(diagnostic)
            assert 0 <= diagnostic.span.start <= diagnostic.span.end <= len(diagnostic.span.source.text)
    except PolicyError as error:
        assert str(error) and error.diagnostics
        assert all(d.severity == "error" and d.line >= 1 and d.column >= 1 for d in error.diagnostics)
