"""The slide pass: classes of one window each, what cannot be said of them refused, and what runs of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvcompile
from kvcompile.dsl import PolicyError
from kvcompile.kernels.plan import ModelFacts, PolicyPlan, Trigger
from kvcompile.passes import compile_policy
from kvcompile.passes.residents import forwards
from kvcompile.passes.slide import SLACK, slide
from tests.model.test_windows_counted import WINDOW, ran, sliding_model

FACTS = ModelFacts(4, 4, 2, 64, windows=(0, 48, 0, 48))
ALL = replace(FACTS, windows=(48,) * 4)


def mine(*lines: str) -> str:
    return "policy mine():\n" + "".join(f"    {line}\n" for line in lines)


def plan_of(*lines: str, facts: ModelFacts = FACTS, **options: object) -> PolicyPlan:
    return compile_policy(mine(*lines), facts, **options).plan  # type: ignore[arg-type]


def slides(plan: PolicyPlan) -> list[tuple[str, int, bool]]:
    return [(cls.name, plan.class_reach(i), cls.slides) for i, cls in enumerate(plan.classes)]


def test_a_model_without_windows_keeps_its_plan() -> None:
    for windows in ((), (0,) * 4):
        plan = plan_of("keep recent(9)", "at step", facts=replace(FACTS, windows=windows))
        assert slide(plan) is plan and slides(plan) == [("all", 0, False)]


def test_each_class_has_layers_of_one_window_and_the_name_it_had() -> None:
    plan = plan_of("keep recent(9)", "at step")
    assert slides(plan) == [("all", 0, False), ("all", 48, True)]
    assert plan.class_of == ((0, 0), (1, 1), (0, 0), (1, 1))
    assert plan.classes[1].triggers[-1] == Trigger("slide", 6)
    assert plan.digest != plan_of("keep recent(9)", "at step", facts=ALL).digest
    wide = plan_of("keep all", facts=replace(FACTS, windows=(0, 4096, 0, 3)))
    assert [cls.triggers for cls in wide.classes] == [(), (Trigger("slide", 1),), (Trigger("slide", SLACK),)]
    assert [cls.keeps_all for cls in wide.classes] == [True, False, False]


def test_several_clauses_of_the_same_rows_slide_once() -> None:
    plan = plan_of("keep recent(40)", "at prefill.end", "keep recent(16)", "at every(8)")
    assert slides(plan) == [("all", 0, False), ("all", 48, True), ("all #2", 0, False), ("all #2", 48, False)]
    assert [cls.rows_of for cls in plan.classes] == [None, None, 0, 1]


def test_picks_do_not_slide_but_the_rows_below_them_do() -> None:
    lines = ("layers 0: pick best = top(4) by norm(k)", "keep best | recent(9)", "at prefill.end")
    plan = plan_of(*lines, facts=ALL)
    assert any(cls.only_picks for cls in plan.classes)
    assert not any(cls.slides for cls in plan.classes if cls.only_picks)
    assert all(plan.classes[cls].slides for row in plan.class_of for cls in row)


def test_layer_blocks_and_head_tables_are_split_where_they_mix_windows(tmp_path: Path) -> None:
    blocks = plan_of("layers 0, 2: keep all", "layers rest: keep recent(9)", "at step")
    assert sorted(slides(blocks)) == sorted(
        [(cls.name, blocks.class_reach(i), bool(blocks.class_reach(i))) for i, cls in enumerate(blocks.classes)]
    )
    assert {blocks.class_reach(i) for i in blocks.class_of[1]} == {48}
    mask = tmp_path / "mask.tsv"
    mask.write_text("1\t0\n0\t0\n1\t1\n0\t1\n")
    plan = compile_policy("prulong", FACTS, tables={"retrieval": mask}).plan
    named = [[(plan.classes[i].name, plan.class_reach(i)) for i in row] for row in plan.class_of]
    assert named == [
        [("retrieval", 0), ("local", 0)],
        [("local", 48)] * 2,
        [("retrieval", 0)] * 2,
        [("local", 48), ("retrieval", 48)],
    ]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("keep top(9) by norm(k) across layers", "at step"), "decides for several layers together"),
        (("keep top(9) by norm(k) shared layers(2)", "at step"), "decides for several layers together"),
        (("share b = 8 by softmax(var[i] norm(k))", "keep top(b) by norm(k)", "at prefill.end"), "several layers"),
        (("keep recent(9) else fold mean", "at step"), "folds what it drops"),
    ],
)
def test_what_windows_forbid_is_refused_with_the_way_out(lines: tuple[str, ...], reason: str) -> None:
    with pytest.raises(PolicyError, match=rf"K706.*{reason}") as caught:
        plan_of(*lines)
    assert caught.value.diagnostics[0].hint
    if "fold" not in lines[0]:
        assert all(cls.slides for cls in plan_of(*lines, facts=ALL).classes)


def test_scores_that_wait_for_all_layers_follow_their_class() -> None:
    plan = plan_of(
        "layers 0, 1: keep recent(20)", "layers rest: keep top(9) by norm(k) across layers", "at step",
        facts=replace(FACTS, windows=(0, 48, 48, 48)),
    )  # fmt: skip
    (waiting,) = [i for i in range(len(plan.classes)) if plan.spans(i)]
    assert waiting == 2 and [s.name for s in plan.states] == ["@score:2:0"]


def test_rows_in_a_window_stay_short_however_long_it_runs() -> None:
    totals = [f.after for f in forwards(plan_of("keep all", facts=ALL), 200, 300)]
    most = max(sum(some) for some in totals)
    assert most == 8 * (48 - 1 + 5)  # dropped at every sixth step
    assert forwards(plan_of("keep all", facts=ALL), 200, 0).__next__().after == (8 * 47,)


# ---------------------------------------------------------------- on models


def run(policy: str, prompt: int = 70, steps: int = 20) -> tuple[list[list[list[int]]], torch.Tensor]:
    """Kept positions [layer][KV head] at the end, and the last logits."""
    model = sliding_model("mistral")
    kvcompile.optimize(model, policy, backend="reference", compile="off")
    cache = ran(model, prompt, steps)
    kept = [[head.tolist() for head in cache.positions(layer)] for layer in range(4)]
    logits = model(torch.tensor([[7]]), past_key_values=cache).logits
    return kept, logits


@pytest.mark.parametrize(
    "lines",
    [
        ("keep top(400) by norm(k) across layers", "at prefill.end"),
        ("keep recent(1000) else merge into nearest by cos(k)", "at prefill.end, step"),
    ],
)
def test_what_drops_nothing_itself_is_keep_all_inside_the_window(lines: tuple[str, ...]) -> None:
    kept, logits = run(mine(*lines))
    everything, expected = run("keep_all")
    assert all(set(found) >= set(range(90 - WINDOW + 1, 90)) for layer in kept for found in layer)
    assert kept == everything or "step" in lines[1]
    torch.testing.assert_close(logits, expected)


def test_layers_that_compete_decide_at_their_own_triggers_only() -> None:
    """A step in which only the window moves on drops what has left it, and nothing else."""
    early, _ = run(mine("keep top(50) by norm(k) across layers", "at prefill.end"), steps=1)
    late, _ = run(mine("keep top(50) by norm(k) across layers", "at prefill.end"), steps=20)
    assert sum(len(head) for layer in early for head in layer) >= 50
    for before, after in zip(early, late, strict=True):
        for old, new in zip(before, after, strict=True):
            left = {p for p in old if p > 89 - WINDOW + 5}
            assert left <= set(new) and set(range(71, 90)) <= set(new)
