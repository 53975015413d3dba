"""Learn blocks of trained gates: right ones are read as they are meant, every mistake is said at its place."""

from __future__ import annotations

import pytest

from kvcompile.dsl import Diagnostic, check, load, parse, resolve
from kvcompile.dsl.check_learn import check_learn
from kvcompile.dsl.context import Context
from kvcompile.dsl.format import format_text
from kvcompile.dsl.learn_gate import GateBlock, check_gate_block, trained_scores

UNIT = "unit block(size) from 4 with hi = max[i] raw.k, c = mean[i] raw.k"
SCORE = 'score live = softmax[u] learned("g.safetensors", q, hi, c)'
GATE, LOSS, FREEZE = "gate z = block_gate(width=32) per query_head", "loss attention_kl", "freeze weights"


def source(*block: str, unit: str = UNIT, score: str = SCORE, name: str = "live") -> str:
    """The block begins at line 6."""
    clauses = "".join(f"    {line}\n" for line in block)
    return (
        f"policy p(size=16, width=32):\n    {unit}\n    {score}\n    attend own block | top(4) blocks by live\n"
        f"    at chunk\nlearn {name} for p:\n{clauses}"
    )


def read(text: str, **params: object) -> GateBlock | None:
    context = Context.of(resolve(load(text), params))
    return check_gate_block(context, context.resolved.learns[0])


def found(text: str) -> list[Diagnostic]:
    context = Context.of(resolve(load(text)))
    check_learn(context)
    return list(context.findings.values())


def test_a_block_says_gate_and_width_and_its_score_the_rest() -> None:
    assert read(source(GATE, LOSS, FREEZE)) == GateBlock("live", True, False, 32, 16, 4, ("max", "mean"), True)
    assert read(source("gate z = query_gate()", LOSS, FREEZE), size=64) == GateBlock(
        "live", False, True, 128, 64, 4, ("max", "mean"), True
    )
    other = source("gate z = query_gate(width=width / 2) per head", LOSS, FREEZE, unit=UNIT.replace("raw.", ""))
    assert read(other) == GateBlock("live", False, True, 16, 16, 4, ("max", "mean"), False)


def test_right_blocks_have_no_findings_and_keep_their_text() -> None:
    text = source(GATE.replace("32", "width"), LOSS, FREEZE)
    assert [d for d in check(resolve(load(text))) if d.severity != "note"] == []
    assert format_text(text).count("loss attention_kl") == 1
    assert parse(format_text(text)) == parse(text)
    assert list(trained_scores(resolve(load(text)))) == ["live"]


# Clauses of the block, code, line, column, a part of message or hint.
FAULTS = [
    ((LOSS, FREEZE), "K801", 6, 1, "add `gate z = block_gate(width=128) per query_head`"),
    ((GATE, FREEZE), "K801", 6, 1, "add `loss attention_kl`"),
    ((GATE, GATE, LOSS, FREEZE), "K802", 8, 5, "second `gate`"),
    (("gate z = blok_gate(width=32)", LOSS, FREEZE), "K803", 7, 14, "did you mean `block_gate`"),
    (("gate z = hard_concrete(init=4.0)", LOSS, FREEZE), "K803", 7, 14, "block_gate, query_gate"),
    (("gate z = block_gate(32)", LOSS, FREEZE), "K804", 7, 25, "options of `block_gate` have names: width"),
    (("gate z = block_gate(wide=32)", LOSS, FREEZE), "K804", 7, 25, "no option `wide=`"),
    (("gate z = block_gate(width=7)", LOSS, FREEZE), "K804", 7, 25, "even number from 2 to 4096"),
    (("gate z = block_gate(width=0)", LOSS, FREEZE), "K804", 7, 25, "even number"),
    (("gate z = block_gate(width=8192)", LOSS, FREEZE), "K804", 7, 25, "even number"),
    (("gate z = block_gate(width=prompt)", LOSS, FREEZE), "K804", 7, 25, "even number"),
    (("gate z = block_gate() shared heads", LOSS, FREEZE), "K805", 7, 27, "`per head` or `per query_head`"),
    (("gate attn = block_gate()", LOSS, FREEZE), "K105", 7, 5, "word of the language"),
    (("gate size = block_gate()", LOSS, FREEZE), "K106", 7, 5, "parameter already"),
    ((GATE, "mix z * a + (1 - z) * b", LOSS, FREEZE), "K806", 8, 5, "mixes no head classes"),
    ((GATE, "loss next_token", FREEZE), "K807", 8, 5, "write `loss attention_kl`"),
    ((GATE, "loss attention_kl + mean(z)", FREEZE), "K807", 8, 5, "own attention alone"),
    ((GATE, LOSS), "K812", 6, 1, "freeze weights"),
    ((GATE, LOSS, "freeze model"), "K811", 9, 5, "`model` cannot be frozen"),
]  # fmt: skip


@pytest.mark.parametrize(("clauses", "code", "line", "column", "part"), FAULTS)
def test_mistakes_have_code_place_and_way_out(
    clauses: tuple[str, ...], code: str, line: int, column: int, part: str
) -> None:
    (one,) = [d for d in found(source(*clauses)) if d.code == code]
    assert (one.line, one.column) == (line, column)
    assert part in f"{one.message} {one.hint}"


@pytest.mark.parametrize(
    ("unit", "score", "part"),
    [
        (UNIT.replace("mean[i] raw.k", "mean[i] v"), SCORE, "`c` is no min, max or mean of k or raw.k"),
        (UNIT.replace("max[i]", "std[i]"), SCORE, "`hi` is no min, max or mean"),
        (UNIT.replace("mean[i] raw.k", "mean[i] k"), SCORE, "of several fields"),
        (UNIT.replace("block(size)", "block(size, stride=8)"), SCORE, "do not overlap"),
        (UNIT, f"{SCORE} + softmax[u] learned(\"h.safetensors\", q, c)", "more than one trained gate"),
        (UNIT, 'score live = learned("g.safetensors", q, k)', "`k` is no min, max or mean"),
        (UNIT, 'score live = learned("g.safetensors", k, c)', "reads `q` and landmarks"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_learned_are_refused(unit: str, score: str, part: str) -> None:
    (one,) = [d for d in found(source(GATE, LOSS, FREEZE, unit=unit, score=score)) if d.code == "K817"]
    assert part in f"{one.message} {one.hint}"


def test_a_name_that_is_neither_class_nor_trained_score_is_refused_with_the_nearest_that_is() -> None:
    (one,) = found(source(GATE, LOSS, FREEZE, name="life"))
    assert one.code == "K601" and "no head class and no trained score `life`" in one.message
    assert "did you mean `live`" in one.hint


def test_a_score_has_one_block() -> None:
    text = source(GATE, LOSS, FREEZE)
    twice = text + text[text.index("learn ") :]
    assert [d.code for d in found(twice)] == ["K813"]
