"""The pipeline: modules on record after each pass, text that parses back, dumps, digests, passes from text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from kvcompile.dsl import PolicyError
from kvcompile.dsl.dialect_policy import ScheduleOp
from kvcompile.dsl.dialect_sets import KeepOp
from kvcompile.dsl.module import Places, from_text, ops_of, to_text, verify
from kvcompile.kernels.plan import Loser, ModelFacts, Region, Selection, Trigger
from kvcompile.passes import PIPELINE, Compiled, compile_policy
from kvcompile.passes.budgets import Budgets
from kvcompile.passes.context import Context
from kvcompile.passes.freeze import freeze
from kvcompile.passes.memory import Memory
from kvcompile.passes.pipeline import run
from kvcompile.passes.schedule import Schedule

FACTS = ModelFacts(2, 4, 2, 64)
LARGE = ModelFacts(32, 32, 8, 128)
RUNNABLE = (
    "keep_all", "streaming", "h2o", "snapkv", "snapkv_chunked", "tova", "pyramidkv", "adakv", "knorm", "keydiff",
    "lagkv", "prulong", "duo", "criticalkv", "keyformer", "lazy", "windowkv", "chunkkv", "prefixkv", "d2o", "razor",
    "streaming_compact", "freqkv", "elastic", "locret", "expected_attention", "r_kv",
)  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "heads.tsv"
    path.write_text("0.9 0.1\n0.2 0.7\n")
    return path


def files(name: str, table: Path) -> dict[str, Path]:
    """What a library policy needs from its user."""
    weights = table.with_name("heads.safetensors")
    weights.touch()
    return {"prulong": {"retrieval": table}, "duo": {"retrieval": table}, "locret": {"cis": weights}}.get(name, {})


def compiled(name: str, table: Path, **params: object) -> Compiled:
    return compile_policy(name, FACTS, tables=files(name, table), **params)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RUNNABLE)
def test_scheduled_modules_are_those_on_record(name: str, table: Path, golden: Callable[[str, str], None]) -> None:
    modules = compiled(name, table).modules
    assert list(modules) == ["lower", *(step.name for step in PIPELINE)]
    golden(f"scheduled/{name}.mlir", modules["memory"])


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_pass_can_start_from_the_text_of_the_one_before(name: str, table: Path) -> None:
    whole = compiled(name, table)
    names = list(whole.modules)
    for before, step in zip(names, PIPELINE, strict=False):
        module = from_text(whole.modules[before])
        verify(module, Places())
        assert to_text(module) == whole.modules[before]
        step(module, Context(FACTS, tables=files(name, table)))
        verify(module, Places())
        assert to_text(module) == whole.modules[step.name]
    assert replace(freeze(module, FACTS, whole.plan.params)) == whole.plan


@pytest.mark.parametrize("name", RUNNABLE)
def test_runnable_policies_bind_to_a_large_model(name: str, table: Path) -> None:
    table.write_text("0.5 0 0 0 0 0 0 1\n" * 32)
    plan = compile_policy(name, LARGE, tables=files(name, table)).plan
    assert len(plan.class_of) == 32 and all(len(row) == 8 for row in plan.class_of)
    for index, cls in enumerate(plan.classes):
        assert (cls.rows_of is None) == any(index in row for row in plan.class_of)


def test_a_dump_is_numbered_text(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compile_policy("snapkv", FACTS, dump=tmp_path / "given")
    files = sorted(path.name for path in (tmp_path / "given" / "snapkv").iterdir())
    assert files == ["00-lower.mlir", "01-bind.mlir", "02-budgets.mlir", "03-schedule.mlir", "04-memory.mlir"]
    assert (tmp_path / "given" / "snapkv" / "02-budgets.mlir").read_text() == whole.modules["budgets"]
    monkeypatch.setenv("KVC_DUMP", str(tmp_path / "asked"))
    compile_policy("tova", FACTS)
    assert (tmp_path / "asked" / "tova" / "04-memory.mlir").exists()
    assert set(whole.seconds) == set(whole.modules)


def test_digests_follow_meaning(table: Path) -> None:
    base = compiled("snapkv", table).plan
    assert compiled("snapkv", table).plan == base
    assert compiled("snapkv", table, budget="2k").plan.digest != ""
    assert compiled("snapkv", table, budget=1024).plan.digest != base.digest
    assert compile_policy("snapkv", replace(FACTS, layers=3)).plan.digest != base.digest
    first = compiled("prulong", table).plan
    table.write_text("0.1 0.9\n0.2 0.7\n")
    assert compiled("prulong", table).plan.digest != first.digest


def test_findings_of_the_checker_stop_a_policy_before_it_is_lowered() -> None:
    with pytest.raises(PolicyError) as caught:
        compile_policy("policy mine():\n    keep top(4) by nothing\n    at step\n", FACTS)
    assert all(finding.severity == "error" for finding in caught.value.diagnostics)
    notes = compile_policy("snapkv", FACTS).diagnostics
    assert notes and all(finding.severity != "error" for finding in notes)


# ---------------------------------------------------------------- single passes


def scheduled(*lines: str, page: int = 16) -> tuple[list[KeepOp], ScheduleOp]:
    text = "policy mine():\n" + "".join(f"    {line}\n" for line in lines)
    module = from_text(compile_policy(text, FACTS).modules["budgets"])
    context = Context(FACTS)
    run(module, context, (Schedule(page=page), Memory()))
    ops = list(ops_of(module))
    return [op for op in ops if isinstance(op, KeepOp)], next(op for op in ops if isinstance(op, ScheduleOp))


def test_budgets_fold_constants_exactly() -> None:
    module = from_text(
        "builtin.module {\n"
        '  kv.policy @mine digest "0" {\n'
        '    %0 = kv.const "1/3" : !kv.expr<"">\n'
        '    %1 = kv.const "6" : !kv.expr<"">\n'
        '    %2 = kv.binary "*" %0, %1 : !kv.expr<"">, !kv.expr<""> -> !kv.expr<"">\n'
        '    %3 = kv.unary "neg" %2 : !kv.expr<""> -> !kv.expr<"">\n'
        '    %4 = kv.binary "-" %1, %3 : !kv.expr<"">, !kv.expr<""> -> !kv.expr<"">\n'
        '    %5 = kv.count "n" %4\n'
        '    %6 = kv.region "recent" count %5\n'
        "    %7 = kv.union %6\n"
        "    kv.class @all\n"
        "    kv.keep %7 for @all at []\n"
        "  }\n}\n"
    )
    Budgets()(module, Context(FACTS))
    assert 'kv.const "8"' in to_text(module)
    assert "kv.binary" not in to_text(module) and "kv.unary" not in to_text(module)


def test_a_budget_that_regions_exceed_is_refused_at_its_place() -> None:
    with pytest.raises(PolicyError) as caught:
        compile_policy("snapkv", FACTS, budget=32)
    finding = caught.value.diagnostics[0]
    assert (finding.code, finding.span.text) == ("K205", "budget - observe")
    module = from_text(compile_policy("snapkv", FACTS, budget=70).modules["lower"].replace('"70" :', '"63" :', 1))
    with pytest.raises(PolicyError, match=r"snapkv\.kvp:4:\d+: error\[K205\]"):
        Budgets()(module, Context(FACTS))


def test_schedule_cuts_by_the_smallest_piece_and_keeps_the_widest_windows() -> None:
    keeps, schedule = scheduled(
        "score a = sum[q in last(8)] attn",
        "score b = sum[q in last(3)] attn",
        "layers 0:",
        "    keep top(4) by a",
        "    at prefill.end",
        "layers 1:",
        "    keep top(4) by b | recent(4)",
        "    at filled(6)",
        "score c = maxpool(sum[q in peek(5)] attn, 3)",
        page=32,
    )
    assert [op.order.data for op in keeps if op.order] == ["any", "any"]
    assert [[phase.data for phase in op.phases or ()] for op in keeps] == [
        ["prefill.end"],
        ["chunk", "prefill.end", "step"],
    ]
    assert (schedule.chunk.value.data, schedule.peek.value.data) == (0, 0)
    assert (schedule.window.value.data, schedule.page.value.data) == (8, 32)
    _, pieces = scheduled("layers 0:", "    keep frozen | top(4) by norm(k)", "    at chunk(64)", "layers 1:",
                          "    keep frozen | top(4) by sum[q in peek(5)] attn", "    at chunk(32)")  # fmt: skip
    assert (pieces.chunk.value.data, pieces.peek.value.data) == (32, 5)


@pytest.mark.parametrize(
    ("lines", "order"),
    [
        (["keep recent(4) | top(4) by norm(k)", "at step"], "any"),
        (["keep top(4) by maxpool(norm(k), 3)", "at step"], "position"),
        (["unit lot(8)", "keep newest lot", "at step"], "position"),
        (["unit lot(8)", "keep top(4) by norm(k) per lot", "at step"], "position"),
    ],
)
def test_scores_that_need_an_order_say_so(lines: list[str], order: str) -> None:
    keeps, _ = scheduled(*lines)
    assert keeps[0].order is not None and keeps[0].order.data == order


def test_peek_in_steps_is_refused() -> None:
    text = "policy mine():\n    keep frozen | top(4) by sum[q in peek(5)] attn\n    at chunk(8), step\n"
    with pytest.raises(PolicyError, match=r"<text>:2:5: error\[K705\].*`peek`"):
        compile_policy(text, FACTS)


# ---------------------------------------------------------------- what the plan says


def test_plan_of_snapkv_chunked() -> None:
    plan = compile_policy("snapkv_chunked", FACTS).plan
    (cls,) = plan.classes
    assert (plan.chunk, plan.peek, plan.query_window, plan.page) == (8192, 64, 0, 16)
    assert cls.name == "all" and cls.by_position
    assert cls.triggers == (Trigger("chunk", 8192),)
    frozen, top = cls.keep
    assert frozen == Region("frozen")
    assert isinstance(top, Selection) and top.observed == 64 and top.scope == "head"
    assert top.score.axes == "i" and [node.op for node in top.score.walk()] == ["evidence", "reduce", "reduce", "pool"]
    assert plan.params == (("ratio", "30%"), ("observe", "64"), ("pool", "7"), ("c", "8192"))


def test_plan_of_adakv_and_h2o() -> None:
    ada = compile_policy("adakv", FACTS).plan.classes[0].selections[0]
    assert (ada.scope, ada.floor.numerator, ada.floor.denominator) == ("across", 1, 5)
    h2o = compile_policy("h2o", FACTS).plan
    assert h2o.classes[0].states == ("acc",) and h2o.evicts_in_step
    assert h2o.states[0].add is not None and h2o.states[0].add.axes == "i"


def test_what_only_dead_states_read_is_not_in_the_plan() -> None:
    text = (
        "policy mine():\n    state a = 0, b = 0, c = 0\n    on attend where c > 1: a = max(a, b), c = c + 1\n"
        "    on step: b = norm(raw.k) * count\n    keep top(4) by {score}\n    at step\n"
    )
    none = compile_policy(text.format(score="norm(k)"), FACTS).plan
    assert (none.states, none.updates, none.rotates) == ((), (), False)
    some = compile_policy(text.format(score="c"), FACTS).plan
    assert [s.name for s in some.states] == ["c"]
    assert [[name for name, _ in update.assigns] for update in some.updates] == [["c"]]
    every = compile_policy(text.format(score="a"), FACTS).plan
    assert [s.name for s in every.states] == ["a", "b", "c", "@count"]
    assert every.rotates and every.classes[0].states == ("a",)


def test_plan_of_conditions_and_updates() -> None:
    plan = compile_policy("lazy", FACTS).plan
    (trigger,) = plan.classes[0].triggers
    assert (trigger.kind, trigger.n) == ("every", 175)
    assert trigger.cond is not None and (trigger.cond.value, trigger.cond.axes) == (">", "")
    (update,) = plan.updates
    assert update.event == "attend" and [name for name, _ in update.assigns] == ["gap", "seen"]
    assert update.where is not None
    assert [s.add for s in plan.states] == [None, None]
    turning = "policy mine():\n    keep recent(4)\n    at when cos(q, prev.q) < 0.5\n"
    plan = compile_policy(turning, FACTS).plan
    assert (plan.query_window, plan.ring) == (1, 2)


def test_plan_of_two_keeps_for_the_same_rows() -> None:
    plan = compile_policy("elastic", FACTS).plan
    first, then = plan.classes
    assert [cls.name for cls in plan.classes] == ["all", "all #2"]
    assert (first.rows_of, then.rows_of) == (None, 0)
    assert plan.class_of == ((0, 0), (0, 0)) and plan.site_classes(0) == (0, 1)
    assert first.losers == (Loser("merge", "pos"),) and then.losers == ()
    assert first.selections[0].scope == "shared"
    assert [s.name for s in plan.states] == ["@count"] and plan.states[0].init.value == 1


def test_plan_of_picks() -> None:
    text = (
        "policy mine():\n    score s = sum[q in last(8)] attn\n"
        "    layers 0:\n        pick t = top(4) by s\n        keep t | recent(4)\n"
        "    layers 1..last: keep t | recent(2)\n    at prefill.end\n"
    )
    plan = compile_policy(text, FACTS).plan
    assert [(c.name, c.rows_of, c.only_picks, len(c.triggers)) for c in plan.classes] == [
        ("layers 0", None, False, 0),  # rows keep all until the pick has been made
        ("layers 0 pick t", 0, True, 1),
        ("layers 0 #2", 0, False, 1),
        ("layers 1..last", None, False, 1),
    ]
    assert plan.classes[1].selections[0].pick == 0 and plan.picks == 1
    assert [term.pick for term in plan.classes[3].keep if isinstance(term, Region)] == [0, None]
    assert plan.class_of == ((0, 0), (3, 3)) and plan.site_classes(0) == (0, 1, 2)
    kept = text.replace("        keep t | recent(4)\n", "        keep all\n")
    plan = compile_policy(kept, FACTS).plan
    assert [(c.name, c.rows_of) for c in plan.classes][:2] == [("layers 0", None), ("layers 0 pick t", 0)]


def test_plan_of_windows_that_groups_of_layers_share() -> None:
    plan = compile_policy("windowkv", LARGE).plan
    (top,) = plan.classes[0].selections
    assert (top.whole, top.scope, top.layers, top.sharing, top.pick) == ("window", "shared", "shared", 8, 0)
    assert top.score.axes == "u" and plan.classes[0].by_position and plan.picks == 1
    (share,) = plan.shares
    assert (share.by, share.beta, share.sharing) == ("pyramid", 14, 8)
    assert [plan.counts[index].name for index in share.reserve] == ["observe"]
    (read,) = (n for n in plan.counts[top.count or 0].expr.walk() if n.op == "share")
    assert read.value == 0
    assert [unit.name for unit in plan.units] == ["window"]


def test_plan_of_what_is_decided_after_the_last_layer() -> None:
    d2o = compile_policy("d2o", LARGE).plan
    assert [s.name for s in d2o.states] == ["acc", "@count", "@score:0:0", "@share:0"]
    assert d2o.spans(0) and not d2o.spans(1) and d2o.scalars == 1
    merge, drop = d2o.classes[0].losers
    assert (merge.fn, merge.of, drop.kind) == ("cos", "k", "drop")
    assert merge.when is not None and [n.value for n in merge.when.walk() if n.op == "ema"] == [(0, Fraction(1, 2))]
    keep = "keep recent(2) | top(4) by norm(k) across heads across layers | top(1) by pos"
    text = f"policy mine():\n    {keep}\n    at step\n"
    across = compile_policy(text, FACTS).plan
    assert [s.name for s in across.states] == ["@score:0:0", "@score:0:1"]
    assert across.classes[0].selections[0].layers == "across" and across.spans(0)


def test_plan_of_compact_positions_keeps_the_order() -> None:
    plan = compile_policy("streaming_compact", FACTS).plan
    assert plan.compact and plan.rotates and plan.classes[0].by_position
    fold = compile_policy("policy mine():\n    keep recent(4) else fold pool(2)\n    at step\n", FACTS).plan
    assert fold.classes[0].by_position and not fold.compact
    assert fold.classes[0].losers == (Loser("fold", "pool", part=Fraction(1, 2)),)


def test_all_sets_of_the_same_rows_agree_on_their_order() -> None:
    text = (
        "policy mine():\n    keep top(4) by maxpool(norm(k), 3)\n    at prefill.end\n"
        "    keep frozen | recent(4)\n    at step\n"
    )
    assert [cls.by_position for cls in compile_policy(text, FACTS).plan.classes] == [True, True]


def test_files_of_trained_scores_are_named_for_the_run_time(tmp_path: Path) -> None:
    weights = tmp_path / "heads.safetensors"
    weights.touch()
    given = compile_policy("locret", FACTS, tables={"cis": weights})
    assert given.learned == (("cis", weights),)
    assert [n.value for n in given.plan.updates[0].assigns[0][1].walk() if n.op == "learned"] == ["cis"]
    assert given.plan.query_window == 0  # its queries are those of the entry itself
    text = 'policy mine():\n    state a = learned("heads.safetensors", k)\n    keep top(4) by a\n    at step\n'
    assert compile_policy(text, FACTS, base=tmp_path).learned == (("a", weights),)
    for policy, options, reason in (
        ("locret", {}, "brings no weights for `cis`"),
        ("locret", {"tables": {"cis": tmp_path / "none.safetensors"}}, "no such file"),
        ("locret", {"tables": {"cis": tmp_path / "heads.bin"}}, "safetensors files only"),
    ):
        with pytest.raises(PolicyError, match=f"K615.*{reason}"):
            compile_policy(policy, FACTS, **options)  # type: ignore[arg-type]


def test_states_units_and_counts_that_nothing_reads_are_not_in_the_plan() -> None:
    text = (
        "policy mine():\n    state acc = 0\n    on attend: acc += sum[q] attn\n    unit lot(8)\n"
        "    score s = acc\n    keep recent(4)\n    at step\n"
    )
    plan = compile_policy(text, FACTS).plan
    assert (plan.states, plan.units, len(plan.counts)) == ((), (), 1)


def test_freeze_wants_a_bound_and_scheduled_module() -> None:
    module = from_text(compile_policy("snapkv", FACTS).modules["budgets"])
    with pytest.raises(ValueError, match="not bound"):
        freeze(module, FACTS)
    with pytest.raises(ValueError, match="not bound"):
        freeze(from_text(compile_policy("snapkv", FACTS).modules["memory"]), replace(FACTS, layers=3))
