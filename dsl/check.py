"""Everything that can be said about a policy without a model.

Takes a `Resolved`; gives findings in the order of the text: errors, warnings and notes. Guarantees: nothing is
raised, each finding has a span in one of the policy's sources, and each stands once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from kvcompile.dsl.check_cost import check_cost
from kvcompile.dsl.check_heads import check_heads
from kvcompile.dsl.check_learn import check_learn
from kvcompile.dsl.check_losers import check_losers
from kvcompile.dsl.check_names import check_names
from kvcompile.dsl.check_scores import check_scores
from kvcompile.dsl.check_sets import check_sets
from kvcompile.dsl.check_time import check_time
from kvcompile.dsl.context import Context, Enough
from kvcompile.dsl.diagnostics import Diagnostic
from kvcompile.dsl.resolve import Resolved

CHECKS: tuple[Callable[[Context], None], ...] = (
    check_names,
    check_scores,
    check_sets,
    check_losers,
    check_heads,
    check_learn,
    check_time,
    check_cost,
)


def check(resolved: Resolved) -> tuple[Diagnostic, ...]:
    """Findings about a resolved policy; only those of severity `error` keep it from being compiled."""
    context = Context.of(resolved)
    with suppress(Enough):
        for diagnostic in resolved.findings:
            context.report(diagnostic)
        for one in CHECKS:
            one(context)
    return tuple(sorted(context.findings.values(), key=lambda d: (d.span.source.name, d.span.start, d.code)))
