"""From a resolved policy to its kv module.

Takes `Resolved`; gives a module with one `kv.policy` and the places behind its locations. Guarantees: a clause
that this version cannot run is refused with its own K9 code and span, never ignored; equal expressions are one
value; the module verifies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.transforms.common_subexpression_elimination import cse

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError, fail
from kvcompile.dsl.dialect_policy import ClassOp, HeadsOp, PolicyOp, StateOp, UnitOp
from kvcompile.dsl.dialect_sets import KeepOp, RegionOp, TopOp, UnionOp
from kvcompile.dsl.lower_expr import Builder, Scope, constant, reads, refuse, whole
from kvcompile.dsl.lower_heads import decides_for_all, parts_heads, reads_all_heads
from kvcompile.dsl.lower_sets import lower_set, lower_triggers
from kvcompile.dsl.module import Places, verify
from kvcompile.dsl.resolve import Placed, Resolved

_LAYER_LIMIT = 100_000  # no model has more layers; keeps integers of the IR small


@dataclass(frozen=True, slots=True)
class Lowered:
    """A kv module and where its operations come from."""

    module: ModuleOp
    places: Places


def lower(resolved: Resolved) -> Lowered:
    """Lower a policy. PolicyError with every clause that cannot be lowered."""
    policy = PolicyOp(resolved.name, resolved.digest)
    module = ModuleOp([policy])
    places = Places()
    policy.location = places.location(resolved.header.header)
    _Lowering(resolved, Builder(policy.body.block, places)).run()
    cse(module)
    verify(module, places)
    return Lowered(module, places)


class _Lowering:
    """One run over the clauses; findings of all clauses are collected and raised together."""

    def __init__(self, resolved: Resolved, builder: Builder) -> None:
        self.resolved = resolved
        self.builder = builder
        self.findings: list[Diagnostic] = []
        self.units: dict[str, dict[str, str]] = {}  # unit -> landmark -> axes
        self.states: list[str] = []
        self.over_heads: list[ast.Update] = []  # updates with a reduction over all heads of a layer
        self.apart = False  # some selection lets the heads of a layer keep different entries

    def run(self) -> None:
        self.attempt(self.refuse_others)
        for unit in self.resolved.of(ast.Unit):
            self.attempt(partial(self.unit, unit))
        clauses = [placed.clause for placed in self.resolved.of(ast.State)]
        self.states = [clause.assigns[0].name for clause in clauses if isinstance(clause, ast.State)]
        self.attempt(self.state_clauses)
        for head in self.resolved.heads:
            self.attempt(partial(self.heads, head.decl))
        self.keeps()
        self.attempt(self.refuse_updates_over_heads)
        if self.findings:
            raise PolicyError(*self.findings)

    def attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except PolicyError as error:
            self.findings += error.diagnostics

    # ------------------------------------------------------------ what is not lowered

    def refuse_others(self) -> None:
        found: list[Diagnostic] = []
        for placed in self.resolved.clauses:
            try:
                _refuse_clause(placed.clause)
            except PolicyError as error:
                found += error.diagnostics
        if found:
            raise PolicyError(*found)

    # ------------------------------------------------------------ declarations

    def unit(self, placed: Placed) -> None:
        node = placed.clause
        assert isinstance(node, ast.Unit)
        if len(node.args) != 1 or node.named or constant(node.args[0]) is None:
            refuse("K913", f"the unit `{node.name}`, which is not of one fixed size,", node.span)
        if node.name in self.units:
            raise fail("K106", f"the unit `{node.name}` is declared twice", node.name_span, "name them differently")
        size = whole(node.args[0], Scope(), 1)
        offset = whole(node.offset, Scope(), 0) if node.offset is not None else 0
        known = self.units[node.name] = {}
        values: list[tuple[str, SSAValue]] = []
        for assign in node.landmarks:
            scope = replace(self.scope(placed), per_unit=True)
            value = self.builder.over_group(self.builder.expr(assign.value, scope), assign.span)
            if kv.axes_of(value) not in ("u", "ud"):
                refuse("K913", f"the landmark `{assign.name}` over axes `{kv.axes_of(value)}`", assign.span,
                       "reduce the tokens of the unit, such as `min[i] k`")  # fmt: skip
            known[assign.name] = kv.axes_of(value)
            values.append((assign.name, value))
        self.builder.add(UnitOp(node.name, size, offset, values), node.span)

    def state_clauses(self) -> None:
        updates: dict[str, ast.Update] = {}
        for placed in self.resolved.of(ast.On):
            assert isinstance(placed.clause, ast.On)
            _refuse_on(placed.clause)
            for update in placed.clause.updates:
                if update.name in updates:
                    refuse("K906", f"a second update of `{update.name}`", update.span)
                updates[update.name] = update
        for placed in self.resolved.of(ast.State):
            assert isinstance(placed.clause, ast.State)
            assign = placed.clause.assigns[0]
            init = self.initial(assign)
            change = updates.get(assign.name)
            add = None
            if change is not None:
                _refuse_update(change.value, self.scope(placed))
                add = self.builder.score(change.value, replace(self.scope(placed), states=frozenset()))
                if reads_all_heads(add, self.ops):
                    self.over_heads.append(change)
            self.builder.add(StateOp(assign.name, init, add), assign.span)

    def initial(self, assign: ast.Assign) -> SSAValue:
        value = constant(assign.value)
        if value is not None:
            return self.builder.add(kv.ConstOp(value), assign.value.span).res
        if isinstance(assign.value, ast.Name) and assign.value.id in ("now", "pos"):  # a new entry is the newest
            return self.builder.add(kv.FieldOp("pos"), assign.value.span).res
        return refuse("K906", f"the first value of `{assign.name}`", assign.value.span, "start from a number or `now`")

    def heads(self, decl: ast.HeadsDecl) -> None:
        for source in decl.sources:
            match source:
                case ast.HeadsRest():
                    op = HeadsOp(decl.name, "rest")
                case ast.HeadsSame():
                    op = HeadsOp(decl.name, "same", source.name)
                case ast.Call(fn="table", args=(ast.Text() as path,)):
                    top = source.get("top")
                    part = constant(top) if top is not None else None
                    if len(source.named) > (top is not None) or (top is not None and part is None):
                        refuse("K907", f"`{source.span.text}`", source.span, 'write table("f.tsv", top=30%)')
                    if part is not None and not 0 <= part <= 1:
                        raise fail("K210", "top is a fraction between 0% and 100%", source.span, "such as top=30%")
                    op = HeadsOp(decl.name, "table", path.value, part)
                case _:
                    refuse("K907", f"the head source `{source.span.text}`", source.span, "use a table")
            self.builder.add(op, source.span)

    # ------------------------------------------------------------ keep

    def keeps(self) -> None:
        placed = self.resolved.of(ast.Keep)
        names: dict[str, Placed] = {}
        for item in placed:
            try:
                name = class_name(item, placed)
                if name in names:
                    refuse("K901", "a second `keep` for the same rows", item.clause.span, "join the sets by `|`")
                names[name] = item
                self.keep(name, item)
            except PolicyError as error:
                self.findings += error.diagnostics
        if all(item.prefixes for item in placed) and not any(item.heads == "rest" for item in placed):
            self.default("rest" if placed else "all")

    def keep(self, name: str, placed: Placed) -> None:
        node = placed.clause
        assert isinstance(node, ast.Keep)
        for loser in node.losers:
            if not isinstance(loser, ast.Drop):
                refuse("K908", f"`{loser.span.text}`", loser.span, "losers can be dropped")
        scope = self.scope(placed)
        _refuse_full(placed, node.set, scope)
        value = lower_set(self.builder, node.set, scope, frozenset(self.units))
        self.refuse_apart(value, node.set)
        triggers = lower_triggers(placed.triggers, frozenset(self.units))
        heads = placed.heads
        layers = _layer_ranges(placed.layers) if placed.layers is not None else None
        self.builder.add(ClassOp(name, heads, layers), (placed.prefixes[-1] if placed.prefixes else node).span)
        self.builder.add(KeepOp(name, value, triggers), node.span)

    def refuse_apart(self, value: SSAValue, node: ast.SetUnion) -> None:
        """What reads all heads goes through their rows column by column: no selection may tell these rows apart."""
        assert isinstance(value.owner, UnionOp)
        tops = [
            (term.owner, written.span)
            for term, written in zip(value.owner.terms, node.terms, strict=True)
            if isinstance(term.owner, TopOp)
        ]
        apart = [span for top, span in tops if parts_heads(top, self.ops)]
        self.apart |= bool(apart)
        if apart and any(decides_for_all(top, self.ops) for top, _ in tops):
            refuse("K904", "a selection in which heads differ, in a set that also decides for all heads at once,",
                   apart[0], "say `shared heads` at every selection of the set, or at none, without `[h]`")  # fmt: skip

    def refuse_updates_over_heads(self) -> None:
        classes = any(placed.heads is not None for placed in self.resolved.of(ast.Keep))
        if self.over_heads and (classes or self.apart):
            why = "head classes" if classes else "selections in which heads differ"
            refuse("K906", f"an update over all heads (`[h]`) in a policy that has {why}",
                   self.over_heads[0].value.span, "leave out `[h]`, or let all heads share one decision")  # fmt: skip

    @property
    def ops(self) -> list[Operation]:
        return list(self.builder.block.ops)

    def default(self, name: str) -> None:
        """What no clause says anything about keeps all."""
        span = self.resolved.header.header
        everything = self.builder.add(RegionOp("all"), span).res
        union = self.builder.add(UnionOp([everything]), span).res
        self.builder.add(ClassOp(name, None, None), span)
        self.builder.add(KeepOp(name, union, []), span)

    def scope(self, placed: Placed) -> Scope:
        """The names around a clause: those without prefix, and those of its own prefixes, which come first."""
        scores: dict[str, ast.Score] = {}
        shares: dict[str, ast.Share] = {}
        for other in sorted(self.resolved.of(ast.Score, ast.Share), key=lambda p: len(p.prefixes)):
            if placed.prefixes[: len(other.prefixes)] != other.prefixes:
                continue
            if isinstance(other.clause, ast.Score):
                scores[other.clause.name] = other.clause
            elif isinstance(other.clause, ast.Share):
                shares[other.clause.name] = other.clause
        landmarks = {name: (unit, axes) for unit, marks in self.units.items() for name, axes in marks.items()}
        return Scope(scores, frozenset(self.states), landmarks, shares, units=bool(self.units))


def _refuse_clause(clause: ast.Clause) -> None:
    match clause:
        case ast.Attend():
            if not (len(clause.set.terms) == 1 and clause.set.terms[0] == ast.Region("all")):
                refuse("K910", "`attend`", clause.span, "this version reads all that is kept")
        case ast.Store():
            refuse("K909", "`store`", clause.span, "entries keep the model's dtype and device")
        case ast.Pick():
            refuse("K910", "`pick`", clause.span)
        case ast.Positions(mode=mode) if mode != "original":
            refuse("K911", f"`positions {mode}`", clause.span, "leave the clause out: positions stay as they were")
        case ast.Off():
            refuse("K912", "`off`", clause.span)
        case _:
            return


def _refuse_on(clause: ast.On) -> None:
    if clause.event != "attend":
        refuse("K906", f"`on {clause.event}`", clause.span, "`on attend` can be run")
    if clause.where is not None:
        refuse("K906", "a condition of an update", clause.where.span)
    for update in clause.updates:
        if update.op != "+=":
            refuse("K906", f"`{update.name} = ...`", update.span, "`+=` can be run")


def _refuse_update(node: ast.Expr, scope: Scope) -> None:
    """Updates run query by query (rule 19): only what is linear down to its `sum[q]` is the same for any cut."""
    match node:
        case ast.Reduce(fn="sum", axes=(ast.Axis(name="q", source=None),)):
            for part in reads(node.body, scope):
                bad = isinstance(part, ast.Reduce) and any(axis.name in "qi" for axis in part.axes)
                bad |= isinstance(part, ast.Call) and part.fn in ("maxpool", "avgpool")
                bad |= isinstance(part, ast.Name) and (part.id in kv.SCALARS or part.id in ("age", "logit"))
                if bad or (isinstance(part, ast.Name) and part.id in scope.states):
                    refuse("K906", f"`{part.span.text}` in an update", part.span, "such as `acc += sum[q] attn`")
        case ast.Reduce(fn="mean" | "sum", axes=axes) if all(axis.name in "gh" for axis in axes):
            _refuse_update(node.body, scope)
        case ast.Binary(op="*", left=left, right=right) if constant(left) is not None or constant(right) is not None:
            _refuse_update(left if constant(left) is None else right, scope)
        case ast.Binary(op="/", left=left, right=right) if constant(right) is not None:
            _refuse_update(left, scope)
        case ast.Name(id=name) if name in scope.scores:
            _refuse_update(scope.scores[name].value, scope)
        case _:
            refuse("K906", f"the update `{node.span.text}`", node.span, "such as `acc += mean[g] sum[q] attn`")


def _refuse_full(placed: Placed, node: ast.SetUnion, scope: Scope) -> None:
    """`full` fires by the length of a row, which a budget that rows or layers divide among themselves leaves open."""
    full = next((trigger for trigger in placed.triggers if trigger.name == "full"), None)
    if full is None:
        return
    for term in node.terms:
        if not isinstance(term, ast.Selection):
            continue
        shared = isinstance(term.amount, ast.Name) and term.amount.id in scope.shares
        if shared or any(given.kind == "across" for given in term.scopes):
            what = f"the share `{term.amount.span.text}`" if shared else "`across heads`"
            refuse("K903", f"`{full.span.text}` with {what} in its set", full.span,
                   "use `step` or `every(n)`, or a count that is the same for every row")  # fmt: skip


def class_name(placed: Placed, others: tuple[Placed, ...]) -> str:
    """The class of a `keep`: its prefix in words; `all` without one, or `rest` beside prefixed ones."""
    words = [f"layers {_layers_text(placed.layers)}"] if placed.layers is not None else []
    words += [placed.heads] if placed.heads is not None else []
    if words:
        return " ".join(words)
    taken = len(others) > 1 and not any(item.heads == "rest" for item in others)
    return "rest" if taken else "all"


def _layers_text(prefix: ast.LayersPrefix) -> str:
    items = []
    for item in prefix.items:
        if isinstance(item, ast.LayerRest):
            items.append("rest")
        elif item.first == item.last:
            items.append(_index_text(item.first))
        else:
            items.append(f"{_index_text(item.first)}..{_index_text(item.last)}")
    return ", ".join(items)


def _index_text(index: ast.LayerIndex) -> str:
    if not index.from_last:
        return str(index.number)
    return f"last-{index.number}" if index.number else "last"


def _layer_ranges(prefix: ast.LayersPrefix) -> list[tuple[int, int]]:
    """Pairs of ends, negative ones counted from the end; empty for `layers rest`."""
    out: list[tuple[int, int]] = []
    for item in prefix.items:
        if isinstance(item, ast.LayerRest):
            if len(prefix.items) > 1:
                refuse("K901", "`rest` beside other layers", item.span, "give `layers rest` a clause of its own")
            return []
        out.append((_end(item.first), _end(item.last)))
    return out


def _end(index: ast.LayerIndex) -> int:
    if index.number > _LAYER_LIMIT:
        raise fail("K701", f"no model has a layer {index.number}", index.span, "count layers from 0")
    return -1 - index.number if index.from_last else index.number
