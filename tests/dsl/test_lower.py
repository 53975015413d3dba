"""Lowering: what runs lowers to the module on record, what does not is refused at its own place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcompile.dsl import PolicyError, library, load, resolve
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.dialect_losers import LoserOp
from kvcompile.dsl.dialect_policy import StateOp, UpdateOp
from kvcompile.dsl.dialect_sets import KeepOp, PickOp, TopOp
from kvcompile.dsl.dialect_sources import EmaOp, LearnedOp, QueriesOp
from kvcompile.dsl.lower import Lowered, lower
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.module import from_text, ops_of, to_text

RUNNABLE = (
    "keep_all", "streaming", "h2o", "snapkv", "snapkv_chunked", "tova", "pyramidkv", "adakv", "knorm", "keydiff",
    "lagkv", "prulong", "duo", "criticalkv", "keyformer", "lazy", "windowkv", "chunkkv", "prefixkv", "d2o", "razor",
    "streaming_compact", "freqkv", "elastic", "locret", "expected_attention", "r_kv",
    "quest", "tidal", "moba", "powerattention", "bigbird", "sparse_transformer", "vertical", "infllm_v2",
    "sampleattention", "seerattention", "seerattention_r", "seerattention_gated", "seerattention_r_gated", "llmdrop",
    "graph_kv", "set_prompting", "parallel_contexts",
)  # fmt: skip


def lowered(policy: str, **params: object) -> Lowered:
    return lower(resolve(load(policy), params))


def clauses(*lines: str) -> str:
    return "policy mine():\n" + "".join(f"    {line}\n" for line in lines)


@pytest.mark.parametrize("name", RUNNABLE)
def test_runnable_policies_lower_to_the_module_on_record(name: str, golden: Callable[[str, str], None]) -> None:
    text = to_text(lowered(name).module)
    assert to_text(from_text(text)) == text
    golden(f"lower/{name}.mlir", text)


def test_every_library_policy_either_lowers_or_is_refused_with_a_code_of_its_own() -> None:
    refused = {}
    for name in library.names():
        try:
            lowered(name)
        except PolicyError as error:
            assert all(finding.code.startswith("K9") for finding in error.diagnostics), str(error)
            assert all(finding.span.text for finding in error.diagnostics)
            refused[name] = error.diagnostics[0].code
    assert set(refused) == set(library.names()) - set(RUNNABLE)
    assert refused["kivi"] == "K909"
    assert refused["pbs_attn"] == "K913"


def test_an_attend_of_everything_is_what_runs_anyway() -> None:
    lowered(clauses("attend all", "positions original", "keep recent(4) else drop", "at step"))


def test_equal_expressions_are_one_value() -> None:
    policy = clauses("score s = mean[g] sum[q in last(8)] attn", "keep top(4) by s | bottom(4) by s", "at prefill.end")
    ops = list(ops_of(lowered(policy).module))
    assert sum(isinstance(op, kv.EvidenceOp) for op in ops) == 1
    first, second = (op for op in ops if isinstance(op, TopOp))
    assert first.score is second.score


def test_a_left_over_group_is_averaged() -> None:
    ops = list(ops_of(lowered(clauses("keep top(4) by sum[q in last(8)] attn", "at prefill.end")).module))
    reductions = [(op.fn.data, op.axis.data) for op in ops if isinstance(op, kv.ReduceOp)]
    assert reductions == [("sum", "q"), ("mean", "g")]


def test_all_heads_means_the_group_first() -> None:
    ops = list(ops_of(lowered("tova").module))
    reductions = [(op.fn.data, op.axis.data) for op in ops if isinstance(op, kv.ReduceOp)]
    assert reductions == [("sum", "q"), ("mean", "g"), ("mean", "h")]


def test_a_percentage_of_candidates_is_a_fraction_of_a_count_is_not() -> None:
    bare = next(
        op for op in ops_of(lowered(clauses("keep top(30%) by norm(k)", "at step")).module) if isinstance(op, TopOp)
    )
    assert bare.fraction is not None and bare.fraction.data == "3/10" and bare.count is None
    text = clauses("keep top(30% of prompt) by norm(k)", "at step")
    counted = next(op for op in ops_of(lowered(text).module) if isinstance(op, TopOp))
    assert counted.fraction is None and counted.count is not None


def test_state_starts_at_a_number_or_at_its_own_position() -> None:
    text = clauses("state a = 1 / 4, b = now", "on attend: a += sum[q] attn / 2", "keep top(4) by a + b", "at step")
    first, second = (op for op in ops_of(lowered(text).module) if isinstance(op, StateOp))
    assert isinstance(first.init.owner, kv.ConstOp) and first.init.owner.value.data == "1/4"
    assert isinstance(second.init.owner, kv.FieldOp) and second.init.owner.what.data == "pos"
    assert first.add is not None and second.add is None


def test_peeked_scores_say_how_many_newest_entries_are_kept() -> None:
    top = next(op for op in ops_of(lowered("snapkv_chunked", observe=32).module) if isinstance(op, TopOp))
    assert top.observed is not None and top.observed.value.data == 32


def test_each_prefix_becomes_a_class_and_the_rest_keeps_all() -> None:
    text = clauses("layers 0, 2..last-1: keep recent(4)", "at step")
    ops = list(ops_of(lowered(text).module))
    keeps = {op.of.root_reference.data: op for op in ops if isinstance(op, KeepOp)}
    assert set(keeps) == {"layers 0, 2..last-1", "rest"}
    assert len(keeps["rest"].triggers) == 0


def test_scores_of_a_prefix_hold_below_it_only() -> None:
    text = clauses(
        "score s = norm(k)",
        "layers 0:",
        "    score s = -norm(v)",
        "    keep top(4) by s",
        "layers 1..last: keep top(4) by s",
        "at prefill.end",
    )
    tops = [op for op in ops_of(lowered(text).module) if isinstance(op, TopOp)]
    assert [type(op.score.owner).__name__ for op in tops] == ["UnaryOp", "UnaryOp"]
    assert [op.score.owner.fn.data for op in tops if isinstance(op.score.owner, kv.UnaryOp)] == ["neg", "norm"]


def test_a_second_keep_at_the_same_triggers_is_refused_at_others_it_judges_after_the_first() -> None:
    with pytest.raises(PolicyError, match=r"5:5: error\[K901\]"):
        lowered(
            clauses(
                "layers 0: keep all", "keep recent(4)", "at prefill.end, step", "keep recent(8)", "at step, prefill.end"
            )
        )
    text = clauses("keep top(4) by norm(k)", "at prefill.end", "keep frozen | recent(8)", "at step")
    keeps = [op for op in ops_of(lowered(text).module) if isinstance(op, KeepOp)]
    assert [op.of.root_reference.data for op in keeps] == ["all", "all"]
    assert [[t.kind.data for t in op.triggers] for op in keeps] == [["prefill.end"], ["step"]]


# ---------------------------------------------------------------- states


def state(*lines: str) -> tuple[list[StateOp], list[UpdateOp]]:
    ops = list(ops_of(lowered(clauses(*lines, "keep top(4) by a", "at step")).module))
    return [op for op in ops if isinstance(op, StateOp)], [op for op in ops if isinstance(op, UpdateOp)]


@pytest.mark.parametrize(
    ("update", "linear"),
    [
        ("a += sum[q] attn", True),
        ("a += mean[g] sum[q] (attn * norm(v)) / 2", True),
        ("a += max[g] sum[q] attn", False),  # the largest of sums is no sum
        ("a += sum[q] max[g] attn", False),  # it would do, and nobody asks for it
        ("a += sum[q] softmax[i] ((logit + gumbel(3)) / (1 + 0.01 * step))", True),
        ("a += sum[q] softmax[i] (logit * age)", False),
        ("a += sum[q] (attn - mean[i] attn)", False),  # entries that come later would change the mean
        ("a += sum[q] logit", False),  # -inf for what the query cannot read
        ("a += sum[q] (attn + 1)", False),  # would reach entries that were not there yet
        ("a += sum[q] (age * attn)", False),
        ("a += sum[q] (a * attn)", False),
        ("a += sum[q] exp(attn)", False),
        ("a += max[q] attn", False),
        ("a = sum[q] attn", False),
        ("a += attn", False),
        ("a += 1", False),
    ],
)  # fmt: skip
def test_a_plain_sum_over_queries_may_run_over_all_of_them_at_once(update: str, linear: bool) -> None:
    states, updates = state("state a = 0", f"on attend: {update}")
    assert (states[0].add is not None) == linear
    assert len(updates) == (not linear)


def test_what_an_update_reads_runs_query_by_query_too() -> None:
    states, updates = state("state a = 0, b = 0", "on attend: b += sum[q] attn, a = max(a, b)")
    assert [op.add for op in states] == [None, None]
    assert [[name.data for name in op.states] for op in updates] == [["b", "a"]]
    states, updates = state("state a = 0, b = 0", "on attend: b += sum[q] attn, a = max(a, attn)", "on step: b = b / 2")
    assert [op.add is not None for op in states] == [False, True]
    assert [(op.event.data, [name.data for name in op.states]) for op in updates] == [
        ("attend", ["a"]),
        ("step", ["b"]),
    ]


def test_updates_keep_their_order_and_condition() -> None:
    ops = list(ops_of(lowered("lazy").module))
    (update,) = (op for op in ops if isinstance(op, UpdateOp))
    assert [name.data for name in update.states] == ["gap", "seen"]
    assert update.where is not None and kv.axes_of(update.where) == "i"
    assert [kv.axes_of(value) for value in update.values] == ["i", ""]


def test_a_first_value_that_is_no_constant_is_set_on_insert() -> None:
    states, updates = state("state a = norm(k)", "on insert: a = 2 * a")
    assert isinstance(states[0].init.owner, kv.ConstOp)
    assert [(op.event.data, len(op.states)) for op in updates] == [("insert", 1), ("insert", 1)]
    first = updates[0].values[0].owner
    assert isinstance(first, kv.UnaryOp) and first.fn.data == "norm"


def test_a_trained_score_reads_its_own_token() -> None:
    (learned,) = (op for op in ops_of(lowered("locret").module) if isinstance(op, LearnedOp))
    assert (learned.label.data, learned.file.data) == ("cis", "locret.safetensors")
    query = learned.args[0].owner
    assert isinstance(query, QueriesOp) and (query.source.data, query.width.value.data) == ("last", 1)


def test_updates_of_a_state_under_two_prefixes_are_refused() -> None:
    text = clauses("state a = 0", "layers 0: on attend: a += sum[q] attn", "layers 1: on attend: a += sum[q] attn",
                   "keep top(4) by a", "at step")  # fmt: skip
    with pytest.raises(PolicyError, match=r"K906.*different prefixes"):
        lowered(text)


# ---------------------------------------------------------------- sets


def tops(*lines: str) -> list[TopOp]:
    return [op for op in ops_of(lowered(clauses(*lines, "at step")).module) if isinstance(op, TopOp)]


def test_a_choice_per_query_head_leaves_the_group_open() -> None:
    (asking,) = tops("keep top(4) by sum[q in last(2)] attn per query_head")
    assert (asking.scope.data, kv.axes_of(asking.score)) == ("query_head", "gi")
    (alike,) = tops("keep top(4) by norm(k) per query_head")  # all query heads choose the same
    assert (alike.scope.data, kv.axes_of(alike.score)) == ("head", "i")


def test_units_that_compete_have_one_score_each() -> None:
    left_over, said = tops("unit page(16)", "keep top(4) pages by norm(k) | top(1) page by max[i] norm(k)")
    assert [kv.axes_of(top.score) for top in (left_over, said)] == ["u", "u"]
    reductions = [top.score.owner for top in (left_over, said)]
    assert [op.fn.data for op in reductions if isinstance(op, kv.ReduceOp)] == ["mean", "max"]
    assert [top.whole.data for top in (left_over, said) if top.whole] == ["page", "page"]


def test_layers_that_share_one_decision() -> None:
    (two, one) = tops("keep top(4) by norm(k) shared layers(2) | top(2) by norm(v) shared layers(1)")
    assert two.layers is not None and two.sharing is not None
    assert (two.layers.data, two.sharing.value.data) == ("shared", 2)
    assert one.layers is None  # each layer shares with itself alone


def test_a_condition_is_about_the_newest_query_and_the_one_before() -> None:
    text = clauses(
        "score turned = cos(q, prev.q)", "keep recent(4)", "at when turned < 0.8, step if len > 9 or now < 2"
    )
    (keep,) = (op for op in ops_of(lowered(text).module) if isinstance(op, KeepOp))
    assert [(t.kind.data, t.cond.value.data) for t in keep.triggers] == [("when", 0), ("step", 1)]
    sources = [op.source.data for op in below(keep.conds[0]) if isinstance(op, QueriesOp)]
    assert sorted(sources) == ["last", "previous"]
    assert [kv.axes_of(cond) for cond in keep.conds] == ["", ""]


def test_a_condition_averages_the_group_before_it_compares() -> None:
    text = clauses("state a = 0", "on attend where attn > 0.5: a += 1", "keep top(4) by a | where sum[q] logit > 1",
                   "at step if cos(q, prev.q) < 0.5")  # fmt: skip
    ops = list(ops_of(lowered(text).module))
    compared = [op for op in ops if isinstance(op, kv.BinaryOp) and op.fn.data in "<>"]
    assert len(compared) == 3
    assert all("g" not in kv.axes_of(value) for op in compared for value in op.operands)


def test_a_share_may_stand_anywhere_in_a_count() -> None:
    text = clauses("share b = 8 by pyramid(2)", "keep recent(b / 4) | top(3 * b - 5) by norm(k)", "at step")
    ops = list(ops_of(lowered(text).module))
    assert sum(isinstance(op, ShareOp) for op in ops) == 1
    assert [op.label.data for op in ops if isinstance(op, kv.CountOp)] == ["b / 4", "3 * b - 5"]


# ---------------------------------------------------------------- picks and losers


def test_a_pick_of_layers_without_a_keep_takes_over_the_keep_around_it() -> None:
    text = clauses(
        "layers 2: pick t = top(4) by norm(k)", "layers 3..last: keep t | recent(4)", "keep recent(8)", "at step"
    )
    ops = list(ops_of(lowered(text).module))
    keeps = {op.of.root_reference.data: op for op in ops if isinstance(op, KeepOp)}
    assert set(keeps) == {"layers 2", "layers 3..last", "rest"}
    assert keeps["layers 2"].set is keeps["rest"].set
    (pick,) = (op for op in ops if isinstance(op, PickOp))
    assert (pick.label.data, pick.of.root_reference.data) == ("t", "layers 2")


def test_losers_are_tried_in_the_order_written() -> None:
    ops = list(ops_of(lowered("d2o").module))
    keep = next(op for op in ops if isinstance(op, KeepOp) and op.losers)
    assert [loser.owner.kind.data for loser in keep.losers if isinstance(loser.owner, LoserOp)] == ["merge", "drop"]
    likeness = "sim > ema(mean(sim), 0.5) weight ema(sim - sim, 0.5)"
    twice = clauses(f"keep recent(4) else merge into nearest by cos(k) when {likeness}", "at step")
    with pytest.raises(PolicyError, match="K908"):  # a running mean is of one number
        lowered(twice)
    both = clauses("keep recent(4) else merge into nearest by cos(k) when sim > ema(mean(sim), 0.5) "
                   "weight ema(mean(sim), 0.5)", "at step")  # fmt: skip
    emas = [op.index.value.data for op in ops_of(lowered(both).module) if isinstance(op, EmaOp)]
    assert emas == [0, 1]  # each keeps a number of its own


def test_folds_say_which_part_stays() -> None:
    text = clauses("keep recent(4) else fold pool(4)", "at step")
    (loser,) = (op for op in ops_of(lowered(text).module) if isinstance(op, LoserOp))
    assert loser.part is not None and loser.part.data == "1/4"
