"""What gates are learned for: the losses of a learn block, in parts that add up over processes, batches and draws.

Takes hidden states of mixed attention, labels and gates; gives a loss and its figures. Guarantees: logits exist for one
block of positions at a time, and parts computed apart (`totals`, `share`) sum to the loss of the whole, gradients too.
Sources: PruLong (arXiv 2506.17121): next token and Lagrangian; DuoAttention (2410.10819): hidden states and mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.gates import Gates
from kvcompile.learning.mixing import Hidden, Mix

if TYPE_CHECKING:
    from kvcompile.passes.learning import LearnPlan, LossTerm

POSITIONS = 2048  # whose logits are held at a time
NO_LABEL = -100


class Tokens(Protocol):
    """One batch, padded on the right: ids int64, labels int64 (what to predict from each position, -100 for nothing),
    answers bool (whose hidden states are compared); all [batch, tokens]."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def answers(self) -> Tensor: ...


class Totals(NamedTuple):
    """What the losses are means over: labelled tokens and answer positions, of all that is summed up."""

    labels: int
    answers: int

    @classmethod
    def of(cls, batches: Iterable[Tokens]) -> Totals:
        """The numbers of some batches together."""
        found = [(int((b.labels != NO_LABEL).sum()), int(b.answers.sum())) for b in batches]
        return cls(sum(labels for labels, _ in found), sum(answers for _, answers in found))


class Objective(nn.Module):
    """The loss of a learn block over a run of `total_steps` steps; owns the two multipliers of its Lagrangian."""

    def __init__(self, learn_plan: LearnPlan, total_steps: int) -> None:
        super().__init__()
        if total_steps < 1:
            raise KvCompileError(f"learning takes 1 step or more, not {total_steps}")
        self.plan, self.total_steps = learn_plan, total_steps
        self.linear = nn.Parameter(torch.zeros(()))
        self.square = nn.Parameter(torch.zeros(()))

    def loss(
        self,
        model: Any,
        mix: Mix,
        batch: Tokens,
        gates: Gates,
        z: Tensor,
        step: int,
        *,
        totals: Totals | None = None,
        share: float = 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch under gates z, float32 [layers, kv_heads] or [batch, layers, kv_heads], at step 0 to
        total_steps - 1.

        totals: the tokens of all batches whose losses are going to be added, here and in other processes; without them
        this batch's own. share: this call's part of the terms that do not follow from tokens; the shares of all calls
        that are added sum to 1. So the sum over calls is the loss, and gradients are added, never averaged.

        Of the figures "loss", "next_token" and "hidden_mse" add up over calls; "kept" (mean of z) and those of the
        Lagrangian ("target", "linear", "square") describe this call's gates. KvCompileError where no token is scored.
        """
        over = Totals.of([batch]) if totals is None else totals
        hidden = mix(batch.ids, z)
        loss = torch.zeros((), device=z.device)
        figures = {"kept": z.detach().mean()}
        for term in self.plan.terms:
            match term.kind:
                case "next_token":
                    part = next_token(model, hidden.student, batch.labels, over.labels)
                    figures["next_token"] = part.detach()
                case "hidden_mse":
                    part = hidden_mse(hidden, batch.answers, over.answers)
                    figures["hidden_mse"] = part.detach()
                case "lagrange":
                    target = target_at(term, step, self.total_steps)
                    part = share * self.lagrange(z, target)
                    figures |= {"target": z.new_tensor(target), "linear": self.linear.detach(),
                                "square": self.square.detach()}  # fmt: skip
                case "mean":
                    part = share * z.mean()
                case other:
                    raise KvCompileError(f"unknown loss {other!r}")
            loss = loss + term.weight * part
        figures["loss"] = loss.detach()
        values = torch.stack([value.float().to(z.device) for value in figures.values()]).tolist()  # one transfer
        return loss, dict(zip(figures, values, strict=True))

    def lagrange(self, z: Tensor, target: float) -> Tensor:
        """linear * (s - t) + square * (s - t)^2 for s, t the parts of heads that are not kept: of these very gates,
        not the expected one, and the target. The mean over sequences with gates of their own."""
        gap = (1 - z.mean((-2, -1))) - (1 - target)
        return (self.linear.to(z.device) * gap + self.square.to(z.device) * gap**2).mean()

    def backward(
        self,
        model: Any,
        mix: Mix,
        batches: Iterable[Tokens],
        gates: Gates,
        generator: torch.Generator | None,
        step: int,
        *,
        draws: int = 1,
        first: int = 0,
        sequences: int | None = None,
        totals: Totals | None = None,
    ) -> dict[str, float]:
        """One step's gradients, added to what is there.

        draws: how often z is drawn; the step's sequences are shared out among the draws in order, because a loss of few
        gates is judged far better by many draws on a text each than by one on all. first, sequences: which of the
        step's sequences these batches begin with, and how many there are in all processes; totals: as for `loss`.
        Processes with equal generators draw alike. Figures add up over processes.
        """
        given = list(batches)
        whole = sum(len(batch.ids) for batch in given) if sequences is None else sequences
        if not given or not 1 <= draws <= whole:
            raise KvCompileError(f"a step of {whole} sequences takes 1 to {whole} draws of gates, not {draws}")
        gates.advance(step / self.total_steps)
        over = Totals.of(given) if totals is None else totals
        z = torch.stack([gates.sample(generator) for _ in range(draws)])
        leaf = z.detach().requires_grad_()  # so that the gates' own graph outlives the first batch
        figures: dict[str, float] = {}
        for batch in given:
            count = len(batch.ids)
            own = leaf[(torch.arange(first, first + count) * draws // whole).to(leaf.device)]
            loss, found = self.loss(model, mix, batch, gates, own, step, totals=over, share=count / whole)
            loss.backward()
            for name, value in found.items():
                part = 1.0 if name in ("loss", "next_token", "hidden_mse") else count / whole
                figures[name] = figures.get(name, 0.0) + part * value
            first += count
        z.backward(leaf.grad)
        return figures


def target_at(term: LossTerm, step: int, total_steps: int) -> float:
    """The part of heads that is to be kept at a step: from 1, in a straight line over the ramp, to the target."""
    assert term.target is not None
    length = math.ceil(Fraction(term.ramp or 0) * total_steps)
    return 1 - float(1 - term.target) * (min(1.0, step / length) if length else 1.0)


def next_token(model: Any, hidden: Tensor, labels: Tensor, total: int) -> Tensor:
    """Cross entropy of labels int64 [B, T] (-100: none), summed and divided by `total`, float32.

    hidden [B, T, channels], after the final norm. Logits are made for 2048 labelled positions at a time, and made
    again in the backward pass: 128k positions of a vocabulary of 128k would take 64 GB.
    """
    if total < 1:
        raise KvCompileError("no token of this batch has a label: there is nothing to predict")
    head, scored = output_head(model), labels != NO_LABEL
    states, wanted = hidden[scored], labels[scored]
    out = states.float().sum() * 0  # so that a process without labels takes part in the backward pass
    for at in range(0, len(wanted), POSITIONS):
        block = states[at : at + POSITIONS], wanted[at : at + POSITIONS]
        out = out + checkpoint(_surprise, head, *block, use_reentrant=False, preserve_rng_state=False)
    return out / total


def _surprise(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), labels, reduction="sum")


def output_head(model: Any) -> nn.Module:
    """The module that makes logits; KvCompileError for models that do more to them than that."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name, plain in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        if getattr(config, name, None) not in (None, plain):
            raise KvCompileError(f"{type(model).__name__} scales its logits ({name}), which is not supported yet")
    head: nn.Module = model.get_output_embeddings()
    return head


def hidden_mse(hidden: Hidden, answers: Tensor, total: int) -> Tensor:
    """Squared distance of student and teacher, mean over channels, at answers bool [B, T], over `total`, float32."""
    if total < 1:
        raise KvCompileError("no position of this batch is an answer: there is nothing to compare")
    if hidden.teacher is None:
        raise KvCompileError("hidden states are compared with a teacher's, and none runs beside this student")
    apart = hidden.student[answers].float() - hidden.teacher[answers].float()
    return (apart**2).mean(-1).sum() / total
