"""kv modules as text, and places in them.

Takes modules of the `kv` dialect; gives MLIR text with locations, modules parsed back, verification whose
failures are PolicyErrors at the operation's place. Guarantees: `from_text(to_text(m))` equals `m`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, FileLineColLoc, IntAttr, LocationAttr, ModuleOp, StringAttr
from xdsl.ir import Operation
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from kvcompile.dsl.diagnostics import fail, outside
from kvcompile.dsl.dialect_policy import KV, PolicyOp
from kvcompile.dsl.source import Source, Span


@dataclass(slots=True)
class Places:
    """The spans behind the locations of a module. A module that came from text has locations without a source."""

    sources: dict[str, Source] = field(default_factory=dict)
    spans: dict[tuple[str, int, int], Span] = field(default_factory=dict)

    def location(self, span: Span) -> LocationAttr:
        """The location of a span, remembered; of spans that start at one place the longest counts."""
        name, line, column = span.source.name, span.line, span.column
        self.sources.setdefault(name, span.source)
        known = self.spans.get((name, line, column))
        if known is None or known.end < span.end:
            self.spans[name, line, column] = span
        return FileLineColLoc(StringAttr(name), IntAttr(line), IntAttr(column))

    def span(self, op: Operation) -> Span:
        """Where an operation comes from."""
        loc = op.location
        if not isinstance(loc, FileLineColLoc):
            return outside(f"<{op.name}>")
        name, line, column = loc.filename.data, loc.line.data, loc.column.data
        if (name, line, column) in self.spans:
            return self.spans[name, line, column]
        if name in self.sources:
            return self.sources[name].at(line, column)
        return outside(f"{name}:{line}:{column}")


def to_text(module: ModuleOp) -> str:
    """MLIR text, locations included."""
    out = io.StringIO()
    Printer(out, print_debuginfo=True).print_op(module)
    return out.getvalue() + "\n"


def from_text(text: str, name: str = "<module>") -> ModuleOp:
    """The module of a text. PolicyError at the place in the text where it does not parse."""
    context = Context()
    context.load_dialect(Builtin)
    context.load_dialect(KV)
    try:
        return Parser(context, text, name).parse_module()
    except ParseError as error:
        span = Source(name, text).span(error.span.start, error.span.end)
        raise fail("K001", f"not a kv module: {error.msg}", span) from None
    except VerifyException as error:
        raise fail("K001", f"not a kv module: {error}", outside(name)) from None


def policy_of(module: ModuleOp) -> PolicyOp:
    """The one policy of a module. ValueError where there is none or more."""
    found = [op for op in module.body.block.ops if isinstance(op, PolicyOp)]
    if len(found) != 1:
        raise ValueError(f"a kv module holds one kv.policy, found {len(found)}")
    return found[0]


def ops_of(module: ModuleOp) -> Iterable[Operation]:
    """The operations of the module's policy, in order."""
    return policy_of(module).body.block.ops


def verify(module: ModuleOp, places: Places) -> None:
    """Check every operation, then what spans operations. PolicyError at the place of the first that is wrong."""
    for op in module.walk():
        try:
            op.verify(verify_nested_ops=False)
        except VerifyException as error:
            reason = str(error).strip().splitlines()[-1]
            raise fail("K705", f"{op.name}: {reason}", places.span(op)) from None
    module.verify()
