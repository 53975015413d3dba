"""Sets of a policy as kv operations.

Takes the terms of a `keep`, `attend` or `pick`; gives one SSA value of type `!kv.set`. Guarantees: every region,
selection and scope that this version cannot run is refused at its span.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NoReturn

from xdsl.ir import SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.axes import unit_of
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_sets import COUNTED, OF_QUERY, RegionOp, TopOp, UnionOp
from kvcompile.dsl.dialect_sources import RegroupOp
from kvcompile.dsl.lower_counts import lower_count
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.lower_numbers import constant, fraction, refuse, whole
from kvcompile.dsl.words import UNIT_REGIONS

_PLAIN = ("all", "prompt", "generated", "frozen")


@dataclass(frozen=True, slots=True)
class Names:
    """Units and picks that the terms of a set may name; of the units, those that overlap."""

    units: frozenset[str]
    picks: frozenset[str]
    overlapping: frozenset[str] = frozenset()


def lower_set(builder: Builder, node: ast.SetUnion, scope: Scope, names: Names) -> UnionOp:
    """The union of a set's terms, in the order written."""
    terms = [_term(builder, term, scope, names) for term in node.terms]
    return builder.add(UnionOp(terms), node.span)


def _term(builder: Builder, term: ast.Term, scope: Scope, names: Names) -> SSAValue:
    match term:
        case ast.Region():
            return _region(builder, term, scope, names)
        case ast.Selection():
            return _Choice(builder, term, scope, names).lower()
        case ast.Ref() if term.name in names.picks:
            return builder.add(RegionOp("picked", pick=term.name), term.span).res
        case ast.Ref():
            return refuse("K902", f"the set `{term.name}`", term.span, f"name it by `pick {term.name} = ...`")
        case ast.Where():
            score = builder.score(term.cond, replace(scope, decides=True))
            if _observed(score):
                _refuse_peek(term)
            if kv.axes_of(score) == "u" and scope.reads:
                unit = _unit_behind(score, term, names)
                return builder.add(TopOp("where", score, None, whole=unit), term.span).res
            if "u" in kv.axes_of(score):
                refuse("K913", "a condition about units", term.span, "compare numbers of entries")
            return builder.add(TopOp("where", score, None), term.span).res


def _unit_behind(score: SSAValue, term: ast.Where, names: Names) -> str:
    """The unit that a condition is about."""
    found = _landmark_units(score)
    if len(found) != 1:
        refuse("K913", f"a condition about {' and '.join(sorted(found)) or 'no'} units", term.span,
               "compare landmarks of one unit")  # fmt: skip
    return unit_name(found.pop(), term, names)


def _landmark_units(score: SSAValue) -> set[str]:
    return {op.unit.data for op in below(score) if isinstance(op, kv.LandmarkOp)}


def _refuse_peek(term: ast.Term) -> NoReturn:
    refuse("K901", "`peek`, whose newest entries count within n, in a selection of another kind,", term.span,
           "choose entries by top(n)")  # fmt: skip


def _region(builder: Builder, term: ast.Region, scope: Scope, names: Names) -> SSAValue:
    kind, args = term.kind, term.args
    if kind in _PLAIN and not args and not term.named:
        return builder.add(RegionOp(kind), term.span).res
    if kind in OF_QUERY and not scope.reads:
        refuse("K902", f"the region `{term.span.text or kind}` of the query that reads, where nobody reads,", term.span,
               "name it in `attend`; here such as `newest UNIT` or `recent(n)`")  # fmt: skip
    if kind in UNIT_REGIONS and term.unit is not None:
        return builder.add(RegionOp(kind, unit=unit_name(term.unit, term, names)), term.span).res
    if kind == "span" and len(args) == 1 and isinstance(args[0], ast.Text) and not term.named:
        return builder.add(RegionOp("span", span=args[0].value), term.span).res
    if kind in COUNTED and len(args) == (2 if kind == "random" else 1) and not term.named:
        if kind == "stride":
            whole(args[0], 1)
        if isinstance(args[0], ast.Number) and args[0].kind == "percent":
            raise fail("K210", f"`{args[0].span.text}` does not say of what", args[0].span, "such as `10% of prompt`")
        seed = whole(args[1], 0) if kind == "random" else None
        return builder.add(RegionOp(kind, lower_count(builder, args[0], scope), seed=seed), term.span).res
    return refuse("K902", f"the region `{term.span.text or kind}`", term.span,
                  "such as sink(n), recent(n), stride(n), random(n, seed), prompt, frozen or newest UNIT")  # fmt: skip


def unit_name(name: str, node: ast.Node, names: Names) -> str:
    """The unit that a word names in the singular or plural. PolicyError K110 where there is none, K913 where an entry
    may be in several of them."""
    unit = unit_of(name, names.units)
    if unit is None:
        known = ", ".join(sorted(names.units)) or "none"
        raise fail("K110", f"no unit `{name}`", node.span, f"units here: {known}")
    if unit in names.overlapping:
        refuse("K913", f"a choice among units that overlap, such as `{unit}`,", node.span,
               "choose units of another size by its landmarks: `unit block(64)`, `top(n) blocks by s`")  # fmt: skip
    return unit


@dataclass(slots=True)
class _Choice:
    """A selection: its scopes, then its score and amount."""

    builder: Builder
    term: ast.Selection
    scope: Scope
    names: Names
    competing: str = "head"
    floor: Fraction | None = None
    unit: str | None = None
    layers: str | None = None
    sharing: int = 1

    def lower(self) -> SSAValue:
        term, builder = self.term, self.builder
        whole_unit = unit_name(term.unit, term, self.names) if term.unit is not None else None
        for scope in term.scopes:
            self._scope(scope)
        self._refuse_together(whole_unit)
        group = self.competing == "query_head"
        score = builder.score(term.by, replace(self.scope, per_unit=whole_unit is not None), group)
        if whole_unit is not None or self.unit is not None:
            score = self._regrouped(score, str(whole_unit or self.unit))
        if group and "g" not in kv.axes_of(score):
            self.competing = "head"  # query heads that score alike choose alike
        if "u" in kv.axes_of(score) and self.unit is None and whole_unit is None:
            refuse("K913", "a score over units that compete together", term.span, "let entries compete `per UNIT`")
        observed = _observed(score)
        if observed and (whole_unit is not None or term.rank == "cover"):
            _refuse_peek(term)
        op = TopOp(
            term.rank, score, self._amount(), self.competing, self.floor, self.unit, observed,
            whole=whole_unit, layers=self.layers, sharing=self.sharing,
        )  # fmt: skip
        return builder.add(op, term.span).res

    def _regrouped(self, score: SSAValue, unit: str) -> SSAValue:
        """A score of other units as one of these: the largest of those that overlap with each, where queries read."""
        others = _landmark_units(score) - {unit}
        if not others:
            return score
        other, place = min(others), self.term.by.span
        if len(_landmark_units(score)) > 1:
            refuse("K913", f"a score of `{unit}` by landmarks of `{' and '.join(sorted(_landmark_units(score)))}`",
                   place, "score by the landmarks of one unit")  # fmt: skip
        entries = (kv.FieldOp, kv.EvidenceOp, kv.ReadOp)
        by_entry = any(isinstance(op, entries) and "u" in kv.axes_of(op.res) for op in below(score))
        if not self.scope.reads or self.unit is not None or by_entry:
            refuse("K913", f"a score of `{unit}` by landmarks of the unit `{other}`", place,
                   f"give `{unit}` landmarks of its own: `unit {unit}(...) with c = mean[i] k`")  # fmt: skip
        return self.builder.add(RegroupOp(other, unit, score), place).res

    def _amount(self) -> SSAValue | Fraction:
        part = fraction(self.term.amount)
        if part is None and self.term.rank == "cover":
            raise fail("K210", "`cover` reaches a part of the mass", self.term.amount.span, "such as cover(95%)")
        return lower_count(self.builder, self.term.amount, self.scope) if part is None else part

    def _scope(self, scope: ast.Scope) -> None:
        match scope.kind, scope.what:
            case "per", "head":
                pass
            case "per", "query_head":
                self._compete("query_head", scope)
            case "per", what if what != "layer":
                self.unit = unit_name(what, scope, self.names)
            case "shared", "heads" if scope.size is None:
                self._compete("shared", scope)
            case "across", "heads":
                self._compete("across", scope)
                self.floor = _floor(scope)
            case "shared", "layers" if scope.size is not None and self.layers is None:
                self.sharing = whole(scope.size, 1)
                self.layers = "shared" if self.sharing > 1 else None
            case "across", "layers" if scope.floor is None and self.layers is None:
                self.layers = "across"
            case _:
                refuse("K904", f"`{scope.span.text}`", scope.span,
                       "per head, query_head or UNIT; shared heads or layers(n); across heads or layers")  # fmt: skip
        if self.scope.reads and scope.what == "layers":
            refuse("K904", f"`{scope.span.text}` of what queries read", scope.span,
                   "let one layer `pick`, and others `attend` its pick")  # fmt: skip

    def _compete(self, now: str, scope: ast.Scope) -> None:
        if self.competing not in ("head", now):
            raise fail("K208", "heads cannot share one decision and compete at once", scope.span, "name one of the two")
        self.competing = now

    def _refuse_together(self, whole_unit: str | None) -> None:
        span = self.term.span
        words = {"shared": "one decision for all heads", "across": "competing across heads",
                 "query_head": "a choice per query head"}  # fmt: skip
        if self.unit is not None and self.competing in words:
            refuse("K904", f"{words[self.competing]} and per unit at once", span, "leave out one of the two scopes")
        if self.unit is not None and whole_unit is not None:
            refuse("K904", "units that compete, per unit,", span, "leave out one of the two")
        if self.layers == "across" and (self.unit or whole_unit or self.competing == "query_head"):
            what = "query heads" if self.competing == "query_head" else "units"
            refuse("K904", f"competing {what} across layers", span, "let entries of KV heads compete across layers")


def _floor(scope: ast.Scope) -> Fraction | None:
    if scope.floor is None:
        return None
    value = constant(scope.floor)
    if value is None or not 0 <= value <= 1:
        raise fail("K210", "a floor is a fraction between 0% and 100%", scope.floor.span, "such as `floor 20%`")
    return value


def _observed(score: SSAValue) -> int:
    """The widest `q in peek(w)` below a score: in the last piece those w entries are kept (rule 21)."""
    sources = [op for op in below(score) if isinstance(op, kv.SourcedOp) and op.source.data == "peek"]
    return max((op.width.value.data for op in sources), default=0)
