"""Plans of what is read: rules by row, held sets, picks, units, layers that are off; and what a model refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvcompile.dsl import PolicyError
from kvcompile.dsl.module import Places, from_text, to_text, verify
from kvcompile.gate_files import gate_bytes
from kvcompile.kernels.plan import ModelFacts, QuerySource, ReadRule, Region, Selection, Trigger, source_of
from kvcompile.passes import PIPELINE, Compiled, compile_policy
from kvcompile.passes.context import Context
from kvcompile.passes.explain import explain
from kvcompile.passes.freeze import freeze
from kvcompile.passes.trained_gates import Trained

FACTS = ModelFacts(4, 8, 2, 64)
DEEP = ModelFacts(28, 4, 2, 64)
READING = (
    "quest", "tidal", "moba", "powerattention", "bigbird", "sparse_transformer", "vertical", "infllm_v2",
    "sampleattention", "seerattention", "seerattention_r", "seerattention_gated", "seerattention_r_gated", "llmdrop",
)  # fmt: skip
PAGE = "unit page(16) with c = mean[i] k"
BY_PAGE = "attend top(4) pages by dot(q, c) per query_head"


def files(name: str, folder: Path, facts: ModelFacts = DEEP) -> dict[str, Path]:
    """The gates that a policy asks for, of two channels."""
    if not name.endswith("_gated"):
        return {}
    joined = {"q": facts.group, "k": 3}
    gates = {
        f"layers.{layer}.{part}": torch.zeros(facts.kv_heads, vectors * facts.head_dim, 2)
        for layer in range(facts.layers)
        for part, vectors in joined.items()
    }
    weights = folder / "gates.safetensors"
    weights.write_bytes(gate_bytes(gates, Trained(64, 0, "pooled", "raw.k", ("max", "min", "mean")), {}))
    return {"live": weights}


def compiled(*lines: str, facts: ModelFacts = FACTS, **options: object) -> Compiled:
    text = "policy mine():\n" + "".join(f"    {line}\n" for line in lines)
    return compile_policy(text, facts, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", READING)
def test_scheduled_modules_are_those_on_record(name: str, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    whole = compile_policy(name, DEEP, tables=files(name, tmp_path))
    golden(f"scheduled/{name}.mlir", whole.modules["memory"])
    names = list(whole.modules)
    for before, step in zip(names, PIPELINE, strict=False):
        module = from_text(whole.modules[before])
        verify(module, Places())
        step(module, Context(DEEP, tables=files(name, tmp_path)))
        verify(module, Places())
        assert to_text(module) == whole.modules[step.name]
    assert freeze(module, DEEP, whole.plan.params) == whole.plan


@pytest.mark.parametrize("name", READING)
def test_no_formula_of_a_plan_leaves_a_query_open(name: str, tmp_path: Path) -> None:
    plan = compile_policy(name, DEEP, tables=files(name, tmp_path)).plan
    scores = [t.score for read in plan.reads for rule in read.rules for t in rule.selections]
    assert all(set(score.axes) <= set("gui") for score in scores)
    assert bool(plan.reads) == (name != "llmdrop")


def test_gates_of_other_units_or_another_model_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    tables = files("seerattention_gated", tmp_path)
    with pytest.raises(PolicyError, match=r"K616.*trained on units of 64 tokens, the policy has units of 32 tokens"):
        compile_policy("seerattention_gated", DEEP, tables=tables, size=32)
    with pytest.raises(PolicyError, match=r"K616.*there is `layers.10.k`, which no layer of this model reads"):
        explain("seerattention_gated", shaped(FACTS), tables=tables)


def shaped(facts: ModelFacts) -> SimpleNamespace:
    sizes = {"num_hidden_layers": facts.layers, "num_attention_heads": facts.q_heads, "hidden_size": 64 * facts.q_heads}
    return SimpleNamespace(num_key_value_heads=facts.kv_heads, model_type="llama", dtype="float32", **sizes)


def test_plan_of_quest() -> None:
    plan = compile_policy("quest", FACTS).plan
    assert [read.name for read in plan.reads] == ["layers 2..last"]
    assert plan.read_of == ((-1, -1), (-1, -1), (0, 0), (0, 0))
    (rule,) = plan.reads[0].rules
    assert (rule.triggers, rule.pick) == ((Trigger("step"),), None)
    newest, top = rule.terms
    assert newest == Region("newest", unit="page")
    assert isinstance(top, Selection) and (top.scope, top.whole, top.score.axes) == ("query_head", "page", "gu")
    assert {source_of(n) for n in top.score.walk()} - {None} == {QuerySource("own")}
    assert [(u.name, u.size, u.stride, [name for name, _ in u.landmarks]) for u in plan.units] == [
        ("page", 16, 16, ["lo", "hi"])
    ]
    assert plan.classes[0].by_position and plan.classes[0].keeps_all
    assert (plan.states, plan.ring, plan.reads[0].holds) == ((), 0, False)


def test_plan_of_tidal_picks_before_it_reads() -> None:
    plan = compile_policy("tidal", DEEP).plan
    picking, reading = plan.reads
    assert [(rule.pick, rule.triggers) for rule in picking.rules] == [(0, (Trigger("step"),))]
    assert reading.rules == (ReadRule((Region("picked", pick=0),), (Trigger("step"),)),)
    assert [plan.reading(layer)[0] for layer in (0, 1, 2, 3, 13, 27)] == [-1, -1, 0, 1, 0, 1]
    assert plan.picks == 1 and not plan.classes[0].by_position


def test_plan_of_units_that_overlap() -> None:
    plan = compile_policy("infllm_v2", FACTS).plan
    assert [(u.name, u.size, u.stride) for u in plan.units] == [("kernel", 32, 16), ("block", 64, 64)]
    top = plan.reads[0].rules[0].selections[0]
    assert (top.score.op, top.score.value, top.whole) == ("regroup", ("kernel", "block"), "block")


def test_landmarks_that_no_score_reads_are_not_in_the_plan() -> None:
    unit = "unit page(16) with lo = min[i] k, c = mean[i] k, odd = min[i] cos(k, c)"
    (page,) = compiled(unit, "attend own page | top(2) pages by odd", "at step").plan.units
    assert [name for name, _ in page.landmarks] == ["c", "odd"]
    (bare,) = compiled(unit, "attend pow2 page").plan.units
    assert bare.landmarks == ()


def test_a_landmark_of_raw_keys_needs_the_rotation() -> None:
    raw = PAGE.replace("[i] k", "[i] raw.k"), BY_PAGE, "at step"
    assert compiled(*raw).plan.rotates
    assert not compiled(PAGE, *raw[1:]).plan.rotates


@pytest.mark.parametrize("name", ["seerattention", "seerattention_gated", "vertical"])
def test_published_prefill_reads_leave_steps_dense(name: str, tmp_path: Path) -> None:
    plan = compile_policy(name, FACTS, tables=files(name, tmp_path, FACTS)).plan
    (read,) = plan.reads
    assert [(rule.narrows, rule.fires_in_steps) for rule in read.rules] == [(True, False), (False, True)]
    assert not read.holds and not read.narrows_steps and plan.states == ()


def test_the_identity_gate_sets_queries_against_keys_of_their_own_frame() -> None:
    """Of both after their rotation: a score of rotated queries and keys as they were would change with the place."""
    plan = compile_policy("seerattention_r", FACTS).plan
    ((_, mean),) = plan.units[0].landmarks
    assert [n.value for n in mean.walk() if n.op == "field"] == ["k"] and not plan.rotates


@pytest.mark.parametrize(
    ("lines", "holds"),
    [
        (["attend recent(4)"], False),
        (["attend recent(4)", "at step"], False),
        (["attend recent(4)", "at chunk"], True),
        (["attend recent(4)", "at every(4)"], True),
        (["attend recent(4)", "at step if now > 8"], True),
        (["attend recent(4)", "at chunk", "attend sink(4)", "at step"], False),
        (["layers 0: pick t = top(4) by logit", "layers 1..last: attend t", "at step"], False),
    ],
)
def test_steps_that_may_go_on_with_an_earlier_set_keep_it_in_a_hidden_state(lines: list[str], holds: bool) -> None:
    plan = compiled(*lines).plan
    assert [state.name for state in plan.states] == ["@read"] * holds
    assert any(read.holds for read in plan.reads) == holds
    assert all(state.init.value == Fraction(15) for state in plan.states)  # four query heads to a KV head


def test_classes_of_what_is_kept_and_readers_are_two_divisions_of_the_rows(tmp_path: Path) -> None:
    table = tmp_path / "far.tsv"
    table.write_text("1 0\n" * 4)
    text = (
        'heads far = table("far.tsv")\nheads near = rest\n\npolicy mine():\n    unit page(16) with c = mean[i] k\n'
        "    near: keep sink(4) | recent(32)\n    at step\n"
        "    far: attend newest page | top(4) pages by dot(q, c) per query_head\n    at step\n"
    )
    plan = compile_policy(text, FACTS, tables={"far": table}).plan
    assert [cls.name for cls in plan.classes] == ["near", "rest"]
    assert plan.class_of == ((1, 0),) * 4 and plan.read_of == ((0, -1),) * 4
    assert [cls.by_position for cls in plan.classes] == [False, True]


def test_the_rest_is_what_prefixes_of_any_verb_leave(tmp_path: Path) -> None:
    table = tmp_path / "far.tsv"
    table.write_text("1 0\n" * 4)
    text = (
        'heads far = table("far.tsv")\n\npolicy mine():\n    far: attend sink(4) | recent(64)\n'
        "    rest: keep recent(32)\n    at step\n"
    )
    plan = compile_policy(text, FACTS, tables={"far": table}).plan
    assert [[plan.classes[c].name for c in row] for row in plan.class_of] == [["others", "rest"]] * 4
    assert plan.read_of == ((0, -1),) * 4


def test_states_that_only_reads_ask_for_are_kept() -> None:
    lines = ["state acc = 0", "on attend: acc += sum[q] attn", "attend recent(4) | top(4) by acc", "at step"]
    plan = compiled(*lines).plan
    assert [state.name for state in plan.states] == ["acc"] and plan.states[0].add is not None


def test_reads_cut_prompts_and_ask_for_earlier_queries() -> None:
    plan = compiled("attend top(4) by sum[q in last(8)] attn", "at chunk(32)").plan
    assert (plan.chunk, plan.query_window) == (32, 8)
    turning = compiled("attend recent(4)", "at when cos(q, prev.q) < 0.5").plan
    assert (turning.query_window, turning.ring) == (1, 2)


def test_rules_of_picks_come_before_the_sets_of_their_rows() -> None:
    plan = compiled("attend t | recent(4)", "pick t = top(4) by norm(k)", "at step").plan
    assert [rule.pick for rule in plan.reads[0].rules] == [0, None]


def test_digest_tells_reads_apart() -> None:
    plans = [
        compiled(*lines).plan
        for lines in (["attend all"], ["attend recent(4)"], ["attend recent(5)"], ["layers 1: off"])
    ]
    assert len({plan.digest for plan in plans}) == 4


# ---------------------------------------------------------------- layers that are off


def test_layers_that_are_off_have_no_heads() -> None:
    plan = compiled("layers 1, last: off", "layers 0..1: keep recent(4)", "attend recent(2)", "at step").plan
    assert plan.off == (1, 3) and plan.live == (0, 2)
    assert [plan.class_size(i) for i in range(len(plan.classes))] == [2, 2]
    assert plan.heads(1, 0) == () and plan.site_classes(3) == ()
    assert plan.read_of == ((0, 0), (-1, -1), (0, 0), (-1, -1))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["layers 1: off", "layers 1: keep recent(4)", "at step"], "K705.*layers that are named here are off"),
        (["layers 1..2: off", "layers 2: attend recent(4)"], "K705.*layers that are named here are off"),
        (["layers 0..last: off"], "K705.*every layer of this model is off"),
        (["layers 3..7: off"], "K701.*no layer 7"),
        (["layers 0: attend t", "layers 2: pick t = top(4) by logit", "layers 1: attend all", "at step"],
         "K707.*layer 0 reads the pick `t` before"),
        (["pick t = top(4) by norm(k)", "at step", "attend t", "at chunk"], "K707.*may be read at `chunk`"),
        (["pick t = top(4) by norm(k)", "at step", "attend t | recent(4)", "at step, chunk"], "K707"),
    ],
)  # fmt: skip
def test_what_a_model_refuses(lines: list[str], found: str) -> None:
    with pytest.raises(PolicyError, match=found):
        compiled(*lines)


def test_choices_over_all_heads_want_whole_layers(tmp_path: Path) -> None:
    table = tmp_path / "far.tsv"
    table.write_text("1 0\n" * 4)
    text = 'heads far = table("far.tsv")\n\npolicy mine():\n    far: attend top(4) by attn shared heads\n    at step\n'
    with pytest.raises(PolicyError, match=r"K904.*all 2 KV heads of a layer, and `far` has 1"):
        compile_policy(text, FACTS, tables={"far": table})


def test_windows_leave_reads_as_they_are() -> None:
    lines = [PAGE, BY_PAGE, "at chunk, step"]
    plain = compiled(*lines).plan
    sliding = compiled(*lines, facts=replace(FACTS, windows=(64, 0, 64, 0))).plan
    assert (sliding.reads, sliding.read_of) == (plain.reads, plain.read_of)
