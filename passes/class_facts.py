"""What one head class keeps and what deciding that costs, in the policy's own words.

Takes a resolved policy, its plan and lengths; gives `ClassFacts` for each set of rows, several `keep` clauses of the
same rows in one. Guarantees: clauses and scores read as written, with parameters filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvcompile.dsl import ast
from kvcompile.dsl.check_cost import CHEAPER, COSTS, cost_of
from kvcompile.dsl.context import Context, SetClause
from kvcompile.dsl.diagnostics import Diagnostic, finding
from kvcompile.dsl.lower_rows import class_name, enclosing, read_picks, row_name
from kvcompile.dsl.printer import text
from kvcompile.dsl.resolve import Placed, Resolved
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Trigger
from kvcompile.passes.groups import groups
from kvcompile.passes.residents import forwards


@dataclass(frozen=True, slots=True)
class ScoreFacts:
    """A score as it is defined; its cost class in words, and the nearest cheaper way, if there is one."""

    score: str
    cost: str
    cheaper: str


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """One head class: KV heads over all layers, what it keeps and when, what its scores cost.

    keep: its clauses, a line each. triggers: as written, with the entries that come into a row between two of them;
    None where that depends on the sequence. losers: what becomes of the others. overshoot: the most entries of a KV
    head that stand or are under way beyond what its next decision leaves. windows: tokens of every sliding window that
    its layers have, and how many of its KV heads are in those.
    """

    name: str
    heads: int
    keep: str
    cost: str
    scores: tuple[ScoreFacts, ...]
    triggers: Mapping[str, int | None]
    losers: str
    overshoot: int
    windows: Mapping[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, fit for JSON."""
        scores = [{"score": s.score, "cost": s.cost, "cheaper": s.cheaper} for s in self.scores]
        return {
            "heads": self.heads,
            "keep": self.keep,
            "cost": self.cost,
            "scores": scores,
            "triggers": dict(self.triggers),
            "losers": self.losers,
            "overshoot": self.overshoot,
            "windows": {str(tokens): heads for tokens, heads in self.windows.items()},
        }

    def lines(self) -> Iterator[str]:
        """The class as text, its name first."""
        yield f"{self.name}: {self.heads} KV heads"
        yield from self.keep.splitlines()
        for tokens, heads in self.windows.items():
            which = "all" if heads == self.heads else str(heads)
            yield f"of which {which} in layers with a sliding window of {tokens}: what has left it is dropped"
        yield from (f"  {score.score}: {score.cost}" + _hint(score.cheaper) for score in self.scores)
        if not self.scores:
            yield self.cost
        if self.triggers:
            yield f"losers: {self.losers}"
            waits = [f"{name} {'depends' if n is None else f'+{n}'}" for name, n in self.triggers.items()]
            yield f"overshoot up to {self.overshoot} entries a KV head (between triggers: {', '.join(waits)})"


def _hint(cheaper: str) -> str:
    return f"; {cheaper}" if cheaper else ""


def class_facts(resolved: Resolved, plan: PolicyPlan, prompt: int, generate: int) -> tuple[ClassFacts, ...]:
    """Facts of every set of rows, in the plan's order; those that sliding windows have split, in one."""
    context = Context.of(resolved)
    most = _overshoots(plan, prompt, generate)
    out = []
    for owner, cls in enumerate(plan.classes):
        if cls.rows_of is not None or plan.named_like(owner) != owner:
            continue
        mine = _clauses(resolved, cls.name)
        alike = [i for i, other in enumerate(plan.classes) if other.name == cls.name]
        heads = sum(plan.class_size(i) for i in alike)
        windows = {reach: plan.class_size(i) for i in alike if (reach := plan.class_reach(i))}
        rules = [_unslid(other) for i, other in enumerate(plan.classes) if owner in (i, other.rows_of)]
        if all(rule.keeps_all for rule in rules):
            extra = most.get(owner, 0)
            out.append(ClassFacts(cls.name, heads, "keep all", COSTS["position"], (), {}, "", extra, windows))
            continue
        kinds = [(words, kind) for placed in mine for words, kind in _scores(context, placed)]
        dearest = max((kind for _, kind in kinds), key=list(COSTS).index, default="position")
        out.append(
            ClassFacts(
                cls.name,
                heads,
                "\n".join(_clause(placed) for placed in mine),
                COSTS[dearest],
                tuple(ScoreFacts(words, COSTS[kind], CHEAPER.get(kind, "")) for words, kind in dict(kinds).items()),
                {words: _wait(plan, trigger, prompt) for words, trigger in _triggers(mine, rules)},
                _losers(mine),
                most.get(owner, 0),
                windows,
            )
        )
    return tuple(out)


def never_full(resolved: Resolved, plan: PolicyPlan, tokens: int) -> list[Diagnostic]:
    """Warnings about units that a sequence of so many tokens cannot fill."""
    short = {unit.name: unit for unit in plan.units if not unit.full(tokens)}
    return [
        finding(
            "K708",
            f"no `{clause.name}` of {short[clause.name].size} tokens is full in a text of {tokens}: "
            "`attend` reads, and `keep` holds, all of its entries",
            clause.span,
            "take a smaller unit, or longer texts",
        )
        for clause in (placed.clause for placed in resolved.of(ast.Unit))
        if isinstance(clause, ast.Unit) and clause.name in short
    ]


def _unslid(cls: ClassPlan) -> ClassPlan:
    """A class as the policy has it: without the compiler's own trigger."""
    return replace(cls, triggers=tuple(t for t in cls.triggers if t.kind != "slide"))


# ---------------------------------------------------------------- clauses


def _clauses(resolved: Resolved, name: str) -> list[Placed]:
    """The picks and keeps that decide the rows of a class: picks come first."""
    keeps, read = resolved.of(ast.Keep), read_picks(resolved)
    picks = [p for p in resolved.of(ast.Pick) if isinstance(p.clause, ast.Pick) and p.clause.name not in read]
    own = [placed for placed in keeps if class_name(placed, keeps) == name]
    picking = [placed for placed in picks if class_name(placed, keeps) == name]
    if not own and picking:  # below a prefix that only picks, the rows keep what the prefix around it says
        own = enclosing(picking[0], keeps)
    return [*picking, *own]


def read_clauses(resolved: Resolved) -> dict[str, str]:
    """What the rows of each readers pick and read, as written, a clause a line."""
    attends, read = resolved.of(ast.Attend), read_picks(resolved)
    rows: dict[str, list[Placed]] = {}
    for placed in (*resolved.of(ast.Pick), *attends):
        if not isinstance(placed.clause, ast.Pick) or placed.clause.name in read:
            rows.setdefault(row_name(placed, attends), []).append(placed)
    for mine in rows.values():
        if all(isinstance(placed.clause, ast.Pick) for placed in mine):
            mine += enclosing(mine[0], attends)
    return {name: "\n".join(map(_clause, mine)) for name, mine in rows.items()}


def _clause(placed: Placed) -> str:
    when = f" at {', '.join(text(trigger) for trigger in placed.triggers)}" if placed.triggers else ""
    return text(placed.clause) + when


def _losers(placed: Sequence[Placed]) -> str:
    """What becomes of entries that are not kept, action by action."""
    found = {
        ", else ".join(text(loser) for loser in clause.losers) or "drop"
        for clause in (item.clause for item in placed)
        if isinstance(clause, ast.Keep)
    }
    return "; ".join(sorted(found))


def _triggers(placed: Sequence[Placed], rules: Sequence[ClassPlan]) -> Iterator[tuple[str, Trigger]]:
    """The triggers of some clauses as written, with what each is in the plan; the first rule may be no clause's."""
    for picks in (True, False):
        clauses = [item for item in placed if isinstance(item.clause, ast.Pick) == picks]
        decide = [rule for rule in rules if rule.only_picks == picks]
        for item, rule in zip(reversed(clauses), reversed(decide), strict=False):
            yield from zip(map(text, item.triggers), rule.triggers, strict=True)


# ---------------------------------------------------------------- costs


def _scores(context: Context, placed: Placed) -> Iterator[tuple[str, str]]:
    """The scores of a clause as words, with their cost classes."""
    clause = placed.clause
    if not isinstance(clause, SetClause):
        return
    for term in clause.set.terms:
        by = term.by if isinstance(term, ast.Selection) else term.cond if isinstance(term, ast.Where) else None
        if by is not None:
            defined = context.score_at(by.id, placed.prefixes) if isinstance(by, ast.Name) else None
            yield text(by if defined is None else defined), cost_of(context, by, placed, clause)


# ---------------------------------------------------------------- overshoot


def _wait(plan: PolicyPlan, trigger: Trigger, prompt: int) -> int | None:
    """Entries that may come into a row between two firings of a trigger; None where the sequence decides."""
    n = trigger.n or 0
    match trigger.kind:
        case "prefill.end":
            return prompt
        case "chunk":
            return min(n or plan.chunk or prompt, prompt)
        case "step":
            return 1
        case "every":
            return n
        case "filled":
            return n * plan.unit(trigger.unit).size if trigger.unit is not None else n
    return None


def _overshoots(plan: PolicyPlan, prompt: int, generate: int) -> dict[int, int]:
    """By the first class of each set of rows: the most that a row has before a decision and not after it."""
    parts = groups(plan, prompt)
    out: dict[int, int] = {}
    for forward in forwards(plan, prompt, generate):
        for group, before, after in zip(parts, forward.before, forward.after, strict=True):
            rows = group.rows * group.times
            extra = -(-(before - after) // rows) + forward.tokens
            owner = plan.named_like(next(rule for rule in group.rules if plan.classes[rule].rows_of is None))
            if extra > 0 and not all(plan.classes[rule].keeps_all for rule in group.rules):
                out[owner] = max(out.get(owner, 0), extra)
    return out
