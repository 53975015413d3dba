"""A plan as text: every fact that the run time decides by is on it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

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
from kvcompile.passes import compile_policy

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
        "share b: 12 a layer on average, by pyramid(20)",
        "unit lot: 128 tokens from 16; lo = k",
    ]


def lines_of(policy: str, **options: object) -> list[str]:
    return list(plan_lines(compile_policy(policy, ModelFacts(4, 4, 2, 64), **options).plan))  # type: ignore[arg-type]


def test_library_plans_in_words() -> None:
    lazy = lines_of("lazy")
    assert "  at every(175) if len > 4096" in lazy
    assert "on attend where sum[q] ((max[g] attn) > 0.0001): gap = max(gap, now - seen), seen = now" in [
        line.replace("max[g] attn", "(max[g] attn)") for line in lazy
    ]
    d2o = lines_of("d2o")
    assert "  keep recent(b / 4)" in d2o
    assert "  else merge into nearest by cos(k) when sim >= ema(mean[i] sim, 0.5) weight sim" in d2o
    assert "  else drop" in d2o
    assert "share b: 0.2 * prompt a layer on average, by softmax(-var[i] acc)" in d2o
    windows = lines_of("windowkv")
    assert "share b: 1984 a layer on average, by pyramid(14), 64 set aside first, 8 layers share one part" in windows
    assert any(
        line.startswith("  keep top(b / 32) windows by mean[i] mean[h] mean[g] sum[q] attn[q in last(64)]")
        and line.endswith("shared heads shared layers(8), into slot 0")
        for line in windows
    )
    assert "class all #2: rows of all" in lines_of("elastic")
    assert "keys are rotated by their place in the row" in lines_of("streaming_compact")
    assert "  else fold dct, 0.5 of them" in lines_of("freqkv")
    assert any("softmax[i] ((logit + gumbel(0)) / (1 + (0.01 * step)))" in line for line in lines_of("keyformer"))


def test_trained_scores_picks_and_tables_in_words(tmp_path: Path) -> None:
    weights, table = tmp_path / "heads.safetensors", tmp_path / "layers.txt"
    weights.touch()
    table.write_text("1\n" * 4)
    assert "on insert: cis = learned(cis, q, k, v)" in lines_of("locret", tables={"cis": weights})
    text = (
        'policy mine():\n    share b = 8 by table("layers.txt")\n    pick t = cover(90%) by norm(k) per query_head\n'
        "    keep t | random(4, 3) | where age < 9 | top(b) by sum[q in sample(5%)] attn across heads\n"
        "    at when now > 9\n"
    )
    lines = lines_of(text, tables={"b": table})
    assert "  pick cover(0.9) by norm(k) per head, into slot 0" in lines
    assert "  keep picked 0" in lines and "  keep random(4), seed 3" in lines and "  keep where age < 9" in lines
    assert "  keep top(b) by mean[g] sum[q] attn[q in sample(0.05)] across heads" in lines
    assert "  at when now > 9" in lines
    assert "share b: 8 a layer on average, by a table" in lines
    turning = lines_of("policy mine():\n    keep recent(4)\n    at when cos(q, prev.q) < 0.5\n")
    assert "  at when mean[q] (mean[g] cos(q[q in last(1)], prev.q) < 0.5)" in turning


def test_what_queries_read_and_which_layers_are_off_in_words() -> None:
    quest = lines_of("quest", budget=48)
    start = quest.index("reads of layers 2..last: 4 KV heads, layers 2..3")
    assert quest[start + 1 : start + 4] == [
        "  attend newest page",
        "  attend top(3) pages by sum[d] (max(q * page.lo, q * page.hi)) per query_head",
        "  at step",
    ]
    assert "  in every forward" in lines_of("powerattention") and "  attend pow2 block" in lines_of("powerattention")
    spans = lines_of("graph_kv")
    assert '  attend span("self")' in spans and '  attend span("sources")' in spans
    kernels = lines_of("infllm_v2")
    assert "unit kernel: 32 tokens from 0, one every 16; c = mean[i] k" in kernels
    assert any("max over the kernels of each block of sum[g] softmax[u] dot(q, kernel.c)" in line for line in kernels)
    text = """policy mine():
    layers 3: off
    unit b(8) with c = mean[i] k
    layers 1:
        pick t = top(2) bs by mean[g] dot(q, c) per head
        at step
    layers 2: attend t | recent(4)
    at step
    layers 0: attend recent(8) | where mean[g] dot(q, c) > 1
    at prefill.end
"""
    lines = lines_of(text)
    assert "without attention: layers 3" in lines and "class all: 6 KV heads, layers 0..2" in lines
    assert "reads of layers 1: 2 KV heads, layers 1" in lines
    assert "  pick into slot 0: top(2) bs by mean[g] dot(q, b.c) per head" in lines and "  attend picked 0" in lines
    assert "  attend where mean[g] dot(q, b.c) > 1, whole bs" in lines
    assert "  in other steps: what the latest of these chose, and all entries since" in lines
