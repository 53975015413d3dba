"""Lowering: what runs lowers to the module on record, what does not is refused at its own place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcompile.dsl import PolicyError, library, load, resolve
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_policy import StateOp
from kvcompile.dsl.dialect_sets import KeepOp, TopOp
from kvcompile.dsl.lower import Lowered, lower
from kvcompile.dsl.module import from_text, ops_of, to_text

RUNNABLE = (
    "keep_all", "streaming", "h2o", "snapkv", "snapkv_chunked", "tova", "pyramidkv", "adakv", "knorm", "keydiff",
    "lagkv", "prulong", "duo", "criticalkv",
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
    assert refused["quest"] == "K910"
    assert refused["razor"] == "K907"
    assert refused["kivi"] == "K909"
    assert refused["streaming_compact"] == "K911"
    assert refused["llmdrop"] == "K912"


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        (["keep recent(4)", "attend recent(8)", "at step"], "K910", "attend recent(8)"),
        (["keep recent(4)", "store rest as int4", "at step"], "K909", "store rest as int4"),
        (["keep recent(4) else fold mean", "at step"], "K908", "fold mean"),
        (["keep pow2 page", "unit page(16)", "at step"], "K902", "pow2 page"),
        (["keep random(4, 1)", "at step"], "K902", "random(4, 1)"),
        (["keep where norm(k) > 1", "at step"], "K902", "where norm(k) > 1"),
        (["keep cover(95%) by norm(k)", "at step"], "K901", "cover(95%) by norm(k)"),
        (["keep recent(4)", "at every(4) if len > 8"], "K903", "every(4) if len > 8"),
        (["keep recent(4)", "at when now > 5"], "K903", "when now > 5"),
        (["keep recent(4)", "at full(20% of prompt)"], "K903", "full(20% of prompt)"),
        (["keep top(4) by norm(k) per query_head", "at step"], "K904", "per query_head"),
        (["keep top(4) by norm(k) across layers", "at step"], "K904", "across layers"),
        (["keep top(4) by norm(k) shared layers(2)", "at step"], "K904", "shared layers(2)"),
        (["keep top(20% of len) by norm(k)", "at step"], "K905", "20% of len"),
        (["keep top(1GiB) by norm(k)", "at step"], "K905", "1GiB"),
        (["keep top(4) by norm(raw.k)", "at step"], "K905", "raw.k"),
        (["keep top(4) by norm(k) * step", "at step"], "K905", "step"),
        (["keep top(4) by sum[q] dot(q, k)", "at step"], "K905", "q"),
        (["keep top(4) by sum[q in sample(5%)] attn", "at step"], "K905", "q in sample(5%)"),
        (["keep top(4) by var[q in last(4)] attn", "at step"], "K905", "var[q in last(4)] attn"),
        (["state a = 0", "on step: a += 1", "keep top(4) by a", "at step"], "K906", "on step: a += 1"),
        (["state a = 0", "on attend: a = 1", "keep top(4) by a", "at step"], "K906", "a = 1"),
        (["state a = 0", "on attend: a += max[q] attn", "keep top(4) by a", "at step"], "K906", "max[q] attn"),
        (["state a = 0", "on attend: a += sum[q] (age * attn)", "keep top(4) by a", "at step"], "K906", "age"),
        (["state a = 0", "on attend where age > 1: a += sum[q] attn", "keep top(4) by a", "at step"],
         "K906", "age > 1"),
        (["unit page(16, stride=8)", "keep newest page", "at step"], "K913", "unit page(16, stride=8)"),
        (["unit page(16)", "keep top(4) pages by norm(k)", "at step"], "K913", "top(4) pages by norm(k)"),
        (["share b = 4 by cover(s)", "score s = norm(k)", "keep top(b) by s", "at step"], "K914", "cover(s)"),
        (["share b = 4 by pyramid(2)", "keep top(b / 2) by norm(k)", "at step"], "K914", "b"),
        (["keep top(4) by norm(k) shared heads per page", "unit page(16)", "at step"], "K904",
         "top(4) by norm(k) shared heads per page"),
        (["keep top(4) by norm(k) shared heads | top(2) by norm(v)", "at step"], "K904", "top(2) by norm(v)"),
        (["keep top(2) by -pos | top(2) by norm(v) across heads | top(4) by mean[h] norm(k)", "at step"], "K904",
         "top(2) by norm(v) across heads"),
        (["keep top(4) by norm(v) * mean[h] norm(k)", "at step"], "K904", "top(4) by norm(v) * mean[h] norm(k)"),
        (["unit page(16) with c = mean[h] mean[i] k", "keep top(4) by dot(k, c) per page", "at step"], "K904",
         "top(4) by dot(k, c) per page"),
        (["state a = 0", "on attend: a += mean[h] sum[q] attn", "keep top(4) by a | top(2) by norm(k)", "at step"],
         "K906", "mean[h] sum[q] attn"),
        (["state a = 0", "on attend: a += mean[h] sum[q] attn", "x: keep top(4) by a", "rest: keep all", "at step"],
         "K906", "mean[h] sum[q] attn"),
        (["state a = 0", "on attend: a += sum[q] logit", "keep top(4) by a", "at step"], "K906", "logit"),
        (["state a = 0", "score e = exp(logit)", "on attend: a += sum[q] e", "keep top(4) by a", "at step"],
         "K906", "logit"),
        (["keep top(4) by norm(k) across heads", "at step, full(64)"], "K903", "full(64)"),
        (["share b = 4 by pyramid(2)", "keep top(b) by norm(k)", "at full(64)"], "K903", "full(64)"),
        (["share b = now / 8 by pyramid(2)", "keep top(b) by norm(k)", "at prefill.end"], "K914", "now"),
        (["share b = 10% of chunk by pyramid(2)", "keep top(b) by norm(k)", "at chunk(8)"], "K914", "10% of chunk"),
        (["keep recent(0.5)", "at step"], "K205", "0.5"),
        (["keep sink(1.5 + 1)", "at step"], "K205", "1.5 + 1"),
        (["keep top(1.5) by norm(k)", "at step"], "K205", "1.5"),
        (["keep recent(50%)", "at step"], "K210", "50%"),
        (["positions compact", "keep recent(4)", "at step"], "K911", "positions compact"),
        (["layers 2: off", "keep recent(4)", "at step"], "K912", "off"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_at_its_own_place(lines: list[str], code: str, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        lowered(clauses(*lines))
    found = [(finding.code, finding.span.text) for finding in caught.value.diagnostics]
    assert (code, text) in found


@pytest.mark.parametrize(
    "lines",
    [
        # Heads that decide by the same numbers keep the same entries.
        ["keep top(4) by norm(k) shared heads | top(2) by norm(v) shared heads | top(2) by -age", "at step"],
        ["score s = mean[h] norm(k)", "keep top(4) by s | bottom(2) by s per head", "at step"],
        ["state a = 0", "on attend: a += mean[h] sum[q] attn", "keep top(4) by a | top(2) by pos + a", "at step"],
        ["layers 0: keep top(4) by norm(k) shared heads", "layers rest: keep top(4) by norm(k)", "at step"],
        ["keep top(4) by norm(k) across heads", "at step, every(64)"],
        ["keep top(4) by norm(k)", "at full(64)"],
        ["share b = 10% of prompt + 8 by pyramid(2)", "keep top(b) by norm(k)", "at prefill.end"],
        ["keep recent(9 / 2) | top(0.5) by norm(k)", "at step"],  # a quotient is cut, a part is of the candidates
    ],
)
def test_what_lies_beside_these_refusals_lowers(lines: list[str]) -> None:
    lowered(clauses(*lines))


def test_each_refusal_about_heads_and_counts_shows_a_way_out() -> None:
    text = clauses(
        "state a = 0",
        "on attend: a += mean[h] sum[q] attn",
        "keep top(4) by a shared heads | top(2) by norm(k)",
        "at step",
    )
    with pytest.raises(PolicyError) as caught:
        lowered(text)
    assert {finding.code: finding.hint for finding in caught.value.diagnostics} == {
        "K904": "say `shared heads` at every selection of the set, or at none, without `[h]`",
        "K906": "leave out `[h]`, or let all heads share one decision",
    }


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        lowered(clauses("attend recent(8)", "keep pow2 page", "unit page(cos(q, prev.q) < 0.5)", "at step"))
    assert {finding.code for finding in caught.value.diagnostics} >= {"K910", "K913"}


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


def test_second_keep_for_the_same_rows_is_refused() -> None:
    text = clauses("keep recent(4)", "at prefill.end", "keep recent(8)", "at step")
    with pytest.raises(PolicyError, match=r"4:5: error\[K901\]"):
        lowered(text)
