"""Bind: every head of every layer gets exactly one class."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.dsl import PolicyError, load, resolve
from kvcompile.dsl.lower import lower
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy
from kvcompile.passes.bind import Bind
from kvcompile.passes.context import Context
from kvcompile.passes.pipeline import probes_of

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


# ---------------------------------------------------------------- probes


def test_probes_choose_their_heads_and_their_union(tmp_path: Path) -> None:
    heads = 'heads far = probe("induction", top=9%) | probe("echo", top=17%, tokens=64)\n'
    induction = [[0.0, 0.0]] * 5 + [[0.5, 0.25]]
    echo = [[0.75, 0.0], [0.0, 0.75]] + [[0.0, 0.75]] * 4
    text = policy("far: keep all", "rest: keep recent(4)", heads=heads)
    found = names(text, probes={"induction": induction, "echo:64": echo})
    assert [[name == "far" for name in row] for row in found] == [[True, False], [False, True]] + [[False] * 2] * 3 + [
        [True, False]
    ]


def test_a_probe_that_was_not_run_guesses_and_says_so() -> None:
    done = compile_policy("razor", FACTS)
    assert [d.severity for d in done.diagnostics if d.code == "K617"] == ["warning"] * 2
    assert done.plan.class_size(0) == 1  # 14% of 12 heads, and 1% of them: none
    assert probes_of(done.resolved) == {"induction": ("induction", None), "echo": ("echo", None)}
    measured = {"induction": [[0.0, 1.0]] * 6, "echo": [[0.0, 1.0]] * 6}
    assert not [d for d in compile_policy("razor", FACTS, probes=measured).diagnostics if d.code == "K617"]


@pytest.mark.parametrize(("value", "code"), [([[0.0]] * 6, "K612"), ([[0.0, float("nan")]] * 6, "K611")])
def test_a_measurement_that_does_not_fit_is_refused(value: list[list[float]], code: str) -> None:
    with pytest.raises(PolicyError, match=code):
        compile_policy("razor", FACTS, probes={"induction": value})


# ---------------------------------------------------------------- links between layers


@pytest.mark.parametrize(
    ("lines", "code", "what"),
    [
        (["layers 2: pick t = top(4) by norm(k)", "keep t | recent(4)"], "K707", "layer 0 keeps the pick `t`"),
        (["layers 3: pick t = top(4) by norm(k)", "layers 2: keep t", "layers rest: keep all"], "K707", "layer 2"),
        (
            ["layers 0: pick t = top(4) by norm(k)", "at step", "keep t | recent(4)", "at chunk(8)"],
            "K707",
            "at `chunk`",
        ),
        (["layers 0: pick t = top(4) by norm(k)", "at step if now > 9", "keep t", "at step"], "K707", "at `step`"),
        (["pick t = o | top(4) by norm(k)", "pick o = t | top(4) by norm(v)", "keep t"], "K108", "t -> o -> t"),
        (["pick t = o | top(4) by norm(k)", "pick o = top(4) by norm(v)", "keep t"], "K902", "made of another pick"),
    ],
)
def test_picks_that_no_layer_fills_in_time(lines: list[str], code: str, what: str) -> None:
    with pytest.raises(PolicyError) as caught:
        names(policy(*lines))
    finding = caught.value.diagnostics[0]
    assert finding.code == code and what in finding.message
    assert finding.span.source.text and finding.hint


def test_a_module_whose_picks_are_made_of_each_other_is_refused() -> None:
    text = policy("pick t = o | top(4) by norm(k)", "pick o = t | top(4) by norm(v)", "keep t")
    module = lower(resolve(load(text))).module
    with pytest.raises(PolicyError, match=r"K108.*picks are made of each other: t <- o <- t"):
        Bind()(module, Context(FACTS))


def test_a_pick_is_filled_for_each_head_by_itself(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("1 0\n" * 3 + "0 1\n" * 3)
    heads = f'heads far = table("{table}")\n'
    lines = ("far: pick t = top(4) by norm(k)", "far: keep all", "rest: keep t")
    with pytest.raises(PolicyError, match="layer 0 keeps the pick `t` before any layer fills it for KV head 1"):
        names(policy(*lines, heads=heads))
    table.write_text("1 1\n" + "0 0\n" * 5)
    assert [row[0] for row in names(policy(*lines, heads=heads))] == ["far"] + ["rest"] * 5


def test_layers_that_share_a_decision_hold_the_same_heads(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("1 0\n0 1\n" + "1 0\n" * 4)
    text = policy("far: keep top(4) by norm(k) shared layers(2)", "rest: keep all",
                  heads=f'heads far = table("{table}")\n')  # fmt: skip
    with pytest.raises(PolicyError, match=r"K904.*layer 1 shares the decision of layer 0"):
        names(text)
    table.write_text("1 0\n1 0\n" + "0 1\n" * 4)
    assert names(text)[0] == ["far", "rest"]


@pytest.mark.parametrize(
    "keep",
    ["share b = 8 by cover(mean[h] norm(k))\n    far: keep top(b) by norm(k) shared heads",
     "far: pick t = top(4) by mean[h] norm(k)\n    far: keep all"],
)  # fmt: skip
def test_shares_and_picks_over_all_heads_want_whole_layers(keep: str, tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("0 1\n" * 6)
    with pytest.raises(PolicyError, match="is about all 2 KV heads of a layer"):
        names(policy(keep, "rest: keep recent(4)", heads=f'heads far = table("{table}")\n'))
