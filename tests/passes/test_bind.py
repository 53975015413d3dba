"""Bind: every head of every layer gets exactly one class."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.dsl import PolicyError
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy

FACTS = ModelFacts(6, 8, 2, 64)


def names(policy: str, **options: object) -> list[list[str]]:
    plan = compile_policy(policy, FACTS, **options).plan  # type: ignore[arg-type]
    return [[plan.classes[c].name for c in row] for row in plan.class_of]


def policy(*lines: str, heads: str = "") -> str:
    return heads + "policy mine():\n" + "".join(f"    {line}\n" for line in lines) + "    at step\n"


def test_ranges_include_both_ends_and_override_what_has_no_prefix() -> None:
    found = names(policy("layers 0, 2..3, last: keep all", "keep recent(4)"))
    assert [row[0] for row in found] == ["layers 0, 2..3, last", "rest"] + ["layers 0, 2..3, last"] * 2 + [
        "rest",
        "layers 0, 2..3, last",
    ]


def test_layers_rest_are_those_that_no_other_range_names() -> None:
    found = names(policy("layers last-1..last: keep all", "layers rest: keep recent(4)"))
    assert [row[0] for row in found] == ["layers rest"] * 4 + ["layers last-1..last"] * 2


def test_a_class_without_heads_is_gone() -> None:
    plan = compile_policy(policy("layers 0..last: keep all", "keep recent(4)"), FACTS).plan
    assert [cls.name for cls in plan.classes] == ["layers 0..last"]
    assert plan.counts == ()


def test_nested_prefixes_win_over_single_ones(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("1 0\n" * 6)
    text = policy(
        "layers 0..1:",
        "    far: keep all",
        "    rest: keep recent(2)",
        "far: keep recent(8)",
        "keep recent(4)",
        heads=f'heads far = table("{table}")\n',
    )
    assert names(text) == [["layers 0..1 far", "layers 0..1 rest"]] * 2 + [["far", "all"]] * 4


def test_rest_and_same_and_unions_of_head_sources(tmp_path: Path) -> None:
    one, two = tmp_path / "one.tsv", tmp_path / "two.tsv"
    one.write_text("1 0\n0 0\n" * 3)
    two.write_text("0 0\n0 1\n" * 3)
    heads = (
        f'heads a = table("{one}") | table("{two}")\n'
        "heads b = a\nheads c = rest\n"
    )  # fmt: skip
    found = names(policy("b: keep all", "c: keep recent(4)", heads=heads))
    assert found == [["b", "c"], ["c", "b"]] * 3


def test_overlaps_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("1 0\n" * 6)
    heads = f'heads a = table("{table}")\nheads b = table("{table}")\n'
    with pytest.raises(PolicyError, match=r"K602.*`a` and `b` both name layer 0, KV head 0"):
        names(policy("a: keep all", "b: keep recent(4)", "rest: keep recent(2)", heads=heads))
    with pytest.raises(PolicyError, match=r"<text>:3:5: error\[K602\].*both name layer 2, KV head 0"):
        names(policy("layers 0..2: keep all", "layers 2..last: keep recent(4)"))


@pytest.mark.parametrize(("layers", "reason"), [("4..6", "no layer 6"), ("last-6", "no layer -1"), ("3..1", "none")])
def test_layers_that_the_model_lacks(layers: str, reason: str) -> None:
    with pytest.raises(PolicyError) as caught:
        names(policy(f"layers {layers}: keep all", "keep recent(4)"))
    assert reason in str(caught.value)
    assert caught.value.diagnostics[0].line == 2


@pytest.mark.parametrize(
    ("keep", "code", "what"),
    [
        ("keep top(4) by norm(k) shared heads", "K904", "`shared heads`"),
        ("keep recent(2) | top(4) by mean[h] norm(k)", "K905", "`[h]`"),
    ],
)
def test_a_class_of_some_heads_cannot_decide_for_its_whole_layer(
    keep: str, code: str, what: str, tmp_path: Path
) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("1 1\n" * 4 + "0 1\n" + "0 0\n")
    text = policy(f"far: {keep}", "rest: keep recent(4)", heads=f'heads far = table("{table}")\n')
    with pytest.raises(PolicyError) as caught:
        names(text)
    finding = caught.value.diagnostics[0]
    assert (finding.code, finding.line) == (code, 3)
    assert finding.span.text.startswith(keep.removeprefix("keep ").split(" | ")[-1][:6])
    assert f"{what} is about all 2 KV heads of a layer, and `far` has 1 of layer 4" in finding.message
    assert "per head" in finding.hint

    table.write_text("1 1\n" * 4 + "0 0\n" * 2)  # whole layers
    assert names(text)[0] == ["far", "far"]
