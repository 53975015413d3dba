"""What can be said of a formula without evaluating it: what it reads, which of its axes are open, what it must be.

Takes `plan.Expr`, needs no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvcompile.kernels.plan import Expr, QuerySource, evidence_of, source_of, words_of


def reads_keys(formulas: Iterable[Expr]) -> bool:
    """Whether some formula reads keys, values or attention."""
    return any(
        n.op in ("evidence", "landmark", "learned") or (n.op == "field" and str(n.value) not in ("pos", "age", "count"))
        for f in formulas
        for n in f.walk()
    )


def sources_of(formulas: Iterable[Expr]) -> set[QuerySource]:
    """Whose queries some formulas ask for."""
    return {source for f in formulas for n in f.walk() if (source := source_of(n)) is not None}


def states_read(formulas: Iterable[Expr]) -> set[str]:
    """The states that some formulas read."""
    return {str(n.value) for f in formulas for n in f.walk() if n.op == "state"}


def open_sources(formula: Expr) -> set[QuerySource]:
    """Whose queries the axis `q` of a formula is: those of its leaves that no reduction inside has closed."""
    source = source_of(formula)
    if source is not None:
        return {source}
    if formula.op == "reduce" and words_of(formula)[1] == "q" and words_of(formula)[0] != "softmax":
        return set()
    return set().union(*(open_sources(arg) for arg in formula.args))


def ties_heads(formula: Expr) -> bool:
    """Whether the heads of a layer have to be evaluated together."""
    one = (n.op == "learned" and "u" not in n.axes for n in formula.walk())
    return any(one) or any(n.op == "reduce" and words_of(n)[1] == "h" for n in formula.walk())


def ties_queries(formula: Expr) -> bool:
    """Whether queries have to be evaluated together."""
    return any(n.op == "reduce" and words_of(n) == ("softmax", "q") for n in formula.walk())


def is_0_unread(formula: Expr) -> bool:
    """Whether a formula is surely 0 for entries that a query may not read, so that a sum needs no mask."""
    if formula.op == "evidence":
        return evidence_of(formula)[0] == "attn"
    if formula.op != "reduce":
        return False
    fn, axis = words_of(formula)
    if fn == "softmax":
        return axis == "i"
    return axis in ("g", "h") and fn in ("sum", "mean", "min", "max") and is_0_unread(formula.args[0])
