"""Distillation of block gates: the loop that makes a policy's trained score, on a model that stays as it is.

Takes a model, a plan and sequences; gives `LearnedGates`. Guarantees: the model's weights, modes and attention are as
before, however the call ends; a step follows from the state before it, the seed and its number, so a run that was
stopped ends as one that was not; memory for one layer's queries and keys of one text, and a block of weights.
Sources: SeerAttention (arXiv:2410.13276), SeerAttention-R (arXiv:2506.08889).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.rotary import rotate
from kvcompile.learning.block_gates import BlockGates, LearnedGates, trained_on
from kvcompile.learning.checkpoints import State, prepared, read_files, save_state, state_of
from kvcompile.learning.data import Data, number
from kvcompile.learning.optimizer import cosine
from kvcompile.learning.targets import Text, asked_in, divergence, gate_logits, recalled, rows_of, true_parts, units_of
from kvcompile.learning.training import STATES, Run, bar
from kvcompile.passes.learning import DistilPlan
from kvcompile.passes.sites import AttentionSite, find_sites
from kvcompile.probe import observe
from kvcompile.rotary import RopeTable

RATE, CLIP = 1e-3, 1.0  # of AdamW without decay, as published; norm of all gradients together
THETA = 10000.0


def distil(model: nn.Module, plan: DistilPlan, data: Data, run: Run, told: dict[str, Any]) -> LearnedGates:
    """Run all steps. told: the provenance so far. KvCompileError for texts in which no query has two units to choose
    from, a checkpoint that cannot be gone on from, and a loss that is no number any more."""
    _check_long(plan, data)
    sites = find_sites(model)
    rope = RopeTable(model, sites) if plan.gate.raw else None
    teacher = _Teacher(plan, sites, rope, first_gates(plan, rope, model, run.seed))
    trainer = _Trainer(teacher, run)
    trainer.restore()
    if run.checkpoint is not None and trainer.done < run.steps:
        prepared(run.checkpoint)
    with _resting(model), bar(run.progress, run.steps) as tell:
        try:
            while trainer.done < run.steps:
                trainer.step(model, data)
                tell(trainer.history[-1])
                if trainer.done % max(1, run.steps // STATES) == 0 or trainer.done == run.steps:
                    trainer.save()
        except KeyboardInterrupt:
            trainer.save()
            raise
    final = {key: value for key, value in trainer.history[-1].items() if key != "step"}
    return LearnedGates(teacher.gates.tensors(), trained_on(plan), {**told, "metrics": final}, tuple(trainer.history))


def first_gates(plan: DistilPlan, rope: RopeTable | None, model: nn.Module, seed: int) -> BlockGates:
    """The gates before the first step, on the host."""
    generator = torch.Generator().manual_seed(number("block gates", seed))
    return BlockGates(plan, None if rope is None else _angles(rope, model, plan.gate.width), generator)


def _angles(rope: RopeTable, model: Any, width: int) -> Tensor:
    """Angle per position of each pair of channels in gate space: the model's own where the width is its heads', else
    those of its base."""
    own = rope.rotary.inv_freq.detach().float().cpu()
    if 2 * len(own) == width:
        return own.clone()
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    given = getattr(config, "rope_parameters", None) or {}
    theta = float(given.get("rope_theta") or getattr(config, "rope_theta", None) or THETA)
    return theta ** -(torch.arange(0, width, 2).float() / width)


@dataclass
class _Teacher:
    """Compares gates with the attention of each layer, as `probe.Observer`, and leaves gradients in the gates."""

    plan: DistilPlan
    sites: tuple[AttentionSite, ...]
    rope: RopeTable | None
    gates: BlockGates
    total: int = 1  # rows that this step's losses are the mean over
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def begin(self, lengths: list[int]) -> None:
        facts, gate = self.plan.facts, self.plan.gate
        heads = facts.layers * (facts.kv_heads if gate.joined else facts.q_heads)
        self.total = max(1, heads * sum(rows_of(gate, tokens) for tokens in lengths))
        self.sums = torch.zeros(3, dtype=torch.float64)

    def figures(self) -> dict[str, float]:
        loss, hits, judged = self.sums.tolist()
        return {"loss": loss / self.total, "recall": hits / judged if judged else 0.0}

    def note(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        gate, (kv_heads, tokens) = self.plan.gate, k.shape[1:3]
        units = units_of(gate, tokens)
        if not units:
            return
        with torch.autocast(q.device.type, enabled=False), torch.enable_grad():
            text = self._text(q[0].unflatten(0, (kv_heads, -1)).float(), k[0].float(), scale)
            for head in range(kv_heads):
                for some in asked_in(gate, tokens, text.q.shape[1]):
                    with torch.no_grad():
                        target = true_parts(gate, text, head, some, units)
                    found = gate_logits(gate, self.gates.layer(layer, q.device), text, head, some, units)
                    loss = divergence(target, found)
                    (loss / self.total).backward()
                    hits, judged = recalled(target, found.detach(), some)
                    self.sums += torch.stack([loss.detach().double(), hits.double(), judged.double()]).cpu()

    def _text(self, q: Tensor, k: Tensor, scale: float) -> Text:
        if self.rope is None:
            return Text(q, k, q, k, scale)
        places, table = torch.arange(k.shape[1], device=k.device), self.rope.upto(k.shape[1]).to(k.device)
        return Text(q, k, rotate(q, places, table, back=True), rotate(k, places, table, back=True), scale)


class _Trainer:
    """Gates, optimiser and history: a step moves all of them or none."""

    def __init__(self, teacher: _Teacher, run: Run) -> None:
        rate = RATE if run.lr is None else run.lr
        if not 0 < rate < math.inf:
            raise KvCompileError(f"a learning rate is above 0, not {rate}")
        self.teacher, self.run, self.rate = teacher, run, rate
        self.weights = list(teacher.gates.parameters())
        self.adam = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.0)
        self.history: list[dict[str, Any]] = []
        self._saved: int | None = None

    @property
    def done(self) -> int:
        return len(self.history)

    def step(self, model: nn.Module, data: Data) -> None:
        """One step on the sequences of its number. An exception before its end leaves the state before it."""
        run, rows = self.run, data.chosen(self.run.seed, self.done, self.run.batch)
        self.teacher.begin([len(row.ids) for row in rows])
        self.adam.zero_grad()
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype=run.dtype, enabled=run.dtype is not None):
            observe(model, [row.ids.long() for row in rows], self.teacher)
        figures = self.teacher.figures()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        if not math.isfinite(figures["loss"]) or not bool(norm.isfinite()):
            raise KvCompileError(
                f"step {self.done + 1}: the loss is {figures['loss']:g} or has no gradient, so learning has diverged; "
                "take a lower lr, dtype='fp32', or look for odd sequences in the data"
            )
        for group in self.adam.param_groups:
            group["lr"] = self.rate * cosine(self.done, run.steps)
        self.adam.step()
        self.history.append({"step": self.done + 1, **figures, "grad_norm": float(norm)})

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the last whole step, once, where a folder was named."""
        if self.run.checkpoint is None or self._saved == self.done:
            return
        save_state(self.run.checkpoint, State(self.done, self._tensors(), tuple(self.history)), self.run.identity)
        self._saved = self.done

    def restore(self) -> None:
        """Go on from the folder's state."""
        folder = self.run.checkpoint
        files = read_files(folder) if folder is not None and self.run.resume else None
        if files is None or folder is None:
            return
        state = state_of(files, folder, self.run.identity)
        if state.step:
            self._take(state, folder)
        self.history, self._saved = list(state.history), state.step

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, weight in enumerate(self.weights):
            found[f"{i}"] = weight
            found |= {f"{i}.{name}": value for name, value in self.adam.state[weight].items()}
        return found

    def _take(self, state: State, folder: Path) -> None:
        for i, weight in enumerate(self.weights):
            own = {name: state.tensors.get(f"{i}.{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
            saved, (moved, first, second) = state.tensors.get(f"{i}"), own.values()
            if saved is None or moved is None or first is None or second is None or not (
                saved.shape == first.shape == second.shape == weight.shape
            ):  # fmt: skip
                raise KvCompileError(f"checkpoint {folder} is damaged: its tensors are not those of this run")
            with torch.no_grad():
                weight.copy_(saved)
            self.adam.state[weight] = {"step": moved.clone(), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}


# ---------------------------------------------------------------- what is looked at before


def _check_long(plan: DistilPlan, data: Data) -> None:
    gate, most = plan.gate, max(len(row.ids) for row in data.rows)
    if units_of(gate, most) < 2:
        raise KvCompileError(
            f"{data.description}: in sequences of up to {most} tokens no query has two units of {gate.size} to choose "
            "from; give longer sequences (--length), or smaller units (--set)"
        )


@contextlib.contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
