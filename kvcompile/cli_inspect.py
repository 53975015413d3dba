"""The commands that look at what the compiler made: inspect and kernels.

Takes a policy and a local model folder; gives the plan, the IR after a pass, the rewritten graph, a kernel's
source or what a compiler says of it, the state of all kernels. Guarantees: only the graph reads weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompile import cli_options as shared

GRAPH = "graph"  # the name under which the rewritten attention graph stands beside the passes


def inspect(
    policy: shared.Policy,
    model: shared.ModelFolder,
    after: Annotated[str | None, typer.Option("--after", metavar="PASS", help="The IR after a pass, or graph.")] = None,
    kernel: Annotated[str | None, typer.Option("--kernel", metavar="NAME", help="The source of a kernel.")] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="ARCH", help="sm_80, sm_90, sm_100; for C++ native.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU to predict for.")] = None,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    backend: shared.Backend = "auto",
    compile_how: shared.Compile = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Show what the compiler made of a policy."""
    for option, value in (("--arch", arch), ("--gpu", gpu)):
        if value is not None and kernel is None:
            raise typer.BadParameter(f"{option} goes with --kernel NAME", param_hint=option)
    if after is not None and kernel is not None:
        raise typer.BadParameter("give --after or --kernel, not both", param_hint="--after")
    options = shared.use_options(name, settings, tables, backend, compile_how)
    shared.check_first(policy, options)
    if after == GRAPH:
        _show(after, _graph(policy, model, options), as_json)
    elif after is not None:
        _show(after, _module(policy, model, options, after), as_json)
    elif kernel is not None:
        _show_kernel(_compiled(policy, model, options).plan, kernel, arch, gpu, as_json)
    else:
        _show_all(policy, model, options, as_json)


def kernels(
    policy: Annotated[str | None, typer.Argument(metavar="[POLICY]", help="A .kvp file, or a library name.")] = None,
    model: Annotated[Path | None, typer.Option("--model", metavar="DIR", help="A model folder.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Whose tuned constants to look up.")] = None,
    build: Annotated[bool, typer.Option("--build", help="Compile the C++ kernels that are not built.")] = False,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    as_json: shared.AsJson = False,
) -> None:
    """List a policy's kernels with their status, or all kernel files there are."""
    if (policy is None) != (model is None):
        raise typer.BadParameter("POLICY and --model go together: kernels depend on both", param_hint="--model")
    if policy is None or model is None:
        if gpu is not None or build:
            raise typer.BadParameter("goes with POLICY and --model", param_hint="--build" if build else "--gpu")
        _list_files(as_json)
        return
    options = shared.use_options(name, settings, tables, "auto", "off")
    shared.check_first(policy, options)
    _list_kernels(policy, model, options, gpu, build, as_json)


def _list_files(as_json: bool) -> None:
    """The files of all policies."""
    found = {f"{path.parent.name}/{path.stem}": path for path in _kernel_files()}
    if as_json:
        shared.print_json({key: str(path) for key, path in found.items()})
        return
    width = max(map(len, found), default=0)
    for key, path in sorted(found.items()):
        typer.echo(f"{key:<{width}}  {path}")
    if not found:
        typer.echo("no kernels were generated yet", err=True)


def _kernel_files() -> list[Path]:
    from kvcompile.kernels.render import SUFFIX, folder

    place = folder("any", "").parent
    return sorted(path for suffix in SUFFIX.values() for path in place.glob(f"*/*.{suffix}"))


def _list_kernels(
    policy: str, model: Path, options: dict[str, Any], gpu: str | None, build: bool, as_json: bool
) -> None:
    from dataclasses import asdict

    from kvcompile.kernels import status

    device = _gpu(gpu)
    plan = _compiled(policy, model, options).plan
    with shared.progress("compiling C++ kernels" if build else "rendering kernels"):
        rows = status.rows(plan, device, build=build)
    missing = status.missing(plan)
    if as_json:
        facts = {"policy": plan.name, "gpu": device.name, "cpu": status.runs_on(plan, "cpu")}
        found = {"kernels": [asdict(row) for row in rows], "without_kernel": [asdict(what) for what in missing]}
        shared.print_json(facts | found)
        return
    if rows:
        shared.print_table(
            ("kernel", "target", "status", "for"),
            [(row.name, row.target, row.status, row.purpose) for row in rows],
        )
        typer.echo(f"files in {rows[0].path.parent}")
        for line in _reasons(rows):
            typer.echo(line)
    for what in missing:
        typer.echo(what.line())
    typer.echo(status.runs_on(plan, "cpu"))


def _reasons(rows: Iterable[Any]) -> Iterator[str]:
    """Why kernels have their status: each reason once, with its kernels where not all of that status share it."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault((row.target, row.status), {}).setdefault(row.reason, []).append(row.name)
    for (_, status), reasons in found.items():
        for reason, names in reasons.items():
            if reason:
                yield f"{status if len(reasons) == 1 else ', '.join(names)}: {reason}"


def _gpu(name: str | None) -> Any:
    """The GPU whose constants are looked up: the one named, else the one here, else that of the headers."""
    import torch

    from kvcompile.kernels.gpus import gpu, of_device
    from kvcompile.kernels.headers import Sizes

    if name is not None:
        return gpu(name)
    return of_device() if torch.cuda.is_available() else Sizes().gpu


def _compiled(policy: str, model: Path, options: dict[str, Any]) -> Any:
    """The policy compiled for a model folder's configuration; reads no weights."""
    from kvcompile.passes import compile_policy
    from kvcompile.passes.facts import model_facts

    facts = model_facts(shared.load_config(model))
    chosen = {key: options[key] for key in ("name", "tables")}
    return compile_policy(policy, facts, **chosen, **shared.policy_parameters(options))


def _module(policy: str, model: Path, options: dict[str, Any], after: str) -> str:
    from kvcompile.kernels.errors import KvCompileError

    modules = _compiled(policy, model, options).modules
    if after not in modules:
        raise KvCompileError(f"--after {after}: no such pass; there are {', '.join([*modules, GRAPH])}")
    return str(modules[after])


def _graph(policy: str, model: Path, options: dict[str, Any]) -> str:
    """The rewritten graphs of a made-up prompt and one step."""
    from kvcompile.api import optimize
    from kvcompile.inspection import inspect as inspected

    with shared.progress("compiling the graphs"):
        decoder: Any = optimize(shared.load_model(model), policy, **options | {"compile": "eager"})
        ids = shared.made_up_prompt(decoder, shared.MADE_UP_LENGTH)
        decoder.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=3, do_sample=False)
        return str(inspected(decoder).graph)


def _show(key: str, text: str, as_json: bool) -> None:
    if as_json:
        shared.print_json({key: text})
    else:
        typer.echo(text)


def _show_kernel(plan: Any, name: str, arch: str | None, gpu: str | None, as_json: bool) -> None:
    from kvcompile.inspection import kernels_of
    from kvcompile.kernels.errors import KvCompileError
    from kvcompile.kernels.gpus import gpu as gpu_facts

    known = kernels_of(plan)
    if name not in known:
        raise KvCompileError(f"--kernel {name}: no such kernel; this policy has {', '.join(known) or 'none'}")
    kernel = known[name]
    if gpu is not None and arch is None:
        arch = gpu_facts(gpu).arch
    if arch is None:
        _show("source", kernel.source, as_json)
        return
    with shared.progress(f"compiling for {arch}"):
        account = kernel.resources(arch, gpu)
    if as_json:
        shared.print_json(account.to_dict())
    else:
        typer.echo("\n".join(account.lines()))


def _show_all(policy: str, model: Path, options: dict[str, Any], as_json: bool) -> None:
    from kvcompile.cli_plan import plan_lines
    from kvcompile.kernels.choose import specs_for
    from kvcompile.kernels.cpp_backend.library import cpp_names
    from kvcompile.kernels.status import missing, runs_on

    compiled = _compiled(policy, model, options)
    plan = list(plan_lines(compiled.plan))
    passes = [*compiled.modules, GRAPH]
    names = [*(spec.name for spec in specs_for(compiled.plan)), *cpp_names(compiled.plan)]
    lacks = missing(compiled.plan)
    cpu = runs_on(compiled.plan, "cpu")
    if as_json:
        without = {target: [what.what for what in lacks if what.target == target] for target in ("triton", "c++")}
        facts = {"plan": plan, "passes": passes, "kernels": names, "without_kernel": without["triton"]}
        more = {"without_cpp": without["c++"], "cpu": cpu}
        shared.print_json({"policy": compiled.plan.name, **facts, **more})
        return
    for source in compiled.resolved.sources:
        typer.echo(f"# {source.name}\n{source.text.rstrip()}\n")
    for line in plan:
        typer.echo(line)
    typer.echo(f"\npasses (--after NAME): {', '.join(passes)}")
    typer.echo(f"kernels (--kernel NAME): {', '.join(names) or 'none'}")
    for what in lacks:
        typer.echo(what.line())
    typer.echo(cpu)
