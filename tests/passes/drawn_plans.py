"""Plans drawn by hypothesis, straight from the plan's dataclasses: every fact that counting must know of."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from fractions import Fraction

from hypothesis import strategies as st

from kvcompile.dsl import PolicyError
from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    Loser,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    Region,
    Selection,
    Share,
    StatePlan,
    Term,
    Trigger,
    UnitPlan,
)
from kvcompile.passes.slide import slide

FACTS = ModelFacts(4, 4, 2, 64)
ONE = Expr("const", value=Fraction(1))
NEXT = Expr("field", value="next.k")
SEEN = Expr("evidence", value=("attn", QuerySource("last", 1)))


def const(n: int | str) -> Expr:
    return Expr("const", value=Fraction(n))


def scalar(name: str) -> Expr:
    return Expr("scalar", value=name)


def apply(op: str, a: Expr, b: Expr) -> Expr:
    return Expr("binary", (a, b), op)


def share(index: int) -> Expr:
    return Expr("share", value=index)


@dataclass
class Draft:
    """A plan under way; counts are added as terms ask for them."""

    draw: st.DrawFn
    counts: list[Count] = field(default_factory=list)
    slots: int = 0
    measured: bool = False  # whether the share follows from the entries

    def slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def count(self, expr: Expr) -> int:
        if (found := Count("", expr)) not in self.counts:
            self.counts.append(found)
        return self.counts.index(found)

    def one_of(self, *values: object) -> object:
        return self.draw(st.sampled_from(values))

    def number(self, *, shares: bool) -> int:
        some = [
            const(3), const(6), apply("*", const("1/10"), scalar("prompt")), apply("/", scalar("len"), const(3)),
            apply("-", const(9), apply("/", scalar("len"), const(4))), apply("/", scalar("now"), const(5)),
            apply("max", const(2), apply("/", scalar("chunk"), const(4))),
        ]  # fmt: skip
        b = share(0)
        if shares:
            some += [
                b, b, apply("/", b, const(2)), apply("-", b, const(3)), apply("max", const(2), apply("-", b, const(4))),
                apply("min", b, const(7)), apply("-", const(9), b), apply("-", apply("min", b, const(8)), const(2)),
            ]  # fmt: skip
        return self.count(self.draw(st.sampled_from(some)))

    def region(self, *, shares: bool) -> Region:
        kind = self.one_of("sink", "recent", "recent", "prompt", "generated", "frozen", "stride", "newest", "random")
        if kind in ("sink", "recent", "random"):
            return Region(str(kind), self.number(shares=shares))
        if kind == "stride":
            return Region("stride", self.count(const(4)))
        return Region(str(kind), unit="lot" if kind == "newest" else None)

    def selection(self, *, shares: bool, wide: bool) -> Selection:
        form = self.one_of("plain", "plain", "lot", "whole", "where")
        rank = self.one_of("top", "top", "cover")
        score = self.draw(st.sampled_from([ONE, NEXT])) if form in ("lot", "whole") else ONE
        if form == "where":
            return Selection("where", score)
        amount: dict[str, object] = {"count": self.number(shares=shares)}
        if rank == "cover" or self.draw(st.booleans()):
            amount = {"fraction": Fraction(1, 3)}
        if form == "lot":
            return Selection(rank, score, scope=self.one_of("head", "query_head"), unit="lot", **amount)  # type: ignore[arg-type]
        # Layers that share decisions share parts as well, which the plans' one share does not say.
        layers = self.one_of("each", "each", *([] if self.measured else ["shared"]), *(["across"] if wide else []))
        scopes = ["head", "across"] if layers == "across" else ["head", "head", "query_head", "across"]
        observed = 4 if form == "plain" and rank == "top" and layers == "each" and self.draw(st.booleans()) else 0
        return Selection(
            rank, score, scope=self.draw(st.sampled_from(scopes)), layers=layers,  # type: ignore[arg-type]
            whole="lot" if form == "whole" else None, observed=observed, **amount,  # type: ignore[arg-type]
            sharing=2 if layers == "shared" else 1, pick=self.slot() if layers == "shared" else None,
        )  # fmt: skip

    def trigger(self, *, cond: bool, full: bool) -> Trigger:
        conditions = [None, None]
        if cond:
            conditions += [apply(">", scalar("len"), const(12)), apply(">", scalar("now"), const(20)), SEEN]  # type: ignore[list-item]
        some = [("prefill.end", None, None), ("chunk", None, None), ("step", None, None), ("every", 4, None),
                ("filled", 7, None), ("filled", 2, "lot"), ("when", None, None)]  # fmt: skip
        if full:
            some += [("full", 20, None)] * 2
        kind, n, unit = self.draw(st.sampled_from(some))
        found = self.draw(st.sampled_from(conditions))
        if kind == "when" and found is None:
            found = apply(">", scalar("now"), const(15))
        return Trigger(kind, n, unit, found)  # type: ignore[arg-type]

    def losers(self) -> tuple[Loser, ...]:
        merge = Loser("merge", "cos", "k")
        some = [
            (), (merge,), (Loser("fold", "mean"),), (Loser("fold", "dct", part=Fraction(2, 5)),),
            (Loser("fold", "pool", part=Fraction(1, 3)),), (replace(merge, when=ONE), Loser("fold", "mean")),
            (replace(merge, when=ONE), Loser("drop")),
        ]  # fmt: skip
        return self.draw(st.sampled_from(some))

    def share(self) -> Share | None:
        by = self.one_of(None, None, "pyramid", "table", "softmax", "cover")
        weights = (Fraction(1), Fraction(0), Fraction(5), Fraction(2))
        return None if by is None else Share("b", const(6), by, Fraction(4), ONE, weights)  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn) -> PolicyPlan:
    """Plans of four layers with two KV heads of two query heads each."""
    draft = Draft(draw)
    part = draft.share()
    draft.measured = part is not None and part.measured
    pieces = draw(st.sampled_from([None, None, 9]))
    rules = draw(st.sampled_from([1, 1, 1, 2]))
    wide = rules == 1 and draw(st.booleans())
    classes = []
    for rule in range(rules):
        regions = draw(st.lists(st.builds(lambda: None), max_size=2))
        terms: list[Term] = [draft.region(shares=part is not None) for _ in regions]
        terms += [
            draft.selection(shares=part is not None, wide=wide) for _ in range(draw(st.sampled_from([0, 1, 1, 2])))
        ]
        pooled = any(isinstance(t, Selection) and "across" in (t.scope, t.layers) for t in terms)
        shared = any(isinstance(t, Selection) and t.layers == "shared" for t in terms)
        measured = part is not None and part.measured
        cond = not pooled and not measured and not shared
        triggers = tuple(draft.trigger(cond=cond, full=part is None) for _ in range(draw(st.sampled_from([1, 1, 2]))))
        classes.append(
            ClassPlan(f"c{rule}", tuple(terms), triggers, losers=draft.losers(), rows_of=0 if rule else None)
        )
    owners: tuple[tuple[int, ...], ...] = ((0, 0),) * 4
    form = draw(st.sampled_from(["one", "one", "heads", "picks"]))
    if form == "heads" and not any(t.layers == "shared" for cls in classes for t in cls.selections):
        # Some heads keep all.
        other = len(classes)
        classes.append(ClassPlan("rest", (Region("all"),), ()))
        owners = ((0, other), (0, 0), (other, other), (0, other))
    elif form == "picks" and part is None:
        # The first layer picks by itself; the others keep what it picked, too, where nothing waits for the last one.
        slot, first = draft.slot(), len(classes)
        choice = replace(Selection("top", ONE, draft.number(shares=False)), pick=slot)
        picking = ClassPlan("pick", (choice,), (draft.trigger(cond=False, full=False),), rows_of=first, only_picks=True)
        classes += [ClassPlan("first", (Region("all"),), ()), picking]
        spans = any(t.layers == "across" for t in classes[0].selections)
        if not spans:
            classes[0] = replace(classes[0], keep=(Region("picked", pick=slot), *classes[0].keep))
        owners = ((first, first), (0, 0), (0, 0), (0, 0))
    windows = draw(st.sampled_from([(), (), (12,) * 4, (0, 24, 0, 24), (5, 24, 24, 24)]))
    found = PolicyPlan(
        "drawn", "0", FACTS, tuple(classes), owners, tuple(draft.counts), (part,) if part else (),
        (StatePlan("@count", ONE, None),), (), (UnitPlan("lot", 5, 3),), chunk=pieces, picks=draft.slots,
    )  # fmt: skip
    with contextlib.suppress(PolicyError):  # where layers of different windows would decide together
        return slide(replace(found, facts=replace(FACTS, windows=windows)))
    return found
