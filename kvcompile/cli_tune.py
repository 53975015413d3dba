"""The command that chooses launch constants: tune.

Takes a policy and a local model folder; gives the best configuration of each Triton kernel, and files it for later
runs. Guarantees: reads no weights; only `--effort none` works without the device, and what it writes is marked
analytic; each kernel's result is written when it is there, and what failed writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompile import cli_options as shared


def tune(
    policy: shared.Policy,
    model: shared.ModelFolder,
    effort: Annotated[
        str, typer.Option("--effort", metavar="HOW", help="none (ranked by a model), quick or full (timed).")
    ] = "quick",
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU; default: the one here.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of a launch.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Entries of a row, tokens of a prompt.")] = 4096,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    as_json: shared.AsJson = False,
) -> None:
    """Choose the launch constants of a policy's kernels for a GPU."""
    shared.choice(effort, ("none", "quick", "full"), "--effort")
    options = shared.use_options(name, settings, tables, "auto", "off")
    shared.check_first(policy, options)
    place = _gpu(effort, gpu)
    from kvcompile.kernels import offline
    from kvcompile.kernels.headers import Sizes
    from kvcompile.kernels.tuning_search import search
    from kvcompile.kernels.tuning_store import save

    plan = _plan(policy, model, options)
    timer = _timer() if effort != "none" else None
    compiles = offline.has_triton()
    if not compiles:
        typer.echo("Triton is not installed: registers and spills are guessed, not compiled", err=True)
    written: list[Path] = []
    found = search(
        plan, Sizes(batch, tokens, place), effort, timer, lambda what: typer.echo(what, err=True), compiles,
        lambda outcome: written.append(save((outcome.entry,), place)),
    )  # fmt: skip
    path = written[-1] if written else None
    if as_json:
        shared.print_json({"gpu": place.reported[0], "file": path, "kernels": [_facts(outcome) for outcome in found]})
    else:
        for outcome in found:
            typer.echo(outcome.line())
    if effort == "none" and found:
        typer.echo("nothing was timed: this is the ranking of an analytic model, and is marked so", err=True)
    typer.echo(f"written to {path}" if path else "this policy needs no Triton kernel", err=True)


def _device() -> Any:
    """The GPU here as `kernels.gpus.Gpu`, or None."""
    import torch

    from kvcompile.kernels.gpus import of_device

    return of_device() if torch.cuda.is_available() else None


def _timer() -> Any:
    from kvcompile.kernels.tuning_device import DeviceTimer

    return DeviceTimer()


def _gpu(effort: str, name: str | None) -> Any:
    """The GPU to tune for; an error where it must be timed and is not here."""
    from kvcompile.kernels.errors import KvCompileError
    from kvcompile.kernels.gpus import GPUS, gpu

    here = _device()
    wanted = here if name is None else gpu(name)
    if here is not None and wanted.name == here.name:
        return here
    if wanted is not None and effort == "none":
        return wanted
    there = "there is no CUDA device here" if here is None else f"the device here is {here.reported[0]}"
    asked = "" if wanted is None else f", not {wanted.reported[0]}"
    way = "--effort none" if name is not None else f"--effort none --gpu NAME ({', '.join(GPUS)})"
    raise KvCompileError(f"nothing was timed: {there}{asked}; {way} writes the ranking of an analytic model instead")


def _plan(policy: str, model: Path, options: dict[str, Any]) -> Any:
    """The policy bound to a model folder's configuration; reads no weights."""
    from kvcompile.passes import compile_policy
    from kvcompile.passes.facts import model_facts

    facts = model_facts(shared.load_config(model))
    chosen = {key: options[key] for key in ("name", "tables")}
    return compile_policy(policy, facts, **chosen, **shared.policy_parameters(options)).plan


def _facts(outcome: Any) -> dict[str, Any]:
    entry = outcome.entry
    return {
        "kernel": outcome.spec.name,
        "config": dict(entry.config),
        "how": entry.how,
        "microseconds": entry.seconds * 1e6,
        "untuned_microseconds": None if outcome.own is None else outcome.own * 1e6,
        "bucket": {"rows": entry.key.bucket.rows, "tokens": entry.key.bucket.tokens},
        "candidates": outcome.candidates,
        "fitting": outcome.fitting,
        "timed": outcome.timed,
        "compiled": outcome.compiled,
        "versions": dict(entry.versions),
    }
