"""What of a policy lies beyond the kernels: one refusal for each thing that has no Triton form yet.

Takes a plan and a class, a selection or a formula of it; raises `Unprintable` with a reason in the language's own
words. Guarantees: whatever no function here refuses means on Triton what it means in the reference.
"""

from __future__ import annotations

from kvcompile.kernels.counts import scalars_of
from kvcompile.kernels.plan import ClassPlan, Expr, PolicyPlan, Selection, source_of
from kvcompile.kernels.ranks import is_joint
from kvcompile.kernels.stages import Unprintable

_LEAVES = ("const", "scalar", "field", "evidence", "state", "landmark", "tile")  # beside these: reference and cpu alone
_SOURCES = ("forward", "last", "peek")
_HIDDEN = {"@count": "entries that stand for several tokens", "@score": "decisions that wait for all layers",
           "@read": "sets that steps go on with"}  # fmt: skip


def refuse(what: str) -> None:
    """Raise Unprintable: that this has no Triton form yet."""
    raise Unprintable(f"{what} no Triton form yet")


def formula(expr: Expr) -> Expr:
    """The formula itself, if it is made of what kernels can reach."""
    for node in expr.walk():
        source = source_of(node)
        if source is not None and source.kind not in _SOURCES:
            refuse("prev.q has" if source.kind == "previous" else f"q in {source.kind} has")
        if node.op == "noise":
            refuse("gumbel noise has")
        if node.op in ("learned", "ema", "queries", "sim") or (not node.args and node.op not in _LEAVES):
            refuse({"queries": "q outside attn and logit has"}.get(node.op, f"{node.op} has"))
    return expr


def pools(plan: PolicyPlan, carried: tuple[str, ...] = ()) -> None:
    """Entries that carry more than key, value, position, mark, the policy's own states and those that are `carried`."""
    for state in plan.states:
        if state.name.startswith("@") and state.name not in carried:
            refuse(f"{_HIDDEN.get(state.name.split(':')[0], _HIDDEN['@score'])} have")


def reads(plan: PolicyPlan) -> None:
    """Reads that are more than attention over entries as they lie."""
    if plan.compact:
        refuse("positions compact have")
    if plan.folds:
        refuse("an entry whose count weighs in the softmax has")


def after_reads(plan: PolicyPlan) -> None:
    """Reads of a step that leave more behind than a sum over queries."""
    reads(plan)
    for update in plan.updates:
        refuse(f"`on {update.event}`" + (" beyond one sum has" if update.event == "attend" else " has"))


def one_rule(cls: ClassPlan) -> None:
    """Rows that several rules judge: all but the first of these."""
    if cls.rows_of is not None or cls.only_picks:
        refuse(f"{cls.name}, which is one of several rules for the same rows, has")


def step_class(plan: PolicyPlan, cls: ClassPlan) -> None:
    """Classes whose decisions after a step are more than one set of one layer's rows."""
    one_rule(cls)
    if plan.picks:
        refuse("choices that later layers take over have")
    if cls.moves:
        refuse("losers that leave something behind have")
    if any(trigger.cond is not None for trigger in cls.triggers):
        refuse("triggers with a condition have")
    if any("len" in scalars_of(plan.counts[i]) for i in counts_of(cls)):
        refuse("counts that read len have")


def piece_class(plan: PolicyPlan, index: int) -> None:
    """Classes whose rows take a piece of a prompt first and are judged afterwards."""
    pools(plan)
    cls = plan.classes[index]
    one_rule(cls)
    if plan.spans(index):
        refuse("decisions that wait for all layers have")
    if cls.moves:
        refuse("losers that leave something behind have")


def contestants(term: Selection) -> None:
    """Scores that are not one number per entry of a row."""
    if term.unit is not None:
        refuse(f"selections per {term.unit} have")
    if term.whole is not None:
        refuse(f"selections of whole {term.whole}s have")
    if term.scope == "query_head":
        refuse("selections per query_head have")


def choice(term: Selection) -> None:
    """Choices that are more than the best n by one score of a head, of heads that share or of heads that compete."""
    contestants(term)
    if term.rank not in ("top", "bottom"):
        refuse(f"{term.rank} has")
    if term.layers != "each" or term.pick is not None:
        refuse("choices that layers share or compete for have")


def alone(plan: PolicyPlan, term: Selection) -> None:
    """Choices for which heads that other processes hold have to be asked."""
    if is_joint(plan, term):
        refuse("choices that the heads of several processes make together have")


def piece_choice(plan: PolicyPlan, term: Selection) -> None:
    """Choices whose number is known only once the rows are, at the end of a piece."""
    if term.fraction is not None and term.observed:
        refuse("a part of the candidates within which the newest count has")
    if term.count is not None and "len" in scalars_of(plan.counts[term.count]):
        refuse("counts that read len have")


def counts_of(cls: ClassPlan) -> list[int]:
    """Indices of the counts that a class's set reads, sorted."""
    return sorted({term.count for term in cls.keep if term.count is not None})
