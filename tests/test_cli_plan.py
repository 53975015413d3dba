"""A plan as text: every fact that the run time decides by is on it."""

from __future__ import annotations

from fractions import Fraction

from kvcompile.cli_plan import formula, plan_lines
from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    Region,
    Selection,
    Share,
    StatePlan,
    Trigger,
    UnitPlan,
)

ATTN = Expr("evidence", value=("attn", QuerySource("last", 64)), axes="gqi")
SCORE = Expr("reduce", (Expr("reduce", (ATTN,), ("sum", "q"), "gi"),), ("mean", "g"), "i")


def number(value: int | Fraction) -> Expr:
    return Expr("const", value=Fraction(value))


def binary(op: str, left: Expr, right: Expr) -> Expr:
    return Expr("binary", (left, right), op)


def test_formula_is_written_as_in_the_language() -> None:
    assert formula(Expr("pool", (SCORE,), ("max", 7), "i")) == "maxpool(mean[g] sum[q] attn[q in last(64)], 7)"
    age, window = Expr("scalar", value="now"), number(3)
    assert formula(binary("*", binary("-", age, window), number(Fraction(1, 4)))) == "(now - 3) * 0.25"
    assert formula(binary("max", age, number(Fraction(1, 3)))) == "max(now, 1/3)"
    assert formula(Expr("unary", (binary("+", age, window),), "neg")) == "-(now + 3)"
    assert formula(Expr("pair", (Expr("field", value="k"), Expr("field", value="q")), "cos")) == "cos(k, q)"


def test_plan_lines_show_every_fact() -> None:
    best = Selection("top", SCORE, 1, scope="across", floor=Fraction(1, 5))
    local = ClassPlan(
        "local",
        keep=(Region("sink", 0), Region("newest", unit="lot"), best),
        triggers=(Trigger("chunk", 512), Trigger("filled", 2, "lot")),
        states=("acc",),
        by_position=True,
    )
    plan = PolicyPlan(
        name="mine",
        digest="0123456789abcdef0123",
        facts=ModelFacts(4, 8, 2, 64, family="llama"),
        classes=(ClassPlan("far", (Region("all"),), ()), local),
        class_of=((0, 1), (1, 1), (1, 1), (0, 1)),
        counts=(Count("sink", number(4)), Count("b", Expr("share", value=0))),
        shares=(Share("b", number(12), "pyramid", Fraction(20)),),
        states=(StatePlan("acc", number(0), SCORE),),
        units=(UnitPlan("lot", 128, 16, (("lo", Expr("field", value="k")),)),),
        chunk=512,
        query_window=64,
        params=(("sinks", "4"),),
    )
    assert list(plan_lines(plan)) == [
        "policy mine, digest 0123456789abcdef",
        "parameters sinks=4",
        "model llama: 4 layers, 8 query heads, 2 KV heads of 64 channels, float32",
        "prompt in pieces of 512 tokens",
        "pages of 16 tokens; scores ask for the 64 newest queries",
        "class far: 2 KV heads, layers 0, 3",
        "  keeps everything",
        "class local: 6 KV heads, layers 0..3",
        "  keep sink(4)",
        "  keep newest lot",
        f"  keep top(b) by {formula(SCORE)} across heads floor 0.2",
        "  at chunk(512), filled(lot, 2)",
        "  states acc",
        "  entries stay in position order",
        "state acc: starts at 0, on attend += mean[g] sum[q] attn[q in last(64)]",
        "share b: 12 a layer on average, by pyramid",
        "unit lot: 128 tokens from 16; lo = k",
    ]
