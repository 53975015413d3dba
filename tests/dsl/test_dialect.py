"""The kv dialect: every operation prints, parses back, and refuses what does not fit."""

from __future__ import annotations

from fractions import Fraction

import pytest
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.utils.exceptions import VerifyException

from kvcompile.dsl import PolicyError
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_counts import BytesOp, PartOp, ShareOp
from kvcompile.dsl.dialect_losers import LoserOp
from kvcompile.dsl.dialect_policy import (
    KV,
    ClassOp,
    HeadsOp,
    PolicyOp,
    PositionsOp,
    ScheduleOp,
    SiteOp,
    StateOp,
    UnitOp,
    UpdateOp,
)
from kvcompile.dsl.dialect_reads import OffOp, ReadersOp
from kvcompile.dsl.dialect_sets import AttendOp, KeepOp, PickOp, RegionOp, TopOp, TriggerAttr, UnionOp
from kvcompile.dsl.dialect_sources import EmaOp, LearnedOp, NoiseOp, QueriesOp, RegroupOp, SimOp
from kvcompile.dsl.module import Places, from_text, policy_of, to_text, verify
from kvcompile.dsl.source import Source

SOURCE = Source("mine.kvp", "policy mine():\n    keep sink(4) | recent(8)\n    at step\n")


class Build:
    """A policy built operation by operation."""

    def __init__(self) -> None:
        self.policy = PolicyOp("mine", "0123")
        self.module = ModuleOp([self.policy])
        self.places = Places()

    def add(self, op: Operation) -> Operation:
        self.policy.body.block.add_op(op)
        return op

    def const(self, value: int | str = 4) -> kv.ConstOp:
        op = kv.ConstOp(Fraction(value))
        self.add(op)
        return op

    def count(self) -> kv.CountOp:
        op = kv.CountOp("n", self.const().res)
        self.add(op)
        return op

    def score(self) -> kv.ReadOp:
        self.add(StateOp("acc", self.const(0).res, None))
        op = kv.ReadOp("acc")
        self.add(op)
        return op


def everything() -> ModuleOp:
    """A module with every operation, and every optional part there and absent."""
    b = Build()
    attn = kv.EvidenceOp("attn", ("last", 64, Fraction(0)))
    over_q = kv.ReduceOp("sum", "q", attn.res)
    over_g = kv.ReduceOp("mean", "g", over_q.res)
    pooled = kv.PoolOp("max", 7, over_g.res)
    sampled = kv.EvidenceOp("attn", ("sample", 0, Fraction(1, 20)))
    for op in (attn, over_q, over_g, pooled, sampled, kv.EvidenceOp("logit"), NoiseOp(7)):
        b.add(op)
    b.add(kv.EvidenceOp("attn", ("peek", 3, Fraction(0)), per_unit=True))
    four, prompt = b.const(), kv.ScalarOp("prompt")
    tenth = b.const("1/10")
    share_of = kv.BinaryOp("*", tenth.res, prompt.res)
    first = kv.CountOp("first", four.res)
    for op in (prompt, share_of, first):
        b.add(op)
    parts = [part(b, op) for op in _shares(four.res, share_of.res, first.res, over_g.res)]
    shared = kv.CountOp("b", parts[0].res)
    size_of_row = BytesOp(4096)
    for op in (shared, size_of_row, kv.CountOp("2MB", size_of_row.res)):
        b.add(op)
    key, ahead = kv.FieldOp("k"), kv.FieldOp("next.k")
    low = kv.ReduceOp("min", "i", ahead.res)
    for op in (key, ahead, low, UnitOp("lot", 4, 2, [("low", low.res)]), UnitOp("bare", 16, 0, [])):
        b.add(op)
    mark = kv.LandmarkOp("lot", "low", "ud")
    gap = kv.BinaryOp("-", key.res, mark.res)
    size = kv.UnaryOp("norm", gap.res)
    close = kv.PairOp("cos", key.res, mark.res)
    query = QueriesOp(("last", 1, Fraction(0)))
    learned = LearnedOp("cis", "heads.safetensors", [query.res, key.res])
    for op in (mark, gap, size, close, query, learned):
        b.add(op)
    for op in (StateOp("acc", four.res, over_g.res), StateOp("still", four.res, None), kv.ReadOp("acc")):
        b.add(op)
    b.add(UpdateOp("attend", [("still", over_g.res), ("acc", four.res)], where=over_g.res))
    b.add(UpdateOp("insert", [("still", learned.res)]))
    regions = [
        RegionOp("all"),
        RegionOp("sink", first.res),
        RegionOp("newest", unit="lot"),
        RegionOp("random", first.res, seed=3),
        RegionOp("picked", pick="t"),
    ]
    of_units = kv.FieldOp("k", per_unit=True)
    lengths = kv.UnaryOp("norm", of_units.res)
    mean = kv.ReduceOp("mean", "i", lengths.res)
    for op in (of_units, lengths, mean):
        b.add(op)
    tops = [
        TopOp("top", pooled.res, shared.res, "across", Fraction(1, 5)),
        TopOp("bottom", size.res, Fraction(3, 10), unit="lot", observed=9),
        TopOp("cover", over_g.res, Fraction(19, 20), layers="across"),
        TopOp("where", over_g.res, None),
        TopOp("top", over_q.res, first.res, "query_head"),
        TopOp("top", mean.res, first.res, "shared", whole="lot", layers="shared", sharing=8),
    ]
    for op in (*regions, *tops):
        b.add(op)
    union = UnionOp([op.res for op in (*regions, *tops)])
    b.add(union)
    b.add(HeadsOp("far", "table", "masks.tsv", Fraction(3, 10)))
    b.add(HeadsOp("far", "probe", "echo", Fraction(1, 100), 500))
    b.add(HeadsOp("near", "rest"))
    b.add(ClassOp("far", "far", None))
    b.add(ClassOp("layers 0, last", None, [(0, 0), (-1, -1)]))
    b.add(ClassOp("all", None, None))
    likeness, again = SimOp(), SimOp()
    usual = kv.ReduceOp("mean", "i", again.res)
    before = EmaOp(0, Fraction(1, 2), usual.res)
    alike = kv.BinaryOp(">=", likeness.res, before.res)
    losers = [
        LoserOp("merge", "cos", "k", when=alike.res, weight=likeness.res),
        LoserOp("merge", "distance"),
        LoserOp("fold", "mean"),
        LoserOp("fold", "dct", part=Fraction(1, 2)),
        LoserOp("drop"),
    ]
    for op in (likeness, again, usual, before, alike, *losers):
        b.add(op)
    late = kv.BinaryOp(">", prompt.res, four.res)
    b.add(late)
    keep = KeepOp(
        "all",
        union.res,
        [TriggerAttr("chunk", 512), TriggerAttr("filled", 2, "lot"), TriggerAttr("every", 4, cond=0)],
        [late.res],
        [loser.res for loser in losers],
    )
    keep.location = b.places.location(SOURCE.span(19, 43))
    b.add(keep)
    b.add(KeepOp("all", union.res, [TriggerAttr("step")]))
    b.add(PickOp("t", "all", union.res, [TriggerAttr("when", cond=0)], [late.res]))
    _reads(b, first.res, late.res)
    b.add(SiteOp(0, ["all", "layers 0, last"]))
    b.add(SiteOp(1, ["all", "all"], [None, "reads far"]))
    b.add(SiteOp(2, []))
    b.add(PositionsOp("compact"))
    b.add(ScheduleOp(512, 3, 64, 16))
    return b.module


def _reads(b: Build, count: SSAValue, cond: SSAValue) -> None:
    """What is read of some rows, and what nobody reads."""
    key = kv.FieldOp("k", per_unit=True)
    middle = kv.ReduceOp("mean", "i", key.res)
    mark, query = kv.LandmarkOp("kernel", "middle", "ud"), QueriesOp(kv.OWN)
    logit = kv.PairOp("dot", query.res, mark.res)
    each = kv.ReduceOp("sum", "q", logit.res)
    ours = RegroupOp("kernel", "bare", each.res)
    gate = LearnedOp("gate", "gates.safetensors", [query.res, mark.res])
    mean = kv.ReduceOp("mean", "g", gate.res)
    terms = [
        RegionOp("own", unit="bare"),
        RegionOp("pow2", unit="bare"),
        RegionOp("span", span="question"),
        TopOp("top", ours.res, count, "query_head", whole="bare"),
        TopOp("where", mean.res, None, whole="bare"),
    ]
    for op in (key, middle, UnitOp("kernel", 8, 0, [("middle", middle.res)], 4), mark, query, logit, each, ours):
        b.add(op)
    for op in (gate, mean, *terms):
        b.add(op)
    union = UnionOp([op.res for op in terms])
    for op in (union, ReadersOp("reads far", "far", [(1, -1)]), ReadersOp("reads all", None, None)):
        b.add(op)
    b.add(AttendOp("reads far", union.res, [TriggerAttr("chunk"), TriggerAttr("step", cond=0)], [cond]))
    b.add(AttendOp("reads all", union.res, []))
    b.add(PickOp("read", "reads far", union.res, [TriggerAttr("step")]))
    b.add(OffOp([(2, 2)]))


def _shares(four: SSAValue, total: SSAValue, count: SSAValue, score: SSAValue) -> list[ShareOp]:
    weights = [Fraction(1), Fraction(1, 3)]
    return [
        ShareOp("b", total, "pyramid", beta=Fraction(20), reserve=[count], sharing=2),
        ShareOp("c", total, "softmax", score=four),
        ShareOp("d", total, "cover", score=score),
        ShareOp("e", total, "table", table="layers.txt", weights=weights),
    ]


def part(b: Build, share: ShareOp) -> PartOp:
    b.add(share)
    op = PartOp(share.res)
    b.add(op)
    return op


def test_every_operation_survives_the_text() -> None:
    module = everything()
    verify(module, Places())
    text = to_text(module)
    again = from_text(text)
    verify(again, Places())
    assert again.is_structurally_equivalent(module)
    assert to_text(again) == text
    assert 'loc("mine.kvp":2:5)' in text
    assert {op.name for op in KV.operations} <= {op.name for op in module.walk()}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"mean" over "g"', '"mean" over "d"', "no axis 'd' in 'gi'"),
        ('kv.reduce "sum" over "q"', 'kv.reduce "product" over "q"', "unknown reduction"),
        ('"forward" 0 : !kv.expr<"gqi">', '"forward" 0 : !kv.expr<"gi">', "its operands give 'gqi'"),
        ('-> !kv.expr<"gi">', '-> !kv.expr<"gqi">', "previously used or defined with type"),
        ('kv.pool "max" 7', 'kv.pool "max" 6', "not odd"),
        ('kv.scalar "prompt"', 'kv.scalar "weather"', "unknown run-time number"),
        ('kv.const "1/10"', 'kv.const "a tenth"', "not an exact number"),
        ('kv.field "k"', 'kv.field "knee"', "unknown field"),
        ('over "forward" 0', 'over "forward" 3', "'forward', 'sample', 'own' take 0"),
        ('over "own" 0', 'over "own" 1', "'own' take 0"),
        ('over "peek" 3', 'over "peek" 0', "others 1 or more"),
        ('kv.region "own" of "bare"', 'kv.region "own"', "own needs unit"),
        (' span "question"', "", "span needs name of a span"),
        ("size 8 stride 4", "size 8 stride 9", "begin every 1 to 8 positions"),
        ('kv.regroup "kernel"', 'kv.regroup "lost"', "undeclared unit 'lost'"),
        ('@"reads far" at', '@"reads lost" at', "undeclared readers 'reads lost'"),
        ('kv.site 1 [@all, @all] reads [unit, @"reads far"]', 'kv.site 1 [@all, @all] reads [unit, @lost]',
         "undeclared readers lost"),
        ('reads [unit, @"reads far"]', "reads [unit]", "1 readers for 2 heads"),
        ('kv.readers @"reads all"', 'kv.readers @"reads far"', "a class is there twice"),
        ("kv.off layers [2, 2]", "kv.off layers [2]", "pairs of first and last"),
        ("kv.off layers [2, 2]", "kv.off", "layers that are off are named"),
        ('at [#kv.trigger<"chunk", 0, "">, #kv.trigger<"step", 0, "", 0>]',
         'at [#kv.trigger<"full", 4, "">, #kv.trigger<"step", 0, "", 0>]', "full is about what is kept"),
        ('by "pyramid" beta "20"', 'by "pyramid" beta "1/2"', "at least 1"),
        ('by "pyramid" beta "20"', 'by "pyramid"', "has a number of at least 1"),
        ('by "softmax" of', 'by "cover" of', "measures axes 'i', found ''"),
        ('table "layers.txt" weights', "weights", "weights come from a table"),
        ('weights ["1", "1/3"]', 'weights ["1", "-1/3"]', "not negative"),
        ("sharing 2", "sharing 1", "2 or more"),
        ('part "1/20"', "", "a sample is a part"),
        ("kv.bytes 4096", "kv.bytes -1", "not negative"),
        ('kv.ema 0 "1/2"', 'kv.ema 0 "3/2"', "beta between 0 and 1"),
        ('kv.update "attend"', 'kv.update "sleep"', "unknown event"),
        ('["still", "acc"]', '["still"]', "1 states for 2 values"),
        ('["still", "acc"]', '["lost", "acc"]', "undeclared states lost"),
        ('kv.region "picked" pick "t"', 'kv.region "picked"', "picked needs pick"),
        ('kv.region "picked" pick "t"', 'kv.region "picked" pick "u"', "undeclared pick 'u'"),
        ('kv.top "cover" by', 'kv.top "where" by', "takes all that it holds for"),
        ('scope "query_head" :', 'scope "head" :', "one score per competitor (axes 'i' or 'ui'), found 'gi'"),
        ('whole "lot"', 'whole "lost"', "undeclared unit 'lost'"),
        ('layers "shared" sharing 8', 'layers "across" sharing 8', "no others, have a number"),
        ('kv.loser "merge" by "cos" of "k"', 'kv.loser "merge" by "cos"', "merge cos of ''"),
        ('kv.loser "fold" by "mean"', 'kv.loser "fold" by "median"', "unknown way to fold"),
        ('by "dct" part "1/2"', 'by "dct"', "leave a part"),
        ('"every", 4, "", 0>', '"every", 4, "">', "triggers name 0 conditions of 1"),
        ('"when", 0, "", 0>', '"when", 0, "">', "when needs a condition"),
        ('"echo" top "1/100"', '"louder" top "1/100"', "unknown probe"),
        ('"echo" top "1/100"', '"echo"', "a probe has a part of the heads"),
        ('kv.positions "compact"', 'kv.positions "odd"', "unknown positions"),
        ('kv.region "all"', 'kv.region "sink"', "sink needs number of entries"),
        ('kv.region "newest" of "lot"', 'kv.region "newest" of "lost"', "undeclared unit 'lost'"),
        (' seed 3', "", "random needs seed"),
        ('fraction "3/10"', 'fraction "13/10"', "not between 0 and 1"),
        ('scope "across" floor', 'scope "head" floor', "floor is a fraction"),
        ('kv.read "acc"', 'kv.read "lost"', "undeclared state 'lost'"),
        ('kv.landmark "lot" "low"', 'kv.landmark "lot" "high"', "no landmark 'high'"),
        ("for @all at", "for @lost at", "undeclared class 'lost'"),
        ("kv.site 0 [@all", "kv.site 0 [@lost", "undeclared classes lost"),
        ('"filled", 2', '"filled", 0', "needs a positive number"),
        ("page 16", "page 12", "not a power of two"),
        ('kv.class @far heads "far"', "kv.class @all", "a class is there twice"),
        ('"table" "masks.tsv"', '"oracle" "masks.tsv"', "unknown head source"),
        ("size 4 from 2", "size 0 from 2", "positive size"),
    ],
)  # fmt: skip
def test_verifiers_refuse(old: str, new: str, reason: str) -> None:
    text = to_text(everything())
    assert text.count(old) >= 1
    with pytest.raises(PolicyError) as caught:
        verify(from_text(text.replace(old, new, 1)), Places())
    assert reason in str(caught.value)


def test_axes_of_a_type_are_ordered_letters() -> None:
    with pytest.raises(VerifyException, match="in this order"):
        kv.ExprType("ig")


def test_a_verifier_failure_points_into_the_policy() -> None:
    b = Build()
    union = UnionOp([])
    b.add(union)
    keep = KeepOp("nobody", union.res, [])
    b.add(keep)
    b.policy.location = b.places.location(SOURCE.span(0, 13))
    with pytest.raises(PolicyError) as caught:
        verify(b.module, b.places)
    finding = caught.value.diagnostics[0]
    assert (finding.line, finding.column) == (1, 1)
    assert "policy mine()" in str(caught.value)


def test_a_place_of_a_parsed_module_is_found_again() -> None:
    b = Build()
    op = b.const()
    op.location = b.places.location(SOURCE.span(19, 43))
    again = from_text(to_text(b.module))
    parsed = next(iter(policy_of(again).body.block.ops))
    assert b.places.span(parsed).text == "keep sink(4) | recent(8)"
    assert str(Places({"mine.kvp": SOURCE}).span(parsed)) == "mine.kvp:2:5"
    assert Places().span(parsed).source.name == "mine.kvp:2:5"


@pytest.mark.parametrize(
    "text", ["builtin.module { kv.nothing }", "builtin.module {", "", 'kv.const "1" : !kv.expr<"">']
)
def test_broken_text_is_a_policy_error(text: str) -> None:
    with pytest.raises((PolicyError, ValueError)):
        policy_of(from_text(text))
