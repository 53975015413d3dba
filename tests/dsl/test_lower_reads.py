"""Lowering of what queries read: rows, sets and their times, whose queries a score asks, and what is refused."""

from __future__ import annotations

import pytest

from kvcompile.dsl import PolicyError, check, load, resolve
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_policy import ClassOp
from kvcompile.dsl.dialect_reads import OffOp, ReadersOp
from kvcompile.dsl.dialect_sets import AttendOp, PickOp, RegionOp, TopOp
from kvcompile.dsl.dialect_sources import LearnedOp, QueriesOp, RegroupOp
from kvcompile.dsl.lower import lower
from kvcompile.dsl.module import from_text, ops_of, to_text

PAGE = "unit page(16) with c = mean[i] k"
BY_PAGE = "top(4) pages by dot(q, c)"


def clauses(*lines: str) -> str:
    return "policy mine():\n" + "".join(f"    {line}\n" for line in lines)


def ops(*lines: str) -> list[object]:
    """The operations of a policy, which survive their text."""
    module = lower(resolve(load(clauses(*lines)))).module
    assert to_text(from_text(to_text(module))) == to_text(module)
    return list(ops_of(module))


def attends(*lines: str) -> list[tuple[str, list[str]]]:
    """Readers and triggers of every set that is read."""
    found = (op for op in ops(*lines) if isinstance(op, AttendOp))
    return [(op.of.root_reference.data.removeprefix("reads "), [t.kind.data for t in op.triggers]) for op in found]


def tops(*lines: str) -> list[TopOp]:
    return [op for op in ops(*lines) if isinstance(op, TopOp)]


# ---------------------------------------------------------------- rows and times


def test_a_prefix_overrides_what_is_read_without_one() -> None:
    found = ops("layers 0, 1: attend all", "layers 2: attend recent(8)", "attend recent(4)", "at step")
    readers = [op for op in found if isinstance(op, ReadersOp)]
    assert [op.sym_name.data for op in readers] == ["reads layers 0, 1", "reads layers 2", "reads rest"]
    assert [op.ranges() for op in readers] == [((0, 0), (1, 1)), ((2, 2),), None]
    assert [op.of.root_reference.data for op in found if isinstance(op, AttendOp)] == ["reads layers 2", "reads rest"]


def test_reads_leave_the_classes_of_what_is_kept_alone() -> None:
    found = ops("far: attend recent(8)", "layers 0: keep recent(64)", "at step")
    assert [op.sym_name.data for op in found if isinstance(op, ClassOp)] == ["layers 0", "rest"]
    assert [op.heads.data for op in found if isinstance(op, ReadersOp) and op.heads] == ["far"]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["attend all"], []),
        (["attend all", "at step"], []),
        (["attend all | recent(4)", "at chunk, step"], []),
        (["layers 1: attend all", "keep recent(4)", "at step"], []),
        (["attend recent(4)"], [("all", [])]),
        (["attend recent(4)", "at step", "attend all", "at chunk"], [("all", ["step"])]),
        # In a step the set of the prompt would go on.
        (["attend recent(4)", "at chunk", "attend all", "at step"], [("all", ["chunk"]), ("all", ["step"])]),
        (["attend recent(4)", "at prefill.end", "attend sink(4)", "at every(4) if len > 8"],
         [("all", ["prefill.end"]), ("all", ["every"])]),
    ],
)  # fmt: skip
def test_a_set_of_all_is_no_operation_unless_steps_would_go_on_with_another(
    lines: list[str], found: list[tuple[str, list[str]]]
) -> None:
    assert attends(*lines) == found


def test_a_pick_belongs_to_those_who_name_it() -> None:
    found = ops("layers 2: pick t = top(4) by logit per query_head", "layers 3..last: attend t",
                "layers 0: pick s = top(4) by norm(k)", "layers 1: keep s | recent(2)", "at step")  # fmt: skip
    picks = {op.label.data: op.of.root_reference.data for op in found if isinstance(op, PickOp)}
    assert picks == {"t": "reads layers 2", "s": "layers 0"}


def test_layers_that_are_off() -> None:
    (op,) = (op for op in ops("layers 1, last-2..last: off") if isinstance(op, OffOp))
    assert op.ranges() == ((1, 1), (-3, -1))


# ---------------------------------------------------------------- scores


def sources(top: TopOp) -> set[str]:
    from kvcompile.dsl.lower_heads import below

    return {op.source.data for op in below(top.score) if isinstance(op, kv.SourcedOp)}


@pytest.mark.parametrize(
    ("score", "asked", "axes"),
    [
        ("top(4) by logit per query_head", {"own"}, "gi"),
        ("top(4) by attn", {"own"}, "i"),
        ("top(4) by mean[g] logit per query_head", {"own"}, "i"),
        ("top(4) by sum[q] attn", {"forward"}, "i"),
        ("top(4) by sum[q in last(8)] attn per query_head", {"last"}, "gi"),
        ("cover(50%) by sum[q in sample(5%)] attn", {"sample"}, "i"),
        (f"{BY_PAGE} per query_head", {"own"}, "gu"),
        ("cover(90%) pages by softmax[u] dot(q, c)", {"own"}, "u"),
        ("where dot(q, c) > 0", {"own"}, "u"),
        ("where attn > 0.01", {"own"}, "i"),
        ("top(4) pages by max[i] logit", {"own"}, "u"),
        ("top(4) by norm(k)", set(), "i"),
    ],
)
def test_a_query_that_is_left_open_is_the_one_that_reads(score: str, asked: set[str], axes: str) -> None:
    (top,) = tops(PAGE, f"attend recent(2) | {score}", "at chunk, step")
    assert (sources(top), kv.axes_of(top.score)) == (asked, axes)


def test_a_condition_about_units_takes_whole_ones() -> None:
    (top,) = tops(PAGE, "attend own page | where dot(q, c) > 0", "at chunk")
    assert top.whole is not None and (top.rank.data, top.whole.data) == ("where", "page")


def test_scores_of_units_that_overlap_choose_others() -> None:
    (top,) = tops("unit kernel(32, stride=16) with c = mean[i] k", "unit block(64)",
                  "attend top(4) blocks by sum[g] softmax[u] dot(q, c)", "at chunk, step")  # fmt: skip
    assert isinstance(top.score.owner, RegroupOp)
    assert (top.score.owner.unit.data, top.score.owner.into.data) == ("kernel", "block")
    assert isinstance(top.score.owner.arg.owner, kv.ReduceOp)  # over queries, after the softmax over kernels


def test_a_trained_score_of_units_goes_by_the_name_of_its_score() -> None:
    lines = ["score gate = learned(\"g.safetensors\", q, c)", "score s = softmax[u] gate"]  # fmt: skip
    found = ops(PAGE, *lines, "attend own page | top(4) pages by s per query_head", "at chunk")
    (learned,) = (op for op in found if isinstance(op, LearnedOp))
    assert (learned.label.data, learned.file.data, kv.axes_of(learned.res)) == ("gate", "g.safetensors", "gu")
    assert isinstance(learned.args[0].owner, QueriesOp)


def test_regions_of_the_reading_query() -> None:
    found = ops(PAGE, 'attend own page | pow2 page | span("question")')
    regions = [op for op in found if isinstance(op, RegionOp) and op.kind.data != "all"]
    assert [(op.kind.data, (op.unit or op.span).data) for op in regions] == [  # type: ignore[union-attr]
        ("own", "page"), ("pow2", "page"), ("span", "question"),
    ]  # fmt: skip


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        (["attend top(4) by logit"], "K903", "top(4) by logit"),
        ([PAGE, f"attend {BY_PAGE}", "at filled(page, 2)"], "K903", "filled(page, 2)"),
        ([PAGE, f"attend {BY_PAGE}", "at full(64)"], "K903", "full(64)"),
        ([PAGE, f"attend {BY_PAGE} shared layers(2)", "at step"], "K904", "shared layers(2)"),
        ([PAGE, f"attend {BY_PAGE} across layers", "at step"], "K904", "across layers"),
        (["share b = 8 by pyramid(2)", "attend top(b) by logit", "at step"], "K914", "b"),
        (["attend recent(now / 4)", "at chunk"], "K905", "now"),
        (["attend recent(20% of len)"], "K905", "20% of len"),
        (["attend top(4) by logit * len", "at chunk"], "K905", "len"),
        (["attend top(4) by sum[q in peek(4)] attn", "at chunk(8)"], "K905", "q in peek(4)"),
        (["attend top(4) by logit * sum[q in last(4)] attn", "at step"], "K905",
         "logit * sum[q in last(4)] attn"),
        (["attend top(4) by logit | top(2) by sum[q in last(4)] attn", "at chunk, step"], "K905",
         "top(2) by sum[q in last(4)] attn"),
        ([PAGE, "attend top(4) pages by mean[i] norm(next.k)", "at step"], "K905", "next.k"),
        ([PAGE, 'attend top(4) pages by learned("f.safetensors", q, c)', "at step"], "K905",
         'learned("f.safetensors", q, c)'),
        (["unit page(16) with c = mean[i] age", "attend top(4) pages by c", "at step"], "K913", "top(4) pages by c"),
        (["unit page(16) with c = mean[i] now", "attend top(4) pages by c", "at step"], "K203", "mean[i] now"),
        (["unit page(16) with c = mean[i] norm(next.k)", "attend top(4) pages by c", "at step"], "K913",
         "top(4) pages by c"),
        (["unit page(16, stride=8) with c = mean[i] k", f"attend {BY_PAGE}", "at step"], "K913", BY_PAGE),
        (["unit page(16, stride=8)", "attend own page"], "K913", "own page"),
        (["unit page(16, stride=17)", "attend own page"], "K205", "stride=17"),
        ([PAGE, "attend top(4) by dot(q, c)", "at step"], "K203", "dot(q, c)"),
        ([PAGE, "unit lot(8) with b = mean[i] k", "attend top(4) pages by dot(q, c) + dot(q, b)", "at step"], "K913",
         "dot(q, c) + dot(q, b)"),
        ([PAGE, "unit lot(8)", "keep top(4) lots by norm(c)", "at step"], "K913", "norm(c)"),
        (["pick t = top(4) by logit per query_head", "attend t", "at chunk, step"], "K903",
         "top(4) by logit per query_head"),
        (["pick t = top(4) by logit per query_head", "attend t", "at when now > 4"], "K903",
         "top(4) by logit per query_head"),
        (["pick t = recent(4)", "attend t", "at step"], "K902", "recent(4)"),
        (["pick t = top(4) by norm(k)", "keep t | recent(4)", "attend t", "at step"], "K705", "t"),
        (["attend recent(4)", "at step", "attend sink(4)", "at every(4)"], "K705", "attend sink(4)"),
        (["attend recent(4)", "at prefill.end", "attend sink(4)", "at when now > 8"], "K705", "attend sink(4)"),
        (["attend top(4) by attn shared heads", "keep top(4) by norm(k)", "at step"], "K904",
         "top(4) by attn shared heads"),
        (["attend top(4) by mean[h] attn", "x: keep recent(4)", "rest: keep all", "at step"], "K904",
         "top(4) by mean[h] attn"),
        (["attend top(4) by attn shared heads | random(4, 1)", "at step"], "K904", "random(4, 1)"),
        (["attend top(4) by attn shared heads", "at when cos(q, prev.q) < 0.5"], "K903", "cos(q, prev.q) < 0.5"),
        (["off"], "K912", "off"),
        (["x: off"], "K912", "off"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_at_its_own_place(lines: list[str], code: str, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        lower(resolve(load(clauses(*lines))))
    found = [(finding.code, finding.span.text) for finding in caught.value.diagnostics]
    assert (code, text) in found
    assert all(finding.hint for finding in caught.value.diagnostics), str(caught.value)


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        ([PAGE, "attend top(4) pages", "at step"], "K201", "top(4)"),
        (["attend top(4) by dot(q, c)", "at step"], "K101", "c"),
        (["attend top(4) pages by logit", "at step"], "K110", "top(4) pages by logit"),
        (["keep sink(4) | recent(4)", "attend sink(8)", "at step"], "K206", "sink(8)"),
        (["pick t = top(4) by logit | p", "pick p = top(4) by attn | t", "attend t", "at step"], "K108", "t"),
        (["attend recent(4)", "attend sink(4)", "at step"], "K106", "attend sink(4)"),
        (['keep top(4) by learned("f.safetensors", q, k)', "at step"], "K214", 'learned("f.safetensors", q, k)'),
    ],
)
def test_what_is_wrong_about_reads_is_found_without_a_model(lines: list[str], code: str, text: str) -> None:
    try:
        found = [(d.code, d.span.text) for d in check(resolve(load(clauses(*lines))))]
    except PolicyError as error:
        found = [(d.code, d.span.text) for d in error.diagnostics]
    assert (code, text) in found


@pytest.mark.parametrize(
    ("score", "when", "cost"),
    [
        ("mean[g] attn", "chunk", "a second pass"),
        ("dot(q, k)", "chunk", "a second pass"),
        ("dot(q, k)", "step", "attention of each step"),
        ("mean[q in last(4)] dot(q, k)", "chunk", "a small extra product"),
        ("norm(k)", "chunk", "O(n d)"),
    ],
)
def test_a_choice_of_each_query_costs_what_all_of_them_cost(score: str, when: str, cost: str) -> None:
    found = check(resolve(load(clauses(PAGE, f"attend top(4) by {score}", f"at {when}"))))
    (note,) = (d for d in found if d.code == "K501")
    assert cost in note.message


def test_a_cycle_of_picks_is_printed() -> None:
    text = clauses("pick t = top(4) by logit | p", "pick p = top(4) by attn | t", "attend t", "at step")
    (cycle,) = (d for d in check(resolve(load(text))) if d.code == "K108")
    assert cycle.message == "picks are defined by each other: t -> p -> t"
