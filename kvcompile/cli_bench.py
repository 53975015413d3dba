"""The command that measures speed: bench.

Takes a policy and a local model folder; gives times, bytes and footprint of the policy beside the untouched model, or
with --kernels the time of each generated Triton file. Guarantees: sizes are checked before weights are loaded; only
`--kernels` needs a GPU, and says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompile import cli_options as shared

USUAL = 2048  # tokens of a prompt where none are asked for and the model has positions for them
Against = Annotated[
    list[str] | None,
    typer.Option("--against", metavar="WHAT", help="untouched (the default), reference, or a policy; may be repeated."),
]


def bench(
    policy: shared.Policy,
    model: shared.ModelFolder,
    prompt: Annotated[
        int | None, typer.Option("--prompt", metavar="N", min=1, help=f"Made-up prompt tokens. [default: {USUAL}]")
    ] = None,
    generate: Annotated[int, typer.Option("--generate", metavar="N", min=1, help="Decode forwards.")] = 32,
    batch: Annotated[int, typer.Option("--batch", metavar="B", min=1, help="Sequences.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", metavar="R", min=1, help="Turns of each contestant.")] = 3,
    against: Against = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time each generated Triton kernel, on a GPU.")] = False,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    backend: shared.Backend = "auto",
    compile_how: shared.Compile = "auto",
    max_bytes: shared.MaxBytes = None,
    as_json: shared.AsJson = False,
) -> None:
    """Measure a policy's speed and memory beside the untouched model, in alternating turns."""
    options = shared.use_options(name, settings, tables, backend, compile_how)
    shared.check_first(policy, options)
    if kernels:
        _bench_kernels(policy, model, options, as_json)
        return
    others = _others(policy, against, options)
    config = shared.load_config(model)
    tokens = _usual_prompt(config, generate) if prompt is None else prompt

    from kvcompile.benching import Contestant, Course, batch_of, check_context
    from kvcompile.benching import bench as measured

    check_context(config, tokens, generate)
    with shared.progress("loading the model"):
        decoder = shared.load_model(model)
        ids = batch_of(shared.made_up_prompt(decoder, tokens + generate), batch)
    contestants = [Contestant(_title(policy), policy, {**options, "max_bytes": max_bytes}), *others]
    what = f"{batch} x {tokens} prompt tokens and {generate} steps, {rounds} rounds of {len(contestants)} contestants"
    with shared.progress(what):
        found = measured(decoder, contestants, Course(ids, tokens, rounds))
    if as_json:
        shared.print_json(found.to_dict())
    else:
        _print_table(found)


def _others(policy: str, against: list[str] | None, options: dict[str, Any]) -> list[Any]:
    """Whom the policy runs against; their mistakes are found here."""
    from kvcompile.benching import UNTOUCHED, Contestant

    found: dict[str, Contestant] = {}
    for word in against or [UNTOUCHED]:
        if word == UNTOUCHED:
            other = Contestant(UNTOUCHED)
        elif word == "reference":
            slow = {**options, "backend": "reference", "compile": "off"}
            other = Contestant(f"{_title(policy)}, reference", policy, slow)
        else:
            shared.check_first(word, {"name": None})
            chosen = {key: options[key] for key in ("backend", "compile", "tables")}
            other = Contestant(_title(word), word, chosen)
        if other.name in found or other.name == _title(policy):
            raise typer.BadParameter(f"{word!r} takes part already", param_hint="--against")
        found[other.name] = other
    return list(found.values())


def _title(policy: str) -> str:
    return Path(policy).stem if policy.endswith(".kvp") else policy


def _usual_prompt(config: Any, generate: int) -> int:
    """The usual length, or what a model of few positions leaves beside the steps."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or USUAL + generate
    return max(1, min(USUAL, most - generate))


def _print_table(found: Any) -> None:
    """Times, then memory: two tables, because one would not fit a terminal of 80 columns."""
    typer.echo(f"{found.policy} on {found.device}")
    typer.echo(
        f"{found.batch} x {found.prompt} prompt tokens, {found.generate} steps, {found.rounds} rounds in turns\n"
    )
    times, bytes_held = [], []
    for row in found.contestants:
        spread = f"{row.step_p10:.2f}..{row.step_p90:.2f}"
        figures = (f"{row.step_ms:.2f}", spread, f"{row.tokens_per_second:.1f}", f"{row.step_ratio:.3f}")
        times.append((row.name, f"{row.prefill_seconds:.3f}", *figures))
        peak = row.bytes_peak if row.device_peak is None else row.device_peak
        bytes_held.append(
            (row.name, _size(row.bytes_held), "" if peak is None else _size(peak), f"{row.footprint:.4f}")
        )
    shared.print_table(("time", "prefill s", "ms a step", "p10..p90", "tokens/s", "ratio"), times, figures=True)
    typer.echo()
    shared.print_table(("memory", "held", "peak", "footprint"), bytes_held, figures=True)
    first = found.contestants[0]
    each = ", ".join(f"{ratio:.2f}" for ratio in first.step_ratios)
    typer.echo(f"\nratio: a step's part of {found.base}'s; of {first.name} in each round {each}")
    typer.echo(
        f"memory traffic allows at most {first.ceiling:.2f} times the full cache's speed\n"
        f"(a ratio of {1 / first.ceiling:.3f}) at equal batch"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _device() -> str | None:
    """The GPU's name, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _bench_kernels(policy: str, model: Path, options: dict[str, Any], as_json: bool) -> None:
    """Each generated Triton file's own `--bench`; exit code 1 where one fails."""
    from kvcompile.kernels.errors import KvCompileError

    device = _device()
    if device is None:
        raise KvCompileError(
            "--kernels times generated Triton kernels on a GPU, and there is no CUDA device here; without one, "
            "`kvcompile inspect POLICY --model DIR --kernel NAME` shows each kernel with its predicted time, and "
            "`kvcompile bench` without --kernels times the whole model"
        )
    from kvcompile.kernels.triton_backend.library import write_kernels
    from kvcompile.passes import compile_policy
    from kvcompile.passes.facts import model_facts

    facts = model_facts(shared.load_config(model))
    chosen = {key: options[key] for key in ("name", "tables")}
    plan = compile_policy(policy, facts, **chosen, **shared.policy_parameters(options)).plan
    said = {}
    for kernel, file in write_kernels(plan).items():
        with shared.progress(kernel):
            said[kernel] = _bench_file(file.path)
    if as_json:
        shared.print_json({"gpu": device, "kernels": {k: {"ok": ok, "said": line} for k, (ok, line) in said.items()}})
    else:
        width = max(map(len, said), default=0)
        for kernel, (_, line) in said.items():
            typer.echo(f"{kernel:<{width}}  {line}")
    if not said:
        typer.echo("this policy needs no Triton kernel", err=True)
    if not all(ok for ok, _ in said.values()):
        raise typer.Exit(1)


def _bench_file(path: Path) -> tuple[bool, str]:
    """Whether a kernel's file ran, and the last line of what it said."""
    done = subprocess.run([sys.executable, str(path), "--bench"], capture_output=True, text=True, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else "said nothing"
