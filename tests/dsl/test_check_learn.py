"""Learn blocks: every mistake has its own code, place and way out, and right ones are read as they are meant."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kvcompile.dsl import Diagnostic, PolicyError, check, library, load, parse, resolve
from kvcompile.dsl.check_learn import LEARNABLE, check_block
from kvcompile.dsl.codes import CATALOGUE
from kvcompile.dsl.context import Context
from kvcompile.dsl.format import format_text
from kvcompile.dsl.learn_block import Block, Term
from kvcompile.dsl.learn_gate import check_gate_block, trained_scores
from kvcompile.dsl.printer import text as printed

HEADS = 'heads far = table("masks.tsv")\nheads near = rest\n'
SETS = "far: keep all\nnear: keep sink(4) | recent(n)\nat chunk(64), step"
GATE = "gate z = hard_concrete(init=4.0) per head"
MIX = "mix z * far + (1 - z) * near"
LOSS = "loss next_token + lagrange(mean(z), target=30%, ramp=80%)"
FREEZE = "freeze weights"


def source(block: str, sets: str = SETS, heads: str = HEADS, params: str = "n=16") -> str:
    """A file with one policy and one learn block; the block begins one line below the last clause of the policy."""
    clauses = "".join(f"    {line}\n" for line in sets.split("\n"))
    return f"{heads}policy p({params}):\n{clauses}learn far for p:\n" + "".join(f"    {x}\n" for x in block.split("\n"))


def block(gate: str = GATE, mix: str = MIX, loss: str = LOSS, freeze: str = FREEZE) -> str:
    return "\n".join(part for part in (gate, mix, loss, freeze) if part)


def found(text: str, name: str | None = None, **params: object) -> list[Diagnostic]:
    return [d for d in check(resolve(load(text, name), params)) if d.severity != "note"]


def read(text: str, name: str | None = None, **params: object) -> Block | None:
    context = Context.of(resolve(load(text, name), params))
    return check_block(context, context.resolved.learns[0])


# A learn block (its first line is line 8), code, line, column, a part of message or hint.
FAULTS = [
    (block(gate=""), "K801", 7, 1, "no `gate`"),
    (block(mix=""), "K801", 7, 1, "add `mix z * far + (1 - z) * near`"),
    (block(loss=""), "K801", 7, 1, "no `loss`"),
    (FREEZE, "K801", 7, 1, "no `gate` and no `mix` and no `loss`"),
    (f"{GATE}\n{block()}", "K802", 9, 5, "second `gate`"),
    (f"{block()}\n{MIX}", "K802", 12, 5, "second `mix`"),
    (f"{block()}\n{LOSS}", "K802", 12, 5, "second `loss`"),
    (f"{block()}\n{FREEZE}", "K802", 12, 5, "second `freeze`"),
    (block(gate="gate z = hard_concret(init=4.0)"), "K803", 8, 14, "did you mean `hard_concrete`"),
    (block(gate="gate z = relu(init=4.0)"), "K803", 8, 14, "clamp01, hard_concrete, sparsemax"),
    (block(gate="gate z = hard_concrete(4.0)"), "K804", 8, 28, "init, low, high, temperature"),
    (block(gate="gate z = hard_concrete(start=4.0)"), "K804", 8, 28, "no option `start=`"),
    (block(gate="gate z = hard_concrete(temprature=1)"), "K804", 8, 28, "did you mean `temperature`"),
    (block(gate="gate z = clamp01(low=0)"), "K804", 8, 22, "options of `clamp01`: init"),
    (block(gate='gate z = hard_concrete(init="4")'), "K804", 8, 28, "needs a number"),
    (block(gate="gate z = hard_concrete(init=prompt)"), "K804", 8, 28, "needs a number"),
    (block(gate="gate z = hard_concrete(low=0)"), "K804", 8, 28, "below 0"),
    (block(gate="gate z = hard_concrete(high=1)"), "K804", 8, 28, "above 1"),
    (block(gate="gate z = hard_concrete(temperature=0)"), "K804", 8, 28, "above 0, not 0"),
    (block(gate="gate z = clamp01(init=1.5)"), "K804", 8, 22, "from 0 to 1, not 1.5"),
    (block(gate="gate z = sparsemax(temperature=1)", loss="loss next_token"), "K804", 8, 14, "sparsemax(keep=30%)"),
    (block(gate="gate z = sparsemax(keep=30)", loss="loss next_token"), "K804", 8, 24, "0% and 100%, both excluded"),
    (block(gate="gate z = sparsemax(keep=0%)", loss="loss next_token"), "K804", 8, 24, "0% and 100%, both excluded"),
    (block(gate="gate z = sparsemax(keep=1 / 3)", loss="loss next_token"), "K804", 8, 24, "needs a number"),
    (block(gate="gate z = sparsemax(keep=30%, ramp=0)", loss="loss next_token"), "K804", 8, 34, "part of the steps"),
    (block(gate="gate z = clamp01(init=1) per query_head"), "K805", 8, 30, "write `per head`"),
    (block(gate="gate z = clamp01(init=1) shared layers(2)"), "K805", 8, 30, "`shared layers(2)`"),
    (block(gate="gate far = clamp01(init=1)"), "K106", 8, 5, "head class already"),
    (block(gate="gate n = clamp01(init=1)"), "K106", 8, 5, "parameter already"),
    (block(gate="gate age = clamp01(init=1)"), "K105", 8, 5, "`age_`"),
    (block(gate="gate next_token = clamp01(init=1)"), "K105", 8, 5, "word of the language"),
    (block(mix="mix z * far"), "K806", 9, 5, "write `mix z * far + (1 - z) * near`"),
    (block(mix="mix z * far - (1 - z) * near"), "K806", 9, 5, "weighs two head classes"),
    (block(mix="mix z * far + z * near"), "K806", 9, 5, "by `1 - z`"),
    (block(mix="mix y * far + (1 - y) * near"), "K806", 9, 5, "by `z`"),
    (block(mix="mix z * far + (2 - z) * near"), "K806", 9, 5, "by `1 - z`"),
    (block(mix="mix z * far + (1 - z) * near + z"), "K806", 9, 5, "weighs two head classes"),
    (block(mix="mix z * far + near - z * near"), "K806", 9, 5, "weighs two head classes"),
    (block(mix="mix z * k * far + (1 - z) * near"), "K806", 9, 5, "weighs two head classes"),
    (block(mix="mix z * far + (1 - z) * nera"), "K806", 9, 29, "did you mean `near`"),
    (block(mix="mix z * far + (1 - z) * rest"), "K806", 9, 29, "no class `rest` has a `keep`"),
    (block(mix="mix z * far + (1 - z) * far"), "K806", 9, 29, "mixed with itself"),
    (block(mix="mix z * near + (1 - z) * far"), "K806", 9, 13, "must mean `far`"),
    (block(loss="loss next_tokn + mean(z)"), "K807", 10, 10, "did you mean `next_token`"),
    (block(loss="loss crossentropy + mean(z)"), "K807", 10, 10, "lagrange(mean(z), target=30%, ramp=80%)"),
    (block(loss="loss next_token()"), "K807", 10, 10, "no term of a loss"),
    (block(loss="loss hidden_mse(prompt) + mean(z)"), "K807", 10, 10, "hidden_mse(answer_tokens)"),
    (block(loss="loss hidden_mse() + mean(z)"), "K807", 10, 10, "hidden_mse(answer_tokens)"),
    (block(loss="loss next_token + mean(y)"), "K807", 10, 23, "write `mean(z)`"),
    (block(loss="loss next_token + mean"), "K807", 10, 23, "0.05 * mean(z)"),
    (block(loss="loss next_token - mean(z)"), "K807", 10, 10, "write `+`"),
    (block(loss="loss next_token + -1 * mean(z)"), "K807", 10, 23, "above 0, not -1"),
    (block(loss="loss next_token + 0 * mean(z)"), "K807", 10, 23, "above 0, not 0"),
    (block(loss="loss next_token + 1e10 * 1e10 * mean(z)"), "K807", 10, 23, "not 1e+20"),
    (block(loss="loss next_token * mean(z)"), "K807", 10, 10, "a number before it"),
    (block(loss="loss next_token / mean(z)"), "K807", 10, 10, "a number before it"),
    (block(loss="loss next_token / 0 + mean(z)"), "K807", 10, 10, "a number before it"),
    (block(loss="loss next_token + 3 + mean(z)"), "K807", 10, 23, "a number before it"),
    (block(loss="loss next_token + mean(z) + mean(z)"), "K807", 10, 33, "second term"),
    (block(loss="loss 0.05 * mean(z)"), "K807", 10, 5, "what the model says"),
    (block(loss="loss next_token + lagrange(z, target=30%)"), "K807", 10, 23, "`mean(z)`"),
    (block(loss="loss next_token + lagrange(mean(y), target=30%)"), "K807", 10, 23, "`mean(z)`"),
    (block(loss="loss next_token + lagrange(mean(z), tarket=30%)"), "K807", 10, 41, "did you mean `target`"),
    (block(loss="loss next_token + lagrange(mean(z))"), "K808", 10, 23, "which part of the heads"),
    (block(loss="loss next_token + lagrange(mean(z), target=0%)"), "K808", 10, 41, "not 0%"),
    (block(loss="loss next_token + lagrange(mean(z), target=1)"), "K808", 10, 41, "not 100%"),
    (block(loss="loss next_token + lagrange(mean(z), target=130%)"), "K808", 10, 41, "not 130%"),
    (block(loss="loss next_token + lagrange(mean(z), target=z)"), "K808", 10, 41, "such as `30%`"),
    (block(loss="loss next_token + lagrange(mean(z), target=30%, ramp=2)"), "K808", 10, 53, "100%, not 200%"),
    (block(loss="loss next_token"), "K809", 10, 5, "every head stays open"),
    (block(gate="gate z = clamp01(init=1)", loss="loss next_token"), "K809", 10, 5, "`0.05 * mean(z)`"),
    (block(gate="gate z = sparsemax(keep=30%)"), "K810", 10, 23, "exact already, so `lagrange`"),
    (block(gate="gate z = sparsemax(keep=30%)", loss="loss next_token + mean(z)"), "K810", 10, 23, "so `mean`"),
    (block(freeze="freeze weights, embeddings"), "K811", 11, 5, "`embeddings` cannot be frozen"),
    (block(freeze="freeze weight"), "K811", 11, 5, "did you mean `weights`"),
    (block(freeze=""), "K812", 7, 1, "not supported yet"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "code", "line", "column", "words"), FAULTS)
def test_each_mistake_is_said_at_its_place(lines: str, code: str, line: int, column: int, words: str) -> None:
    (fault,) = found(source(lines))
    assert (fault.code, fault.severity, fault.line, fault.column) == (code, CATALOGUE[code].severity, line, column)
    assert words in f"{fault.message} {fault.hint}" and fault.hint


def test_several_mistakes_are_told_at_once() -> None:
    lines = block(gate="gate z = clamp01(init=2) per unit", mix="mix z * far", loss="loss nothing", freeze="")
    assert [d.code for d in found(source(lines))] == ["K812", "K804", "K805", "K806", "K807"]


# Sets of the policy, code's place, a part of the message.
SETS_REFUSED = [
    ("near: keep recent(4) | top(8) by norm(k)", "top(8) by norm(k)", "by what entries hold"),
    ("near: keep recent(4) | where norm(k) > 3", "where norm(k) > 3", "by what entries hold"),
    ("near: keep recent(4) | frozen", "frozen", "more than positions"),
    ("near: keep recent(4) | prompt", "prompt", "more than positions"),
    ("near: keep recent(4) | generated", "generated", "more than positions"),
    ("near: keep recent(4) | newest page\nunit page(8)", "newest page", "more than positions"),
    ("near: keep recent(10% of prompt)", "10% of prompt", "follows from `prompt`"),
    ("near: keep recent(len / 2)", "len / 2", "follows from `len`"),
    ("share b = 64 by pyramid(20)\nnear: keep recent(b)", "b", "follows from `b`"),
    ("near: keep recent(4) else fold mean", "fold mean", "leaves something"),
    ("near: keep recent(4)\npositions compact", "positions compact", "places in the row"),
    ("near: keep recent(4)\npick t = top(4) by norm(k)", "pick t = top(4) by norm(k)", "a pick is chosen"),
    ("layers 0: keep all\nnear: keep recent(4)", "layers 0", "all layers"),
    ("near: keep recent(4)\nkeep recent(4)", "keep recent(4)", "is of none"),
    ("near: keep recent(4)\nrest: keep recent(4)", "rest", "`rest` is a third"),
    ("near: keep all", "keep all", "keep the same"),
]


@pytest.mark.parametrize(("clauses", "place", "words"), SETS_REFUSED)
def test_a_set_that_does_not_follow_from_positions_cannot_be_learned(clauses: str, place: str, words: str) -> None:
    sets = f"far: keep all\n{clauses}\nat chunk(64), step"
    faults = [d for d in found(source(block(), sets)) if d.code == "K814"]
    assert [d.span.text for d in faults] == [place]
    assert words in faults[0].message and faults[0].hint


def test_a_second_keep_and_a_set_that_nothing_computes_cannot_be_learned() -> None:
    twice = "far: keep all\nnear: keep recent(9)\nat chunk\nnear: keep recent(4)\nat step"
    assert ["second `keep`" in d.message for d in found(source(block(), twice)) if d.code == "K814"] == [True]
    never = "far: keep all\nnear: keep recent(9)"
    assert ["never drops" in d.message for d in found(source(block(), never)) if d.code == "K814"] == [True]
    alone = "near: keep recent(9)\nfar: attend all\nrest: keep all\nat step"
    assert ["no `keep` of its own" in d.message for d in found(source(block(), alone)) if d.code == "K814"] == [True]


def test_the_same_sets_run_where_no_block_asks_to_learn_them() -> None:
    sets = "far: keep all\nnear: keep recent(4) | top(8) by norm(k)\nat chunk(64), step"
    text = source(block(), sets).split("learn ")[0]
    assert [d for d in found(text) if d.severity == "error"] == []


def test_every_region_that_can_be_learned_is_taken() -> None:
    shapes = {"sink": "sink(4)", "recent": "recent(max(4, now / 5))", "stride": "stride(8)", "random": "random(8, 1)"}
    assert set(shapes) | {"all"} == set(LEARNABLE)
    for region in shapes.values():
        assert read(source(block(), f"far: keep all\nnear: keep {region}\nat step")) is not None
    assert read(source(block(), "far: keep recent(64)\nnear: keep recent(8) else drop\nat step")) is not None


def test_a_block_is_read_as_it_is_meant() -> None:
    gate = (
        ("init", Fraction(4)),
        ("low", Fraction(-1, 10)),
        ("high", Fraction(11, 10)),
        ("temperature", Fraction(2, 3)),
    )
    terms = (Term("next_token", Fraction(1)), Term("lagrange", Fraction(1), Fraction(3, 10), Fraction(4, 5)))
    assert read(source(block())) == Block("near", "hard_concrete", gate, terms, Fraction(3, 10))


@pytest.mark.parametrize(
    "mix",
    [
        "(1 - z) * near + z * far",
        "far * z + near * (1 - z)",
        "z * far + near * (1 - z)",
        "(near * (1 - z)) + (z * far)",
    ],
)
def test_products_and_sum_commute(mix: str) -> None:
    assert read(source(block(mix=f"mix {mix}"))) == read(source(block()))


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        ("0.05 * mean(z) + hidden_mse(answer_tokens)", {"mean": "1/20", "hidden_mse": "1"}),
        ("next_token * 2 + mean(z) / 20", {"next_token": "2", "mean": "1/20"}),
        ("2 * 3 * next_token / 4 + (mean(z) + hidden_mse(answer_tokens))", {"next_token": "3/2", "mean": "1",
                                                                           "hidden_mse": "1"}),
        ("next_token + 10 * lagrange(mean(z), target=0.25)", {"next_token": "1", "lagrange": "10"}),
    ],
)  # fmt: skip
def test_factors_of_terms(loss: str, weights: dict[str, str]) -> None:
    read_ = read(source(block(loss=f"loss {loss}")))
    assert read_ is not None and {t.kind: str(t.weight) for t in read_.terms} == weights
    lagrange = [t for t in read_.terms if t.kind == "lagrange"]
    assert [(t.target, t.ramp) for t in lagrange] == [(Fraction(1, 4), Fraction(0))] * len(lagrange)


def test_other_gates_and_the_class_called_rest() -> None:
    exact = read(source(block(gate="gate z = sparsemax(keep=30%, temperature=0.5)", loss="loss next_token")))
    assert exact is not None and exact.keep == Fraction(3, 10)
    assert dict(exact.options) == {"init": 0, "temperature": Fraction(1, 2), "ramp": 1}
    clamped = read(source(block(gate="gate z = clamp01()", loss="loss hidden_mse(answer_tokens) + 0.05 * mean(z)")))
    assert clamped is not None and (clamped.options, clamped.keep) == ((("init", 1),), None)
    sets = "far: keep all\nrest: keep recent(8)\nat step"
    named_rest = read(source(block(mix="mix z * far + (1 - z) * rest"), sets))
    assert named_rest is not None and named_rest.others == "rest"


def test_parameters_of_the_policy_stand_in_gate_and_loss() -> None:
    text = source(block(loss="loss next_token + lagrange(mean(z), target=part)"), params="n=16, part=30%")
    assert found(text) == []
    asked = read(text, part=0.1)
    assert asked is not None and asked.keep == Fraction(1, 10)
    assert [d.code for d in found(text, part=0)] == ["K808"]
    # In a mix words are classes: a parameter may be called like one.
    assert found(source(block(), SETS.replace("(n)", "(near)"), params="near=8")) == []


def test_two_blocks_for_one_class() -> None:
    text = source(block()) + "learn far for p:\n" + "".join(f"    {line}\n" for line in block().split("\n"))
    assert [(d.code, d.line, d.span.text) for d in found(text)] == [("K813", 12, "far")]


def test_blocks_for_unknown_classes_and_policies() -> None:
    unknown = source(block()).replace("learn far", "learn fra")
    assert [(d.code, d.line, d.hint) for d in found(unknown)] == [("K601", 7, "did you mean `far`?")]
    with pytest.raises(PolicyError, match=r"K013.*no policy `prulong` in this text"):
        load(source(block()).replace("for p:", "for prulong:"))


def test_what_is_learned_needs_a_table_to_go_to() -> None:
    heads = 'heads far = probe("echo", top=1%)\nheads near = rest\n'
    assert [(d.code, d.severity) for d in found(source(block(), heads=heads))] == [("K816", "warning")]


CHILD = "{heads}policy mine(window=64) extends prulong{body}"


def test_a_child_takes_over_the_blocks_that_it_does_not_write() -> None:
    child = resolve(load(CHILD.format(heads="", body="\n")))
    assert [(lrn.heads.id, lrn.policy.id) for lrn in child.learns] == [("retrieval", "prulong")]
    assert [lrn.policy.id for lrn in resolve(load("duo")).learns] == ["duo"]
    grandchild = resolve(load("policy a() extends duo\npolicy b() extends a\n", "b"))
    assert [lrn.policy.id for lrn in grandchild.learns] == ["duo"]


def test_an_inherited_block_is_no_reason_to_refuse_a_child_that_changes_the_sets() -> None:
    text = CHILD.format(heads="", body=":\n    local: keep recent(8) | top(8) by norm(k)\n")
    assert [d for d in found(text) if d.severity == "error"] == []
    assert read(text) is None


def test_blocks_of_the_library_are_right_and_print_as_they_read() -> None:
    having = [name for name in library.names() if parse(library.read(name)).learns]
    assert having == ["duo", "prulong", "seerattention_gated", "seerattention_r_gated"]
    for name in having:
        context = Context.of(resolve(load(name)))
        trained = trained_scores(context.resolved)
        assert (check_gate_block if trained else check_block)(context, context.resolved.learns[0]) is not None
        text = library.read(name)
        assert format_text(text) == text
        assert parse(printed(parse(text))) == parse(text)
