"""`learn`: which heads a policy's learned class shall have, or which units its trained score names, on a frozen model.

Takes a Hugging Face model, a policy with a `learn` block and data; gives scores of all KV heads and a mask to save, or
gates of units.
Guarantees: the model's weights, modes, configuration and forwards are as before, however the call ends; the same
arguments give the same scores on the same machine; what can be seen to be in vain is refused before the first step.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.readable import last_readers
from kvcompile.learning.block_gates import LearnedGates
from kvcompile.learning.data import Data
from kvcompile.learning.distil import distil
from kvcompile.learning.gates import Gates
from kvcompile.learning.masks import HeadScores, part_of, provenance
from kvcompile.learning.sources import Reader, load_data
from kvcompile.learning.spread import group_of
from kvcompile.learning.training import Run, first_gates, train
from kvcompile.passes.facts import model_facts
from kvcompile.passes.learning import DistilPlan, LearnPlan, compile_learn
from kvcompile.passes.sites import find_sites

# As published, per kind of gate.
STEPS = {"hard_concrete": 1000, "sparsemax": 1000, "clamp01": 2000, "block_gate": 500, "query_gate": 800}
MOST = {"steps": 1 << 20, "batch": 1 << 16, "draws": 1 << 16, "length": 1 << 24}
COMPILE = ("off", "eager", "inductor")
DTYPES = ("auto", "bf16", "fp32")
STILL = 1e-3  # scores that all stay this near to where they began have not moved
APART = ("model", "data", "keep", "metrics", "versions")  # of provenance: digests say more, or the run is the same
SAMPLED = 1024  # values of each weight that a model's digest looks at


@dataclass(frozen=True)
class Learned:
    """What `learn` found. keep: the part of the KV heads that `save` marks; None: it saves the scores themselves.

    history: one dict a step: `step`, `loss`, `next_token` or `hidden_mse`, `kept` (mean gate), with a target `target`,
    `linear` and `square` (the multipliers), `grad_norm`.
    """

    scores: HeadScores
    keep: Fraction | None
    history: tuple[dict[str, Any], ...]

    def save(self, path: str | Path) -> None:
        """Write .tsv (0 and 1 with `keep`, else scores) or .safetensors (scores, mask, provenance)."""
        self.scores.save(path, self.keep)


def learn(
    model: nn.Module,
    policy: Any,
    data: Any,
    *,
    name: str | None = None,
    heads: str | None = None,
    steps: int | None = None,
    batch: int = 1,
    length: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    keep: Fraction | float | str | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    gradient_checkpointing: bool = False,
    compile: str = "off",
    draws: int | None = None,
    tokenizer: Any = None,
    progress: bool = False,
    **params: Any,
) -> Learned | LearnedGates:
    """Learn the heads of a class, or a trained score, by the policy's `learn` block; weights stay as they are.

    policy, name, params: as in `optimize`. heads: the class or score, where a policy has several blocks. data: a path
    to .txt or .jsonl or a folder of such files, `suite:NAME`, or `kvcompile.learning.data.Sequence` objects. steps:
    1000; 2000 with clamp01 gates, 500 and 800 for block_gate and query_gate. batch: sequences a step, of all processes
    together. length: tokens of a window of text, or of a suite's prompts (the model's positions, 4096 at most). lr: of
    the gates (1.0; 0.02 with clamp01, 0.001 of units). draws: how often gates are drawn in a step, whose sequences are
    shared out among them, 1 to `batch`; None: for each sequence. keep: part of the KV heads that is marked when saved
    (what the block says). dtype: "auto" computes in the weights' own type; "bf16" under autocast, which leaves the
    weights alone; "fp32" wants float32 weights. checkpoint: a folder for the state, which an equal call goes on from
    unless `resume` is False. compile: "off", "eager" or "inductor". tokenizer: needed for text; by default that of the
    folder that the model was loaded from.

    Under torchrun every process calls this alike; with GPUs leave the model on the CPU, each process shards a copy.
    Gates of units are trained by one process; draws, keep, compile and gradient checkpointing have no use for them.
    Raises PolicyError for the policy, KvCompileError for the rest.
    """
    asked = {"batch": batch, "draws": batch if draws is None else draws, "length": length, "steps": steps}
    _check_numbers(asked, seed, dtype, compile)
    if checkpoint is not None and Path(checkpoint).exists() and not Path(checkpoint).is_dir():
        raise KvCompileError(f"checkpoint {checkpoint} is a file: name a folder")
    find_sites(model)  # refuses what has no attention to mix, before anything else is read
    facts = model_facts(model)
    plan = compile_learn(policy, facts, name=name, heads=heads, **params)
    if isinstance(plan, DistilPlan):
        refuse_for_units(keep=keep, draws=draws, gradient_checkpointing=gradient_checkpointing, compile=compile)
    kept = part_kept(plan.keep if keep is None else keep, facts.layers * facts.kv_heads)
    draws = batch if draws is None else draws
    steps = steps or STEPS[plan.kind]
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    text = isinstance(data, (str, Path))
    words = _own_tokenizer(model) if tokenizer is None and text else tokenizer
    reader = Reader(words, int(config.vocab_size), positions, length)
    kinds = {term.kind for term in plan.terms}
    found = load_data(
        data, reader, count=steps * batch, seed=seed, labels="next_token" in kinds, answers="hidden_mse" in kinds
    )
    if isinstance(plan, LearnPlan):
        _check_apart(plan, found)
    about = {
        **provenance(model, plan, method="learn", data=found.description, steps=steps, seed=seed),
        "model_digest": model_digest(model),
        "data_digest": found.digest,
        "batch": batch,
        "draws": draws,
        "lr": lr,
        "dtype": dtype,
        "keep": None if kept is None else str(kept),
    }
    run = Run(
        steps=steps,
        batch=batch,
        seed=seed,
        draws=draws,
        lr=lr,
        dtype=_autocast(dtype, model),
        compile=compile,
        again=gradient_checkpointing,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        resume=resume,
        progress=progress,
        identity={key: value for key, value in about.items() if key not in APART},
    )
    if isinstance(plan, DistilPlan):
        return distil(model, plan, found, run, about)
    gates, history = train(model, plan, found, run, group_of(next(model.parameters()).device))
    scores = _moved(plan, gates, seed, steps)
    final = {key: value for key, value in history[-1].items() if key != "step"}
    values = tuple(tuple(row) for row in scores.tolist())
    return Learned(HeadScores(values, {**about, "metrics": final}), kept, history)


# ---------------------------------------------------------------- what is asked for


def part_kept(keep: Any, heads: int) -> Fraction | None:
    """A part of all KV heads as `part_of` reads it. KvCompileError where it is none, or marks no head."""
    if keep is None:
        return None
    part = part_of(keep)
    if int(part * heads) == 0:
        raise KvCompileError(f"{keep} of this model's {heads} KV heads is none at all; give 1/{heads} or more")
    return part


def refuse_for_units(**given: Any) -> None:
    """KvCompileError for options that say something of head classes, and for several processes."""
    for name, value in given.items():
        if value not in (None, False, "off"):
            raise KvCompileError(f"{name}={value!r} has no use for gates of units: leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KvCompileError("gates of units are trained by one process: start it without torchrun")


def _check_numbers(counts: Mapping[str, int | None], seed: Any, dtype: str, compile: str) -> None:
    for name, value in counts.items():
        if value is None and name != "batch":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST[name]:
            raise KvCompileError(f"{name}={value!r}: give a whole number from 1 to {MOST[name]}")
    if (counts["draws"] or 0) > (counts["batch"] or 0):
        raise KvCompileError(
            f"draws={counts['draws']}: a step of {counts['batch']} sequences has no use for more draws"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise KvCompileError(f"seed={seed!r}: give a whole number")
    for name, word, words in (("dtype", dtype, DTYPES), ("compile", compile, COMPILE)):
        if word not in words:
            raise KvCompileError(f"{name}={word!r}: one of {', '.join(words)}")


def _autocast(dtype: str, model: nn.Module) -> torch.dtype | None:
    """What autocast computes in. Casting the weights instead would leave them rounded, or need them twice."""
    own = next(model.parameters()).dtype
    if dtype == "fp32" and own != torch.float32:
        raise KvCompileError(f"dtype='fp32' with weights in {own}: load the model in float32, or leave dtype out")
    return torch.bfloat16 if dtype == "bf16" and own != torch.bfloat16 else None


def _check_apart(plan: LearnPlan, data: Data) -> None:
    """Refuse data in which the two classes read the same: no gate would have a gradient."""
    facts, total = plan.plan.facts, data.longest
    for layer in range(facts.layers):
        for head in range(facts.kv_heads):
            both = [last_readers(plan.plan, cls, layer, head, total) for cls in (plan.full, plan.local)]
            if not torch.equal(*both):
                return
    raise KvCompileError(
        f"{data.description}: in sequences of up to {total} tokens a `{plan.others}` head reads the same as a "
        f"`{plan.heads}` head, so the gates would not move; give longer sequences (--length), or let `{plan.others}` "
        "keep less (--set)"
    )


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer in the folder that the model was loaded from, if there is one."""
    folder = Path(str(getattr(model.config, "_name_or_path", "") or ""))
    if not folder.name or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


# ---------------------------------------------------------------- what came of it


def _moved(plan: LearnPlan, gates: Gates, seed: int, steps: int) -> Tensor:
    """The scores, where they say something; KvCompileError where they are what they were, or all the same."""
    scores, first = gates.scores(), first_gates(plan, seed).scores()
    apart = float((scores - first).abs().max())
    if apart < STILL:
        why = f"after {steps} steps no score is further than {apart:.1e} from where it began"
    elif scores.numel() > 1 and float(scores.max() - scores.min()) < 1e-6:
        why = f"after {steps} steps all {scores.numel()} scores are {float(scores.flatten()[0]):.4f}"
    else:
        return scores
    raise KvCompileError(
        f"the gates did not move: {why}; take more steps, a higher lr, or data in which answers depend on what lies "
        f"further back than a `{plan.others}` head reads"
    )


def model_digest(model: nn.Module) -> str:
    """sha256 over names, shapes, types and some values of all weights: tells models apart without reading them all."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)].double().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()
