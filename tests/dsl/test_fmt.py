"""Laying out: what comes out exactly, and that it changes neither meaning nor comments, and stays as it is."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.dsl import PolicyError, library, load, parse, resolve
from kvcompile.dsl.format import comments, format_text
from kvcompile.dsl.spacing import WIDTH
from tests.dsl.mutants import EXAMPLES

TEXTS = [library.read(name) for name in library.names()]

CASES = {
    "blanks": (
        "policy   p( a = 1,b=30% ) :\n  keep   sink( a )|top( 3*-b/4 )by s  per head\n"
        "  at    step , every( 4 )if len>a\n",
        "policy p(a=1, b=30%):\n    keep sink(a) | top(3 * -b / 4) by s per head\n    at step, every(4) if len > a\n",
    ),
    "signs": (
        "policy p():\n    score s = - k+mean[ q ]  -attn*( - 1 )- max( -1,- raw . k )\n",
        "policy p():\n    score s = -k + mean[q] -attn * (-1) - max(-1, -raw.k)\n",
    ),
    "prefixes": (
        "policy p():\n  layers  0 , 2 .. last - 1  :  keep  all\n  layers rest :\n     a:\n         keep all\n",
        "policy p():\n    layers 0, 2..last-1: keep all\n    layers rest:\n        a:\n            keep all\n",
    ),
    "updates": (
        "policy p():\n  on attend where s>1 :\n     a+=1,\n       b = raw . k\n",
        "policy p():\n    on attend where s > 1:\n        a += 1, b = raw.k\n",
    ),
    "items": (
        'heads   x=table( "f,  (g" , top = 30% )\nheads y=rest\npolicy p()  extends  q\nlearn x for p :\n  mix z\n',
        'heads x = table("f,  (g", top=30%)\nheads y = rest\n\npolicy p() extends q\n\nlearn x for p:\n    mix z\n',
    ),
    "a comment goes with its words": (
        "policy p():#a\n  #b\n  keep sink(4)   #  c \n      # d\n\n    | recent(8)#e\n  # f\n\n\n#g\n"
        "heads a=rest # h\n  # i\n\n\n",
        "policy p():  #a\n    #b\n    keep sink(4)  #  c\n        # d\n        | recent(8)  #e\n    # f\n\n#g\n"
        "heads a = rest  # h\n# i\n",
    ),
    "a text of comments": ("\n\n  # a\n\n\n# b\n\n", "# a\n\n# b\n"),
    "nothing": ("", ""),
    "blank lines": (
        "\n\npolicy p():\n\n    keep all\n\n\n    at step\npolicy q():\n    keep all",
        "policy p():\n    keep all\n\n    at step\n\npolicy q():\n    keep all\n",
    ),
    "line ends and marks of other systems": (
        "\ufeffpolicy p():\r\n\tkeep all # a\r\n".replace("\t", "    "),
        "policy p():\n    keep all  # a\n",
    ),
    "a text that is indented as a whole": ("   policy p():\n     keep all\n", "policy p():\n    keep all\n"),
    "a long union": (
        "policy p():\n    keep " + " | ".join(["recent(128)"] * 12) + "\n",
        "policy p():\n    keep "
        + " | ".join(["recent(128)"] * 7)
        + "\n        | "
        + " | ".join(["recent(128)"] * 5)
        + "\n",
    ),
    "losers each on their line": (
        "policy p():\n  keep sink(4) | recent(128) | top(2048) by accumulated per head else merge into nearest"
        " by cos(k) when sim >= 0.5 weight sim else drop\n",
        "policy p():\n    keep sink(4) | recent(128) | top(2048) by accumulated per head\n"
        "        else merge into nearest by cos(k) when sim >= 0.5 weight sim\n        else drop\n",
    ),
    "lines that need not be broken": (
        "policy p(\n        a=1,\n        b=2):\n    keep sink(a)\n        | recent(b)\n        else drop\n",
        "policy p(a=1, b=2):\n    keep sink(a) | recent(b) else drop\n",
    ),
}


@pytest.mark.parametrize(("before", "after"), CASES.values(), ids=CASES.keys())
def test_layout(before: str, after: str) -> None:
    assert format_text(before) == after
    assert format_text(after) == after


def test_long_lines_are_broken_where_they_may_be() -> None:
    name = "x" * 30
    formula = f"softmax[i] (({name} - {name}y) / ({name} + {name}y)) + max({name}, {name}y, {name}z)"
    text = f"policy p():\n    score s = {formula}\n"
    lines = format_text(text).splitlines()
    assert len(lines) > 2 and all(len(line) <= WIDTH for line in lines)
    assert all(line.startswith("        ") for line in lines[2:])
    header = f"policy p({', '.join(f'{name}{i}={i}' for i in range(6))}):\n    keep all\n"
    lines = format_text(header).splitlines()
    assert len(lines) > 2 and lines[1].startswith("        ") and lines[-1] == "    keep all"


def test_a_broken_text_is_refused_with_all_its_faults() -> None:
    with pytest.raises(PolicyError) as caught:
        format_text("policy p():\n    kep all\n    at $\n", "p.kvp")
    assert [str(d.span) for d in caught.value.diagnostics] == ["p.kvp:2:5", "p.kvp:3:8"]


@pytest.mark.parametrize("name", library.names())
def test_library_files_hold_on_to_the_layout(name: str) -> None:
    written = library.read(name)
    assert format_text(written) == written


def scattered(text: str, draw: random.Random) -> str:
    """The text in another layout: other depths, blanks, comments and continued lines, the same words."""
    out = []
    step = draw.choice((1, 2, 3, 8))
    for line in text.split("\n"):
        depth, rest = len(line) - len(line.lstrip()), line.lstrip()
        if draw.random() < 0.2:
            out.append(draw.choice(("", "   ", "  # own", "# far left", "                # far right")))
        if rest.startswith("#") or not rest:
            out.append(line)
            continue
        continued = depth % 4 or rest[0] == "|" or rest.startswith("else")
        code, mark, comment = rest.partition("#")
        for word in (r" \| ", r" else ", r" by ", r"(?<=[(,]) ?"):
            if draw.random() < 0.2 and not code.rstrip().endswith(":"):
                deep = " " * (depth // 4 * step + step + draw.randrange(1, 9))
                broken = draw.choice(("", "  # inside")) + "\n" + draw.choice(("", "# between\n", "\n"))
                code = re.sub(word, lambda m, b=broken, d=deep: f"{b}{d}{m.group().strip()} ", code, count=1)
        code = re.sub(r" (?=[|+*/=-])", lambda _: " " * draw.randrange(1, 4), code)
        deeper = step + 1 if continued else 0
        out.append(
            " " * (depth // 4 * step + deeper)
            + code.rstrip()
            + draw.choice(("", "", " # behind", "   "))
            + mark
            + comment
        )
    return draw.choice(("\n", "\r\n")).join(out) + draw.choice(("", "\n", "\n\n  # end", "\n# end\n"))


@settings(max_examples=300, deadline=None)
@given(text=st.sampled_from([*TEXTS, *EXAMPLES]), seed=st.integers(0, 2**32))
def test_layout_changes_nothing_but_blanks(text: str, seed: int) -> None:
    odd = scattered(text, random.Random(seed))
    try:
        before = parse(odd)
    except PolicyError as error:
        assert error.diagnostics[0].code in ("K001", "K004", "K006"), error  # the scattering went too far
        return
    once = format_text(odd)
    assert format_text(once) == once
    assert parse(once) == before
    written = [line.strip() for line in re.findall(r"#[^\r\n]*", re.sub(r'"[^"\n]*"', '""', odd))]
    assert comments(once) == written
    for policy in before.policies:
        assert resolve(load(once, policy.name)).digest == resolve(load(odd, policy.name)).digest


def test_the_scattering_leaves_most_texts_whole() -> None:
    whole = 0
    for seed in range(100):
        draw = random.Random(seed)
        try:
            parse(scattered(draw.choice(TEXTS), draw))
            whole += 1
        except PolicyError:
            pass
    assert whole > 60
