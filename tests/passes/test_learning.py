"""A learn block bound to a model: one class owns every head, the other keeps its set, no table is asked for."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from kvcompile.dsl import PolicyError
from kvcompile.kernels.plan import ModelFacts, Region
from kvcompile.passes import compile_policy
from kvcompile.passes.learning import DistilPlan, GatePlan, LearnPlan, LossTerm, compile_learn

FACTS = ModelFacts(3, 8, 4, 32)
HARD = GatePlan("hard_concrete", 4.0, (("high", 1.1), ("low", -0.1), ("temperature", 2 / 3)))

POLICY = """\
heads far = table("nowhere.tsv", top=30%)
heads near = rest

policy mine(n=8, part=25%):
    far: keep all
    near: keep sink(4) | recent(n) | random(16, 3)
    at chunk(64), step

learn far for mine:
    gate z = sparsemax(keep=part, temperature=0.5) per head
    mix (1 - z) * near + z * far
    loss 2 * next_token
    freeze weights
"""


def counted(learn: LearnPlan, region: Region) -> object:
    assert region.count is not None
    return learn.plan.counts[region.count].expr.value


def test_prulong_with_the_published_numbers() -> None:
    learn = compile_learn("prulong", FACTS)
    assert (learn.policy, learn.heads, learn.others, learn.two_way) == ("prulong", "retrieval", "local", False)
    assert learn.gate == HARD
    assert learn.terms == (
        LossTerm("next_token", 1.0, None, None),
        LossTerm("lagrange", 1.0, Fraction(3, 10), Fraction(4, 5)),
    )
    assert learn.keep == Fraction(3, 10)
    assert learn.full.keep == (Region("all"),)
    assert [(term.kind, counted(learn, term)) for term in learn.local.keep] == [("sink", 128), ("recent", 1024)]


def test_duo_has_a_block_of_its_own_for_the_sets_of_its_parent() -> None:
    learn = compile_learn("duo", FACTS)
    assert learn.two_way and learn.keep is None
    assert learn.gate == GatePlan("clamp01", 1.0, ())
    assert learn.terms == (LossTerm("hidden_mse", 1.0, None, None), LossTerm("mean", 0.05, None, None))
    assert [(term.kind, counted(learn, term)) for term in learn.local.keep] == [("sink", 64), ("recent", 256)]


def test_the_learned_class_owns_every_head_and_the_other_stays() -> None:
    for policy in ("prulong", POLICY):
        learn = compile_learn(policy, FACTS)
        names = [cls.name for cls in learn.plan.classes]
        assert sorted(names) == sorted([learn.heads, learn.others])
        assert learn.plan.class_of == ((names.index(learn.heads),) * 4,) * 3
        assert learn.full is learn.plan.classes[names.index(learn.heads)]
        assert learn.local is learn.plan.classes[names.index(learn.others)]


def test_sets_are_those_that_run_once_the_heads_are_known(tmp_path: Path) -> None:
    table = tmp_path / "heads.tsv"
    table.write_text("1 0 0 0\n0 0 0 1\n0 0 0 0\n")
    runs = compile_policy("prulong", FACTS, tables={"retrieval": table}, window=100).plan
    learn = compile_learn("prulong", FACTS, window=100)
    assert learn.plan.classes == runs.classes and learn.plan.counts == runs.counts
    assert (learn.plan.params, learn.plan.chunk, learn.plan.page) == (runs.params, runs.chunk, runs.page)


def test_a_policy_of_the_users_own_with_parameters() -> None:
    learn = compile_learn(POLICY, FACTS)
    assert learn.gate == GatePlan("sparsemax", 0.0, (("ramp", 1.0), ("temperature", 0.5)))
    assert (learn.keep, learn.terms) == (Fraction(1, 4), (LossTerm("next_token", 2.0, None, None),))
    assert [term.kind for term in learn.local.keep] == ["sink", "recent", "random"]
    assert compile_learn(POLICY, FACTS, part="50%").keep == Fraction(1, 2)


def test_the_other_class_may_be_rest_and_the_learned_one_need_not_keep_all() -> None:
    text = POLICY.replace("near:", "rest:").replace("* near", "* rest").replace("far: keep all", "far: keep recent(64)")
    learn = compile_learn(text, FACTS)
    assert (learn.others, learn.local.name) == ("rest", "rest")
    assert [(term.kind, counted(learn, term)) for term in learn.full.keep] == [("recent", 64)]
    assert set(map(len, learn.plan.class_of)) == {4} and len(learn.plan.classes) == 2


def test_the_digest_follows_policy_and_block_and_not_the_model_or_how_they_are_written() -> None:
    digest = compile_learn(POLICY, FACTS).digest
    assert compile_learn(POLICY, ModelFacts(9, 4, 2, 64)).digest == digest
    respelt = POLICY.replace("mine:\n", "mine:  # the far ones\n").replace(
        "keep=part, temperature=0.5", "keep=part,  temperature=5e-1  "
    )
    assert compile_learn(respelt, FACTS).digest == digest
    changed = [
        compile_learn(POLICY, FACTS, n=9),
        compile_learn(POLICY, FACTS, part=0.5),
        compile_learn(POLICY.replace("2 * next_token", "3 * next_token"), FACTS),
        compile_learn(POLICY.replace("top=30%", "top=40%"), FACTS),
    ]
    assert len({digest, *(learn.digest for learn in changed)}) == 5
    assert hash(compile_learn(POLICY, FACTS)) == hash(compile_learn(POLICY, FACTS))


def test_a_child_uses_the_block_of_its_parent() -> None:
    child = compile_learn("policy mine(window=64) extends prulong\n", FACTS)
    assert (child.policy, child.heads, child.gate) == ("mine", "retrieval", HARD)
    assert [counted(child, term) for term in child.local.keep if isinstance(term, Region)] == [128, 64]
    changed = "policy mine() extends prulong:\n    local: keep recent(8) | top(8) by norm(k)\n"
    with pytest.raises(PolicyError, match=r"K814.*follow from positions"):
        compile_learn(changed, FACTS)


def test_which_block() -> None:
    body = POLICY.split("learn far for mine:\n")[1].replace(
        "mix (1 - z) * near + z * far", "mix z * near + (1 - z) * far"
    )
    two = POLICY + "\nlearn near for mine:\n" + body
    assert compile_learn(two, FACTS, heads="near").others == "far"
    assert compile_learn(two, FACTS, heads="far").others == "near"
    with pytest.raises(PolicyError, match=r'K815.*learn blocks for far, near\n(.*\n)*.*heads="far"'):
        compile_learn(two, FACTS)
    with pytest.raises(PolicyError, match=r"K815.*no learn block for `fra`\n(.*\n)*.*`far`"):
        compile_learn(two, FACTS, heads="fra")
    with pytest.raises(PolicyError, match=r"K815.*`streaming` has no learn block\n(.*\n)*.*duo, prulong"):
        compile_learn("streaming", FACTS)
    with pytest.raises(PolicyError, match=r"K815.*`razor` has no learn block\n(.*\n)*.*learn far for razor"):
        compile_learn("razor", FACTS)


def test_what_is_wrong_with_policy_or_block_stops_it() -> None:
    for change, code in (
        (("keep=part", "keep=2"), "K804"),
        (("z * far", "z * fra"), "K806"),
        (("loss 2 * next_token", "loss 2 * next"), "K807"),
        (("    freeze weights\n", ""), "K812"),
        (("recent(n)", "recent(m)"), "K101"),
        (("random(16, 3)", "frozen"), "K814"),
    ):
        with pytest.raises(PolicyError) as caught:
            compile_learn(POLICY.replace(*change), FACTS)
        assert code in [finding.code for finding in caught.value.diagnostics], change
    with pytest.raises(PolicyError, match="K104"):
        compile_learn("prulong", FACTS, widow=3)


def test_a_trained_score_is_learned_without_a_file_of_it() -> None:
    """Plans of gates follow from the policy's text and parameters; of the model only its facts are there."""
    plan = compile_learn("seerattention_gated", FACTS, size=32)
    assert isinstance(plan, DistilPlan)
    assert (plan.heads, plan.kind, plan.keep, plan.terms) == ("live", "block_gate", None, ())
    assert (plan.gate.size, plan.gate.width, plan.gate.joined) == (32, 128, False)
    assert (plan.gate.landmarks, plan.gate.raw) == (("max", "min", "mean"), True)
    assert plan.digest != compile_learn("seerattention_gated", FACTS).digest
    other = compile_learn("seerattention_r_gated", FACTS)
    assert isinstance(other, DistilPlan) and other.kind == "query_gate" and other.gate.joined
