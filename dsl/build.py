"""From the parse tree to the syntax tree.

Takes lark's tree of one text; gives nodes of `ast` with spans. Guarantees: numbers are exact and bounded,
positional arguments come before named ones, and the depth of what it builds is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, cast

from lark import Token, Tree

from kvcompile.dsl import ast
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.source import Source, Span

MAX_DEPTH = 160  # levels of the parse tree; brackets alone are bounded by layout.MAX_NESTING
_MAX_DIGITS = 18
_MAX_EXPONENT = 30
_LARGEST = 10**18
_SIZES = {"k": 1024, "m": 1024**2, "g": 1024**3}
_BARE_REGIONS = frozenset({"prompt", "generated", "frozen"})

T = Tree[Token]
Part = T | Token


class Builder:
    """Builds nodes for one source; one method per rule of the grammar, named after it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def build(self, tree: Part) -> Any:
        """The node of a tree or of a bare number token."""
        if isinstance(tree, Token):
            return str(tree)
        method: Callable[[T], Any] = getattr(self, f"on_{tree.data}")
        return method(tree)

    def check_depth(self, tree: T) -> None:
        """Refuse what later, recursive passes could not walk."""
        level: list[T] = [tree]
        for _ in range(MAX_DEPTH):
            level = [child for node in level for child in node.children if isinstance(child, Tree)]
            if not level:
                return
        raise fail("K008", "the expression is nested too deep", self.span(level[0]), "name a part of it as a score")

    def span(self, part: Part) -> Span:
        if isinstance(part, Token):
            return self.source.span(part.start_pos or 0, part.end_pos or 0)
        start = getattr(part.meta, "start_pos", None)
        return self.source.span(start or 0, getattr(part.meta, "end_pos", start) or 0)

    # ---------------------------------------------------------------- common to all rules

    def _nodes(self, parts: list[Part]) -> Iterator[Any]:
        return (self.build(part) for part in parts if isinstance(part, Tree))

    def _tuple(self, parts: list[Part]) -> tuple[Any, ...]:
        return tuple(self._nodes(parts))

    def _pop(self, parts: list[Part], rule: str) -> T | None:
        """Remove and give the child of that rule, if there."""
        for i, part in enumerate(parts):
            if isinstance(part, Tree) and part.data == rule:
                return cast(T, parts.pop(i))
        return None

    def _optional(self, parts: list[Part], rule: str) -> Any:
        """The node inside an optional one-child rule, such as `where COND`."""
        found = self._pop(parts, rule)
        return None if found is None else self.build(found.children[0])

    def _arguments(self, tree: T | None) -> tuple[tuple[ast.Expr, ...], tuple[ast.Named, ...]]:
        given = self._tuple(tree.children) if tree is not None else ()
        args = tuple(a for a in given if not isinstance(a, ast.Named))
        named = tuple(a for a in given if isinstance(a, ast.Named))
        seen: set[str] = set()
        for i, arg in enumerate(given):
            if not isinstance(arg, ast.Named):
                if i >= len(args):
                    raise fail(
                        "K014", "a positional argument stands after a named one", arg.span, "move it to the front"
                    )
            elif arg.name in seen:
                raise fail("K014", f"the argument `{arg.name}` is given twice", arg.span, "leave one of them out")
            else:
                seen.add(arg.name)
        return args, named

    def _declared(self, tree: T) -> dict[str, Any]:
        name = tree.children[0]
        return {"name": str(name), "span": self.span(tree), "name_span": self.span(name)}

    # ---------------------------------------------------------------- items

    def on_file(self, tree: T) -> ast.File:
        items = self._tuple(tree.children)
        return ast.File(
            source=self.source,
            policies=tuple(i for i in items if isinstance(i, ast.Policy)),
            heads=tuple(i for i in items if isinstance(i, ast.HeadsDecl)),
            learns=tuple(i for i in items if isinstance(i, ast.Learn)),
            span=self.source.span(0, len(self.source.text)),
        )

    def on_policy(self, tree: T) -> ast.Policy:
        rest = tree.children[1:]
        params = self._pop(rest, "params")
        parent = self._pop(rest, "extends")
        named = self._declared(tree)
        return ast.Policy(
            **named,
            params=self._tuple(params.children) if params is not None else (),
            parent=self._word(parent.children[0]) if parent is not None else None,
            clauses=self._tuple(rest),
            header=self.source.span(self.span(tree).start, named["name_span"].end),
        )

    def _word(self, token: Part) -> ast.Name:
        return ast.Name(str(token), span=self.span(token))

    def on_param(self, tree: T) -> ast.Param:
        return ast.Param(**self._declared(tree), default=self.build(tree.children[1]))

    def on_heads(self, tree: T) -> ast.HeadsDecl:
        return ast.HeadsDecl(**self._declared(tree), sources=self._tuple(tree.children[1:]))

    def on_heads_rest(self, tree: T) -> ast.HeadsRest:
        return ast.HeadsRest(span=self.span(tree))

    def on_heads_same(self, tree: T) -> ast.HeadsSame:
        return ast.HeadsSame(str(tree.children[0]), span=self.span(tree))

    def on_learn(self, tree: T) -> ast.Learn:
        heads, policy, *clauses = tree.children
        return ast.Learn(self._word(heads), self._word(policy), self._tuple(clauses), span=self.span(tree))

    def on_gate(self, tree: T) -> ast.Gate:
        by, *scopes = self._tuple(tree.children[1:])
        return ast.Gate(**self._declared(tree), by=by, scopes=tuple(scopes))

    def on_mix(self, tree: T) -> ast.Mix:
        return ast.Mix(self.build(tree.children[0]), span=self.span(tree))

    def on_loss(self, tree: T) -> ast.Loss:
        return ast.Loss(self.build(tree.children[0]), span=self.span(tree))

    def on_freeze(self, tree: T) -> ast.Freeze:
        return ast.Freeze(tuple(str(name) for name in tree.children), span=self.span(tree))

    # ---------------------------------------------------------------- clauses

    def on_prefixed(self, tree: T) -> ast.Prefixed:
        prefix, *clauses = self._tuple(tree.children)
        return ast.Prefixed(prefix, tuple(clauses), span=self.span(tree))

    def on_layers_prefix(self, tree: T) -> ast.LayersPrefix:
        return ast.LayersPrefix(self._tuple(tree.children), span=self.span(tree))

    def on_rest_prefix(self, tree: T) -> ast.HeadsPrefix:
        return ast.HeadsPrefix("rest", span=self.span(tree))

    def on_heads_prefix(self, tree: T) -> ast.HeadsPrefix:
        return ast.HeadsPrefix(str(tree.children[0]), span=self.span(tree))

    def on_layer_range(self, tree: T) -> ast.LayerRange:
        ends = self._tuple(tree.children)
        return ast.LayerRange(ends[0], ends[-1], span=self.span(tree))

    def on_layer_rest(self, tree: T) -> ast.LayerRest:
        return ast.LayerRest(span=self.span(tree))

    def on_from_first(self, tree: T) -> ast.LayerIndex:
        return ast.LayerIndex(self._integer(tree.children[0]), span=self.span(tree))

    def on_from_last(self, tree: T) -> ast.LayerIndex:
        back = self._integer(tree.children[0]) if tree.children else 0
        return ast.LayerIndex(back, from_last=True, span=self.span(tree))

    def on_keep(self, tree: T) -> ast.Keep:
        kept, *losers = self._tuple(tree.children)
        return ast.Keep(kept, tuple(losers), span=self.span(tree))

    def on_attend(self, tree: T) -> ast.Attend:
        return ast.Attend(self.build(tree.children[0]), span=self.span(tree))

    def on_store(self, tree: T) -> ast.Store:
        stored, *formats = self._tuple(tree.children)
        return ast.Store(stored, tuple(formats), span=self.span(tree))

    def on_at(self, tree: T) -> ast.At:
        return ast.At(self._tuple(tree.children), span=self.span(tree))

    def on_score(self, tree: T) -> ast.Score:
        return ast.Score(**self._declared(tree), value=self.build(tree.children[1]))

    def on_unit(self, tree: T) -> ast.Unit:
        _, given, *rest = tree.children
        args, named = self._arguments(cast(T, given))
        offset = self._optional(rest, "offset")
        return ast.Unit(**self._declared(tree), args=args, named=named, offset=offset, landmarks=self._tuple(rest))

    def on_share(self, tree: T) -> ast.Share:
        total, by = self._tuple(tree.children[1:])
        return ast.Share(**self._declared(tree), total=total, by=by)

    def on_pick(self, tree: T) -> ast.Pick:
        return ast.Pick(**self._declared(tree), set=self.build(tree.children[1]))

    def on_state(self, tree: T) -> ast.State:
        return ast.State(self._tuple(tree.children), span=self.span(tree))

    def on_on(self, tree: T) -> ast.On:
        event, *rest = tree.children
        where = self._optional(rest, "where")
        return ast.On(str(event), self._tuple(rest), where=where, span=self.span(tree))

    def on_positions(self, tree: T) -> ast.Positions:
        return ast.Positions(str(tree.children[0]), span=self.span(tree))

    def on_off(self, tree: T) -> ast.Off:
        return ast.Off(span=self.span(tree))

    def on_assign(self, tree: T) -> ast.Assign:
        return ast.Assign(**self._declared(tree), value=self.build(tree.children[1]))

    def on_set_to(self, tree: T) -> ast.Update:
        return ast.Update(**self._declared(tree), op="=", value=self.build(tree.children[1]))

    def on_add_to(self, tree: T) -> ast.Update:
        return ast.Update(**self._declared(tree), op="+=", value=self.build(tree.children[1]))

    # ---------------------------------------------------------------- sets

    def on_set(self, tree: T) -> ast.SetUnion:
        return ast.SetUnion(self._tuple(tree.children), span=self.span(tree))

    def on_region_all(self, tree: T) -> ast.Region:
        return ast.Region("all", span=self.span(tree))

    def on_region_rest(self, tree: T) -> ast.Region:
        return ast.Region("rest", span=self.span(tree))

    def on_unit_region(self, tree: T) -> ast.Region:
        kind, unit = tree.children
        return ast.Region(str(kind), unit=str(unit), span=self.span(tree))

    def on_region_name(self, tree: T) -> ast.Region | ast.Ref:
        name = str(tree.children[0])
        if name in _BARE_REGIONS:
            return ast.Region(name, span=self.span(tree))
        return ast.Ref(name, span=self.span(tree))

    def on_region_call(self, tree: T) -> ast.Region:
        call: ast.Call = self.build(tree.children[0])
        return ast.Region(call.fn, call.args, call.named, span=call.span)

    def on_selection(self, tree: T) -> ast.Selection:
        rank, *rest = tree.children
        member = self._pop(rest, "member")
        amount, by, *scopes = self._tuple(rest)
        unit = str(member.children[0]) if member is not None else None
        word = cast(Any, str(rank))
        return ast.Selection(word, amount, by, unit=unit, scopes=tuple(scopes), span=self.span(tree))

    def on_where(self, tree: T) -> ast.Where:
        return ast.Where(self.build(tree.children[0]), span=self.span(tree))

    def on_per(self, tree: T) -> ast.Scope:
        return ast.Scope("per", str(tree.children[0]), span=self.span(tree))

    def on_shared(self, tree: T) -> ast.Scope:
        return ast.Scope("shared", str(tree.children[0]), size=self._second(tree), span=self.span(tree))

    def on_across(self, tree: T) -> ast.Scope:
        return ast.Scope("across", str(tree.children[0]), floor=self._second(tree), span=self.span(tree))

    def _second(self, tree: T) -> ast.Expr | None:
        return self.build(tree.children[1]) if len(tree.children) > 1 and tree.children[1] is not None else None

    # ---------------------------------------------------------------- losers, formats, triggers

    def on_drop(self, tree: T) -> ast.Drop:
        return ast.Drop(span=self.span(tree))

    def on_merge(self, tree: T) -> ast.Merge:
        into, by, *rest = tree.children
        when, weight = self._optional(rest, "when"), self._optional(rest, "weight")
        return ast.Merge(str(into), self.build(by), when=when, weight=weight, span=self.span(tree))

    def on_fold(self, tree: T) -> ast.Fold:
        how, *rest = tree.children
        call = ast.Call(str(how)) if isinstance(how, Token) else self.build(how)
        weight = self._optional(rest, "weight")
        return ast.Fold(call.fn, call.args, call.named, weight=weight, span=self.span(tree))

    def on_requant(self, tree: T) -> ast.Requant:
        return ast.Requant(self._tuple(tree.children), span=self.span(tree))

    def on_move(self, tree: T) -> ast.Move:
        return ast.Move(str(tree.children[0]), span=self.span(tree))

    def on_format(self, tree: T) -> ast.Format:
        words = self._tuple(tree.children)
        first, part = words[0], None
        if isinstance(first, ast.FormatWord) and first.name in ("k", "v") and not first.args and len(words) > 1:
            part, words = cast(Any, first.name), words[1:]
        return ast.Format(words, part=part, span=self.span(tree))

    def on_word(self, tree: T) -> ast.FormatWord:
        args, named = self._arguments(cast(T | None, tree.children[1]) if len(tree.children) > 1 else None)
        return ast.FormatWord(str(tree.children[0]), args, named, span=self.span(tree))

    def on_grain(self, tree: T) -> ast.Grain:
        return ast.Grain(str(tree.children[0]), self._second(tree), span=self.span(tree))

    def on_trigger(self, tree: T) -> ast.Trigger:
        head, *rest = tree.children
        name = str(head) if isinstance(head, Token) else f"{head.children[0]}.{head.children[1]}"
        cond = self._optional(rest, "if")
        args, named = self._arguments(self._pop(rest, "args"))
        return ast.Trigger(name, args, named, cond=cond, span=self.span(tree))

    def on_trigger_when(self, tree: T) -> ast.Trigger:
        when = cast(T, tree.children[0])
        return ast.Trigger("when", cond=self.build(when.children[0]), span=self.span(tree))

    # ---------------------------------------------------------------- expressions

    def _binary(self, tree: T, op: str) -> ast.Binary:
        left, right = (self.build(part) for part in tree.children)
        return ast.Binary(cast(Any, op), left, right, span=self.span(tree))

    def on_or(self, tree: T) -> ast.Binary:
        return self._binary(tree, "or")

    def on_and(self, tree: T) -> ast.Binary:
        return self._binary(tree, "and")

    def on_plus(self, tree: T) -> ast.Binary:
        return self._binary(tree, "+")

    def on_minus(self, tree: T) -> ast.Binary:
        return self._binary(tree, "-")

    def on_times(self, tree: T) -> ast.Binary:
        return self._binary(tree, "*")

    def on_over(self, tree: T) -> ast.Binary:
        return self._binary(tree, "/")

    def on_compare(self, tree: T) -> ast.Binary:
        left, op, right = tree.children
        return ast.Binary(cast(Any, str(op)), self.build(left), self.build(right), span=self.span(tree))

    def on_not(self, tree: T) -> ast.Unary:
        return ast.Unary("not", self.build(tree.children[0]), span=self.span(tree))

    def on_negate(self, tree: T) -> ast.Unary:
        return ast.Unary("-", self.build(tree.children[0]), span=self.span(tree))

    def on_reduce(self, tree: T) -> ast.Reduce:
        fn, *axes, body = tree.children
        return ast.Reduce(str(fn), self._tuple(axes), self.build(body), span=self.span(tree))

    def on_axis(self, tree: T) -> ast.Axis:
        return ast.Axis(str(tree.children[0]), self._second(tree), span=self.span(tree))

    def on_portion(self, tree: T) -> ast.Portion:
        fraction, of = tree.children
        return ast.Portion(self.build(fraction), str(of), span=self.span(tree))

    def on_group(self, tree: T) -> ast.Expr:
        return cast(ast.Expr, self.build(tree.children[0]))

    def on_string(self, tree: T) -> ast.Text:
        return ast.Text(str(tree.children[0])[1:-1], span=self.span(tree))

    def on_word_all(self, tree: T) -> ast.Name:
        return ast.Name("all", span=self.span(tree))

    def on_word_rest(self, tree: T) -> ast.Name:
        return ast.Name("rest", span=self.span(tree))

    def on_name(self, tree: T) -> ast.Name:
        return ast.Name(str(tree.children[0]), span=self.span(tree))

    def on_field(self, tree: T) -> ast.Field:
        return ast.Field(str(tree.children[0]), str(tree.children[1]), span=self.span(tree))

    def on_call(self, tree: T) -> ast.Call:
        args, named = self._arguments(cast(T | None, tree.children[1]) if len(tree.children) > 1 else None)
        return ast.Call(str(tree.children[0]), args, named, span=self.span(tree))

    def on_named(self, tree: T) -> ast.Named:
        return ast.Named(str(tree.children[0]), self.build(tree.children[1]), span=self.span(tree))

    # ---------------------------------------------------------------- numbers

    def on_number(self, tree: T) -> ast.Number:
        token = cast(Token, tree.children[0])
        text, kind = str(token), token.type
        if kind == "INT":
            return ast.Number(Fraction(self._integer(token)), "int", span=self.span(tree))
        if kind == "SIZE":
            digits = text.rstrip("kKmMgGiIbB")
            unit = _SIZES[text[len(digits)].lower()]
            value = self._bounded(Fraction(self._digits(digits, token) * unit), token)
            return ast.Number(value, "bytes" if text[-1] in "bB" else "size", span=self.span(tree))
        if kind == "PERCENT":
            return ast.Number(self._decimal(text[:-1], token) / 100, "percent", span=self.span(tree))
        return ast.Number(self._decimal(text, token), "float", span=self.span(tree))

    def _integer(self, token: Part) -> int:
        return self._digits(str(token), token)

    def _digits(self, text: str, place: Part) -> int:
        if len(text) > _MAX_DIGITS:
            raise fail(
                "K007",
                f"a number of {len(text)} digits",
                self.span(place),
                f"numbers have at most {_MAX_DIGITS} digits",
            )
        return int(text)

    def _decimal(self, text: str, place: Part) -> Fraction:
        mantissa, _, exponent = text.lower().partition("e")
        if len(mantissa) > _MAX_DIGITS + 1 or len(exponent) > 4 or (exponent and abs(int(exponent)) > _MAX_EXPONENT):
            raise fail(
                "K007",
                "a number of this size or precision is not meant",
                self.span(place),
                f"at most {_MAX_DIGITS} digits, exponents from -{_MAX_EXPONENT} to {_MAX_EXPONENT}",
            )
        return self._bounded(Fraction(text), place)

    def _bounded(self, value: Fraction, place: Part) -> Fraction:
        if value > _LARGEST:
            raise fail("K007", "a number too large to be meant", self.span(place), "numbers go up to 1e18")
        return value
