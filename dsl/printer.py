"""Syntax tree to text of the language.

Takes any node; gives one line of text, or a whole block for policies and files (`text`), and a form for digests
that spells equal numbers alike (`canonical`). Guarantees: `parse(text(file))` equals the file, comments aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction

from kvcompile.dsl import ast

# Levels of the grammar, loosest first: what may stand somewhere without brackets.
_COND, _AND, _NOT, _REL, _ARITH, _PRODUCT, _UNARY, _PORTION, _ATOM = range(1, 10)
_LEVELS = {"or": _COND, "and": _AND, "+": _ARITH, "-": _ARITH, "*": _PRODUCT, "/": _PRODUCT}
_EXACT = Context(prec=60)


def text(node: ast.Node) -> str:
    """The node as text that parses to an equal node."""
    return _Printer(canonical=False).node(node)


def canonical(node: ast.Node) -> str:
    """The node as text in which `32k` and `32768`, `0.10` and `1e-1` are spelled alike."""
    return _Printer(canonical=True).node(node)


# Nodes that are no clause, and the method that prints them.
_GROUPS: tuple[tuple[tuple[type[ast.Node], ...], str], ...] = (
    ((ast.LayersPrefix, ast.HeadsPrefix), "_prefix"),
    ((ast.Trigger,), "_trigger"),
    ((ast.SetUnion,), "_set"),
    ((ast.Region, ast.Ref, ast.Selection, ast.Where), "_term"),
    ((ast.Drop, ast.Merge, ast.Fold, ast.Requant, ast.Move), "_loser"),
    ((ast.Format,), "_format"),
    ((ast.Scope,), "_scope"),
    ((ast.HeadsRest, ast.HeadsSame), "_source"),
    ((ast.Number, ast.Text, ast.Name, ast.Field, ast.Named, ast.Call, ast.Axis), "_expr"),
    ((ast.Reduce, ast.Unary, ast.Binary, ast.Portion), "_expr"),
)


class _Printer:
    def __init__(self, canonical: bool) -> None:
        self.canonical = canonical

    def node(self, node: ast.Node) -> str:
        match node:
            case ast.File():
                items = sorted([*node.policies, *node.heads, *node.learns], key=lambda item: item.span.start)
                return "\n\n".join(self.node(item) for item in items) + "\n"
            case ast.Policy():
                extends = f" extends {node.parent.id}" if node.parent else ""
                params = self._list([f"{p.name}={self._expr(p.default)}" for p in node.params])
                return self._block(f"policy {node.name}({params}){extends}", node.clauses)
            case ast.Learn():
                return self._block(f"learn {node.heads.id} for {node.policy.id}", node.clauses)
            case ast.HeadsDecl():
                return f"heads {node.name} = {' | '.join(self._source(s) for s in node.sources)}"
            case ast.Prefixed():
                return self._prefixed(node)
        for kinds, method in _GROUPS:
            if isinstance(node, kinds):
                shown: str = getattr(self, method)(node)
                return shown
        return self._clause(node)

    # ---------------------------------------------------------------- blocks and clauses

    def _block(self, header: str, clauses: Sequence[ast.Node]) -> str:
        if not clauses:
            return header
        lines = [f"    {line}" for clause in clauses for line in self.node(clause).split("\n")]
        return "\n".join([header + ":", *lines])

    def _prefixed(self, node: ast.Prefixed) -> str:
        if len(node.clauses) == 1 and not isinstance(node.clauses[0], ast.Prefixed):
            return f"{self._prefix(node.prefix)}: {self._clause(node.clauses[0])}"
        return self._block(self._prefix(node.prefix), node.clauses)

    def _prefix(self, node: ast.Prefix) -> str:
        if isinstance(node, ast.HeadsPrefix):
            return node.name
        return "layers " + self._list([self._layer(item) for item in node.items])

    def _layer(self, item: ast.LayerRange | ast.LayerRest) -> str:
        if isinstance(item, ast.LayerRest):
            return "rest"

        def end(index: ast.LayerIndex) -> str:
            if not index.from_last:
                return str(index.number)
            return f"last-{index.number}" if index.number else "last"

        return end(item.first) if item.first == item.last else f"{end(item.first)}..{end(item.last)}"

    def _clause(self, node: ast.Node) -> str:
        match node:
            case ast.Keep():
                return " ".join([f"keep {self._set(node.set)}", *(f"else {self._loser(lo)}" for lo in node.losers)])
            case ast.Attend():
                return f"attend {self._set(node.set)}"
            case ast.Store():
                return f"store {self._set(node.set)} as {self._list([self._format(f) for f in node.formats])}"
            case ast.At():
                return "at " + self._list([self._trigger(t) for t in node.triggers])
            case ast.State():
                return "state " + self._assigns(node.assigns)
            case ast.On():
                where = f" where {self._expr(node.where, _COND)}" if node.where is not None else ""
                return f"on {node.event}{where}: {self._list([self._definition(u) for u in node.updates])}"
            case ast.Positions():
                return f"positions {node.mode}"
            case ast.Off():
                return "off"
            case ast.Mix():
                return f"mix {self._expr(node.value)}"
            case ast.Loss():
                return f"loss {self._expr(node.value)}"
            case ast.Freeze():
                return "freeze " + self._list(list(node.names))
        return self._definition(node)

    def _definition(self, node: ast.Node) -> str:
        """Clauses that give something a name."""
        match node:
            case ast.Score():
                return f"score {node.name} = {self._expr(node.value)}"
            case ast.Unit():
                offset = f" from {self._expr(node.offset)}" if node.offset is not None else ""
                landmarks = f" with {self._assigns(node.landmarks)}" if node.landmarks else ""
                return f"unit {node.name}{self._args(node.args, node.named, always=True)}{offset}{landmarks}"
            case ast.Share():
                return f"share {node.name} = {self._expr(node.total)} by {self._expr(node.by)}"
            case ast.Pick():
                return f"pick {node.name} = {self._set(node.set)}"
            case ast.Assign():
                return self._assigns((node,))
            case ast.Update():
                return f"{node.name} {node.op} {self._expr(node.value)}"
            case ast.Gate():
                return " ".join([f"gate {node.name} = {self._expr(node.by)}", *(self._scope(s) for s in node.scopes)])
        raise TypeError(f"no text for {type(node).__name__}")

    def _assigns(self, assigns: tuple[ast.Assign, ...]) -> str:
        return self._list([f"{a.name} = {self._expr(a.value)}" for a in assigns])

    def _source(self, source: ast.HeadSource) -> str:
        match source:
            case ast.HeadsRest():
                return "rest"
            case ast.HeadsSame():
                return source.name
        return self._expr(source)

    def _trigger(self, node: ast.Trigger) -> str:
        if node.name == "when" and node.cond is not None:
            return f"when {self._expr(node.cond, _COND)}"
        cond = f" if {self._expr(node.cond, _COND)}" if node.cond is not None else ""
        return f"{node.name}{self._args(node.args, node.named)}{cond}"

    # ---------------------------------------------------------------- sets

    def _set(self, node: ast.SetUnion) -> str:
        return " | ".join(self._term(term) for term in node.terms)

    def _term(self, term: ast.Term) -> str:
        match term:
            case ast.Region():
                return f"{term.kind} {term.unit}" if term.unit else f"{term.kind}{self._args(term.args, term.named)}"
            case ast.Ref():
                return term.name
            case ast.Where():
                return f"where {self._expr(term.cond, _COND)}"
        unit = f" {term.unit}" if term.unit else ""
        head = f"{term.rank}({self._expr(term.amount)}){unit} by {self._expr(term.by)}"
        return " ".join([head, *(self._scope(s) for s in term.scopes)])

    def _scope(self, node: ast.Scope) -> str:
        size = f"({self._expr(node.size)})" if node.size is not None else ""
        floor = f" floor {self._expr(node.floor)}" if node.floor is not None else ""
        return f"{node.kind} {node.what}{size}{floor}"

    def _loser(self, node: ast.Loser) -> str:
        weight = ""
        if isinstance(node, ast.Merge | ast.Fold) and node.weight is not None:
            weight = f" weight {self._expr(node.weight)}"
        match node:
            case ast.Drop():
                return "drop"
            case ast.Move():
                return f"move {node.tier}"
            case ast.Fold():
                return f"fold {node.fn}{self._args(node.args, node.named)}{weight}"
            case ast.Merge():
                when = f" when {self._expr(node.when, _COND)}" if node.when is not None else ""
                return f"merge into {node.into} by {self._expr(node.by)}{when}{weight}"
        return "store as " + self._list([self._format(f) for f in node.formats])

    def _format(self, node: ast.Format) -> str:
        words: list[str] = [node.part] if node.part else []
        for word in node.words:
            match word:
                case ast.Move():
                    words.append(f"move {word.tier}")
                case ast.Grain():
                    words.append(f"per {word.what}" + (f"({self._expr(word.size)})" if word.size is not None else ""))
                case _:
                    words.append(word.name + self._args(word.args, word.named))
        return " ".join(words)

    # ---------------------------------------------------------------- expressions

    def _args(self, args: tuple[ast.Expr, ...], named: tuple[ast.Named, ...], always: bool = False) -> str:
        inner = [self._expr(arg, _COND) for arg in args] + [self._expr(arg, _COND) for arg in named]
        return f"({self._list(inner)})" if inner or always else ""

    def _list(self, parts: list[str]) -> str:
        return ", ".join(parts)

    def _expr(self, node: ast.Node, level: int = _ARITH) -> str:
        shown, own = self._leveled(node)
        return shown if own >= level else f"({shown})"

    def _leveled(self, node: ast.Node) -> tuple[str, int]:
        match node:
            case ast.Number():
                return self._number(node)
            case ast.Text():
                return f'"{node.value}"', _ATOM
            case ast.Name():
                return node.id, _ATOM
            case ast.Field():
                return f"{node.owner}.{node.name}", _ATOM
            case ast.Call():
                return f"{node.fn}{self._args(node.args, node.named, always=True)}", _ATOM
            case ast.Named():
                return f"{node.name}={self._expr(node.value)}", _COND
            case ast.Portion():
                return f"{self._expr(node.fraction, _ATOM)} of {node.of}", _PORTION
            case ast.Axis():
                return node.name + (f" in {self._expr(node.source)}" if node.source is not None else ""), _COND
            case ast.Reduce():
                axes = self._list([self._expr(axis, _COND) for axis in node.axes])
                return f"{node.fn}[{axes}] {self._expr(node.body, _UNARY)}", _UNARY
            case ast.Unary():
                if node.op == "not":
                    return f"not {self._expr(node.operand, _NOT)}", _NOT
                return f"-{self._expr(node.operand, _UNARY)}", _UNARY
            case ast.Binary():
                own = _LEVELS.get(node.op, _REL)
                left = _ARITH if own == _REL else own
                return f"{self._expr(node.left, left)} {node.op} {self._expr(node.right, own + 1)}", own
        raise TypeError(f"no text for {type(node).__name__}")

    def _number(self, node: ast.Number) -> tuple[str, int]:
        value = node.value
        sign, level = ("-", _UNARY) if value < 0 else ("", _ATOM)
        value = abs(value)
        if node.kind == "percent":
            value *= 100
        decimal = _decimal(value)
        if decimal is None or (self.canonical and node.kind not in ("percent", "bytes")):
            ratio = f"{value.numerator}" if value.denominator == 1 else f"({value.numerator} / {value.denominator})"
            return f"{sign}{ratio}", level
        if node.kind == "percent":
            return f"{sign}{decimal:f}%", level
        if node.kind in ("size", "bytes") and value.denominator == 1 and value % 1024 == 0:
            return f"{sign}{value.numerator // 1024}k{'B' if node.kind == 'bytes' else ''}", level
        if node.kind == "float":
            shown = f"{decimal:f}" if Fraction(1, 10**12) < value < 10**12 or not value else f"{decimal:E}"
            return f"{sign}{shown if '.' in shown or 'E' in shown else shown + '.0'}", level
        return f"{sign}{decimal:f}", level


def _decimal(value: Fraction) -> Decimal | None:
    """The value as an exact decimal number, or None where it has none of reasonable length."""
    shown = _EXACT.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(_EXACT)
    return shown if Fraction(shown) == value else None
