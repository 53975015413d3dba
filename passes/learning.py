"""Learning: a policy's learn block, bound to a model.

Takes a policy as the user gives it, and the facts of a model; gives `LearnPlan`: gates, loss, and the policy compiled
with every KV head in the learned class; or `DistilPlan`, for a trained score. Guarantees: no file of a table or of
weights is read; both classes' sets are regions whose members follow from positions and `now`; what cannot be learned
ends in PolicyError at its own place.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

from kvcompile.dsl import Diagnostic, PolicyError, Resolved, ast, check, library, load, resolve
from kvcompile.dsl.check_learn import check_block, learned_classes
from kvcompile.dsl.context import Context as Checking
from kvcompile.dsl.context import Enough
from kvcompile.dsl.diagnostics import did_you_mean, fail
from kvcompile.dsl.learn_block import Block
from kvcompile.dsl.learn_gate import GateBlock, check_gate_block, trained_scores
from kvcompile.dsl.load import library_file
from kvcompile.dsl.printer import canonical
from kvcompile.kernels.plan import ClassPlan, ModelFacts, PolicyPlan
from kvcompile.passes.context import Context
from kvcompile.passes.pipeline import compile_resolved


@dataclass(frozen=True, slots=True)
class GatePlan:
    """How the gate of a KV head becomes a number from 0 to 1.

    kind "hard_concrete": options low, high and temperature (Louizos et al., arXiv:1712.01312, section 2.2); "clamp01":
    none; "sparsemax": temperature. Options are sorted by name, with their defaults filled in. `init`: where every gate
    starts.
    """

    kind: str
    init: float
    options: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of the loss, times `weight`.

    kind "next_token": cross entropy; "hidden_mse": squared distance of hidden states at answer tokens, from a clean
    teacher; "mean": mean of the gates; "lagrange": two multipliers, raised against mean of the gates = `target`, the
    part of the heads that is kept, which is reached over the part `ramp` of all steps. Others have neither.
    """

    kind: str
    weight: float
    target: Fraction | None
    ramp: Fraction | None


@dataclass(frozen=True, slots=True)
class LearnPlan:
    """Everything that a training needs of a policy.

    heads, others: the learned class and the one mixed with it. plan: class `heads` owns every KV head of the model, and
    `others` has none. full, local: their sets, members of `plan.classes`. keep: the part of the KV heads that the class
    shall get, by `lagrange` or `sparsemax`; None where the block does not say. digest: of the resolved policy and the
    block, whatever the model.
    """

    policy: str
    heads: str
    others: str
    gate: GatePlan
    terms: tuple[LossTerm, ...]
    plan: PolicyPlan
    full: ClassPlan
    local: ClassPlan
    keep: Fraction | None
    digest: str

    @property
    def kind(self) -> str:
        """The word of the language for the gates."""
        return self.gate.kind

    @property
    def two_way(self) -> bool:
        """Whether a clean teacher runs beside the student, and full attention reads the teacher's states (Duo)."""
        return any(term.kind == "hidden_mse" for term in self.terms)


@dataclass(frozen=True, slots=True)
class DistilPlan:
    """Everything that the distillation of a policy's trained gates needs of it, see `GateBlock`.

    heads: the score that reads the gates, by whose name their file is given. digest: as of `LearnPlan`.
    """

    policy: str
    heads: str
    gate: GateBlock
    facts: ModelFacts
    digest: str
    terms: tuple[LossTerm, ...] = ()  # none looks at labels: the model's own attention is what is learned
    keep: Fraction | None = None

    @property
    def kind(self) -> str:
        """The word of the language for the gates."""
        return "block_gate" if self.gate.pooled else "query_gate"


def compile_learn(
    policy: object, facts: ModelFacts, *, name: str | None = None, heads: str | None = None, **params: object
) -> LearnPlan | DistilPlan:
    """The learn block of a policy for a model.

    policy, name, params: as in `optimize`. heads: which class, or which trained score, to learn, where the policy has
    several learn blocks. PolicyError for everything that is wrong with policy or block.
    """
    resolved = resolve(load(policy, name), params)
    learn = _chosen(resolved, heads)
    checking, block, gate = Checking.of(resolved), None, None
    trained = learn.heads.id in trained_scores(resolved)
    with suppress(Enough):
        if trained:
            gate = check_gate_block(checking, learn)
        else:
            block = check_block(checking, learn)
    _refuse((*resolved.findings, *check(resolved), *checking.findings.values()))
    text = f"{resolved.digest}\n{canonical(learn)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if trained:
        assert gate is not None
        return DistilPlan(resolved.name, learn.heads.id, gate, facts, digest)
    assert block is not None  # whatever keeps a block from being read is an error
    compiled = compile_resolved(resolved, Context(facts, learning=(learn.heads.id, block.others)))
    classes = {cls.name: cls for cls in compiled.plan.classes}
    return LearnPlan(
        policy=resolved.name,
        heads=learn.heads.id,
        others=block.others,
        gate=_gate(block),
        terms=tuple(LossTerm(t.kind, float(t.weight), t.target, t.ramp) for t in block.terms),
        plan=compiled.plan,
        full=classes[learn.heads.id],
        local=classes[block.others],
        keep=block.keep,
        digest=digest,
    )


def _gate(block: Block) -> GatePlan:
    options = tuple(sorted((name, float(value)) for name, value in block.options if name not in ("init", "keep")))
    return GatePlan(block.gate, float(dict(block.options)["init"]), options)


def _chosen(resolved: Resolved, heads: str | None) -> ast.Learn:
    """The learn block of a class, or the only one."""
    blocks: dict[str, ast.Learn] = {}
    for learn in resolved.learns:
        blocks.setdefault(learn.heads.id, learn)  # a second one of a class is an error of its own
    where = resolved.header.header
    if not blocks:
        having = sorted(name for name in library.names() if library_file(name).learns)
        classes = learned_classes(resolved)
        shape = f"write `learn {heads or next(iter(classes), 'HEADS')} for {resolved.name}:` with gate, mix, loss and "
        raise fail("K815", f"policy `{resolved.name}` has no learn block", where,
                   f"{shape}freeze below it; of the library {', '.join(having)} have one")  # fmt: skip
    if heads is None and len(blocks) > 1:
        listed = ", ".join(blocks)
        raise fail("K815", f"policy `{resolved.name}` has learn blocks for {listed}", where,
                   f'pick one: --heads {next(iter(blocks))}, or heads="{next(iter(blocks))}"')  # fmt: skip
    if heads is not None and heads not in blocks:
        raise fail("K815", f"policy `{resolved.name}` has no learn block for `{heads}`", where,
                   did_you_mean(heads, blocks, "it learns"))  # fmt: skip
    return blocks[heads] if heads is not None else next(iter(blocks.values()))


def _refuse(findings: tuple[Diagnostic, ...]) -> None:
    errors = tuple(dict.fromkeys(f for f in findings if f.severity == "error"))
    if errors:
        raise PolicyError(*errors)
