"""`kvcompile learn`: which heads shall a policy's learned class have, or which units shall its queries read?

Takes a policy with a `learn` block, a model folder and data; writes a file for `--table`, says on stdout what is in it.
Guarantees: what is wrong with options, policy or the place of the result is found before the model is loaded; an
interrupted run with `--checkpoint` goes on where it was; under torchrun only the first process writes and speaks.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompile import cli_options as shared

if TYPE_CHECKING:
    from kvcompile.learning.block_gates import LearnedGates
    from kvcompile.learning.learn import Learned
    from kvcompile.learning.masks import HeadScores
    from kvcompile.passes.learning import DistilPlan

METHODS = ("train", "quick", "probe:induction", "probe:echo")
TRAINING = ("data", "steps", "batch", "lr", "checkpoint", "draws")  # options that the other methods have no use for
SHOWN = 64  # heads of a layer that are listed


def learn(
    policy: shared.Policy,
    model: shared.ModelFolder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write, .tsv or .safetensors.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="A .txt or .jsonl file, a folder, or suite:NAME.")
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="HOW", help=", ".join(METHODS) + ".")] = "train",
    name: shared.PolicyName = None,
    heads: Annotated[
        str | None, typer.Option("--heads", metavar="CLASS", help="Which class or score, where several are learned.")
    ] = None,
    settings: shared.Settings = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="PART", help="Part of the KV heads to mark, such as 30%.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Steps of the training.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", min=1, help="Sequences a step (1).")] = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="N", min=1, help="Tokens of a text or of a suite's prompt.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate of the gates.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of data, gates and texts.")] = 0,
    draws: Annotated[
        int | None,
        typer.Option(
            "--draws", metavar="N", min=1, help="Draws of gates a step, up to --batch, which it is by default."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="auto, bf16 or fp32.")] = "auto",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", help="Folder for the state; goes on from it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from the checkpoint, or start anew.")
    ] = True,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    compile_how: Annotated[str, typer.Option("--compile", metavar="HOW", help="off, eager or inductor.")] = "off",
    as_json: shared.AsJson = False,
) -> None:
    """Learn which heads a policy's learned class has, or which units its queries read, and write a file of it."""
    shared.choice(method, METHODS, "--method")
    shared.choice(dtype, ("auto", "bf16", "fp32"), "--dtype")
    shared.choice(compile_how, ("off", "eager", "inductor"), "--compile")
    given = {"data": data, "steps": steps, "batch": batch, "lr": lr, "checkpoint": checkpoint, "draws": draws}
    _check_use(method, given)
    params = shared.parameters(settings)
    _check_out(out)
    from kvcompile.learning.learn import Learned, part_kept, refuse_for_units
    from kvcompile.learning.learn import learn as learned
    from kvcompile.passes.facts import model_facts
    from kvcompile.passes.learning import DistilPlan, compile_learn

    for key in params:  # learn would take them for its own
        if key in inspect.signature(learned).parameters:
            raise typer.BadParameter(f"{key!r} is an option of learn, not a parameter of a policy", param_hint="--set")
    # Before any weight is read: the policy's mistakes, and a part that marks no head.
    facts = model_facts(shared.load_config(model))
    plan = compile_learn(policy, facts, name=name, heads=heads, **params)
    if isinstance(plan, DistilPlan):
        _check_units(plan, out, method)
        refuse_for_units(keep=keep, draws=draws, gradient_checkpointing=gradient_checkpointing, compile=compile_how)
    kept = part_kept(plan.keep if keep is None else keep, facts.layers * facts.kv_heads)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    first = os.environ.get("RANK", "0") == "0" or not several
    with shared.progress("loading the model"):
        decoder = shared.load_model(model, anywhere=not several)
        # Ready-made token ids need none.
        tokenizer = shared.load_tokenizer(model) if method == "train" and shared.has_tokenizer(model) else None
    if method == "train":
        try:
            found = learned(
                decoder, policy, data, name=name, heads=heads, steps=steps, batch=batch or 1, length=length, lr=lr,
                seed=seed, dtype=dtype, keep=keep, checkpoint=checkpoint, resume=resume, draws=draws,
                gradient_checkpointing=gradient_checkpointing, compile=compile_how, tokenizer=tokenizer,
                progress=sys.stderr.isatty(), **params,
            )  # fmt: skip
        except KeyboardInterrupt:
            there = checkpoint is not None and (checkpoint / "state.json").is_file()
            saved = f"; the state is in {checkpoint}, the same command goes on from it" if there else ""
            print(f"interrupted{saved}", file=sys.stderr)
            raise typer.Exit(1) from None
    else:
        with shared.progress("measuring heads"):
            found = Learned(_measured(method, decoder, plan, length, seed), kept, ())
    if not first:
        return
    found.save(out)
    use = f"--table {plan.heads}={out}"
    if as_json:
        shared.print_json(_as_data(found, out, use))
        return
    for line in _lines(found, plan.heads) if isinstance(found, Learned) else _gate_lines(found):
        typer.echo(line)
    typer.echo(f"written: {out}; use it with {use}")


def _check_use(method: str, given: dict[str, Any]) -> None:
    if method == "train" and given["data"] is None:
        raise typer.BadParameter(
            "give --data: a .txt or .jsonl file, a folder of them, or suite:NAME", param_hint="--data"
        )
    unused = [f"--{name}" for name in TRAINING if method != "train" and given[name] is not None]
    if unused:
        raise typer.BadParameter(f"{unused[0]} has no use with --method {method}, which trains nothing",
                                 param_hint=unused[0])  # fmt: skip


def _check_out(out: Path) -> None:
    """Find out before hours of work whether the file can be written."""
    from kvcompile.kernels.errors import KvCompileError

    if out.suffix not in (".tsv", ".safetensors"):
        raise typer.BadParameter(f"{out}: name a file that ends in .tsv or .safetensors", param_hint="--out")
    if out.is_dir():
        raise KvCompileError(f"--out {out}: is a folder; name a file in it")
    if not out.parent.is_dir():
        raise KvCompileError(f"--out {out}: there is no folder {out.parent}; make it first")
    shared.check_folder(out.parent, f"--out {out}")


def _measured(method: str, decoder: Any, plan: Any, length: int | None, seed: int) -> HeadScores:
    from kvcompile.learning.quick import probe_scores, quick_scores

    if method == "quick":
        return quick_scores(decoder, plan, tokens=length, seed=seed)
    return probe_scores(decoder, method.removeprefix("probe:"), length)


def _check_units(plan: DistilPlan, out: Path, method: str) -> None:
    if method != "train":
        raise typer.BadParameter(f"{method} measures heads, and `{plan.heads}` is a score of units: train it",
                                 param_hint="--method")  # fmt: skip
    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"{out}: gates of units are written as .safetensors", param_hint="--out")


def _as_data(found: Learned | LearnedGates, out: Path, use: str) -> dict[str, Any]:
    from kvcompile.learning.block_gates import LearnedGates

    if isinstance(found, LearnedGates):
        return {"out": str(out), "use": use, "trained": found.trained.as_json(), "provenance": found.provenance}
    keep, scores = found.keep, found.scores
    return {
        "out": str(out),
        "use": use,
        "keep": None if keep is None else str(keep),
        "heads": None if keep is None else sorted(scores.chosen(keep)),  # [layer, KV head]
        "scores": scores.values,
        "provenance": scores.provenance,
    }


def _gate_lines(found: LearnedGates) -> list[str]:
    """What the gates see, and how the training ended."""
    trained, first, last = found.trained, found.history[0], found.history[-1]
    layers = sum(name.endswith(".k") for name in found.tensors)
    queries = "the mean of a unit's queries" if trained.queries == "pooled" else "each query alone"
    return [
        f"gates of {layers} layers, for {queries} and the {', '.join(trained.landmarks)} of {trained.keys} over units "
        f"of {trained.unit} tokens",
        *(f"{name}: {first[name]:.4g} at first, {last[name]:.4g} at the end" for name in ("loss", "recall")),
    ]


def _lines(found: Learned, heads: str) -> list[str]:
    """The heads of each layer, or their scores where no part was asked for, and how the training ended."""
    scores, keep = found.scores, found.keep
    chosen = None if keep is None else scores.chosen(keep)
    lines = [f"{'layer':>5}  {'kept':>7}  {heads}" if chosen is not None else f"{'layer':>5}  scores"]
    for layer, row in enumerate(scores.values):
        if chosen is None:
            lines.append(f"{layer:5}  " + _listed([f"{value:.3f}" for value in row]))
            continue
        own = [head for head in range(len(row)) if (layer, head) in chosen]
        lines.append(f"{layer:5}  {f'{len(own)} of {len(row)}':>7}  {_listed(own)}".rstrip())
    if chosen is not None and keep is not None:
        lines.append(f"kept {len(chosen)} of {scores.heads} KV heads ({float(keep) * 100:g}% was asked for)")
    metrics = scores.provenance.get("metrics") or {}
    if metrics:
        lines.append("at the end: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return lines


def _listed(values: list[Any]) -> str:
    return " ".join(str(value) for value in values[:SHOWN]) + (" ..." if len(values) > SHOWN else "")
