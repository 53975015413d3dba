"""The commands that look at what the compiler made: inspect and kernels.

Takes a policy and a local model folder; gives the plan, the IR after a pass, the rewritten graph, a kernel's
source or what the offline compiler says of it. Guarantees: plan and IR are shown without reading weights.
"""

from __future__ import annotations

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
    arch: Annotated[str | None, typer.Option("--arch", metavar="ARCH", help="sm_80, sm_90 or sm_100.")] = None,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    backend: shared.Backend = "auto",
    compile_how: shared.Compile = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Show what the compiler made of a policy."""
    if arch is not None and kernel is None:
        raise typer.BadParameter("--arch goes with --kernel NAME", param_hint="--arch")
    if after is not None and kernel is not None:
        raise typer.BadParameter("give --after or --kernel, not both", param_hint="--after")
    options = shared.use_options(name, settings, tables, backend, compile_how)
    shared.check_first(policy, options)
    if after == GRAPH:
        _show(after, _graph(policy, model, options), as_json)
    elif after is not None:
        _show(after, _module(policy, model, options, after), as_json)
    elif kernel is not None:
        _show_kernel(_artifacts(policy, model, options), kernel, arch, as_json)
    else:
        _show_all(policy, model, options, as_json)


def kernels(
    policy: Annotated[str | None, typer.Argument(metavar="[POLICY]", help="A .kvp file, or a library name.")] = None,
    model: Annotated[Path | None, typer.Option("--model", metavar="DIR", help="A model folder.")] = None,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    as_json: shared.AsJson = False,
) -> None:
    """List kernel files: those of a policy on a model, or all there are."""
    if (policy is None) != (model is None):
        raise typer.BadParameter("POLICY and --model go together: kernels depend on both", param_hint="--model")
    if policy is None or model is None:
        found = {f"{path.parent.name}/{path.stem}": path for path in _kernel_files()}
    else:
        options = shared.use_options(name, settings, tables, "auto", "off")
        shared.check_first(policy, options)
        found = {key: kernel.path for key, kernel in _artifacts(policy, model, options).kernels.items()}
    if as_json:
        shared.print_json({key: str(path) for key, path in found.items()})
        return
    width = max(map(len, found), default=0)
    for key, path in sorted(found.items()):
        typer.echo(f"{key:<{width}}  {path}")
    if not found:
        typer.echo("no kernels: this policy needs none, or none were generated yet", err=True)


def _kernel_files() -> list[Path]:
    from kvcompile.kernels.render import folder

    return sorted(folder("any", "").parent.glob("*/*.py"))


def _compiled(policy: str, model: Path, options: dict[str, Any]) -> Any:
    """The policy compiled for a model folder's configuration; reads no weights."""
    from kvcompile.passes import compile_policy
    from kvcompile.passes.facts import model_facts

    facts = model_facts(shared.load_config(model))
    chosen = {key: options[key] for key in ("name", "tables")}
    return compile_policy(policy, facts, **chosen, **shared.policy_parameters(options))


def _artifacts(policy: str, model: Path, options: dict[str, Any]) -> Any:
    """What `kvcompile.inspect` gives of the policy on the loaded model."""
    from kvcompile.api import optimize
    from kvcompile.inspection import inspect as inspected

    with shared.progress("loading the model"):
        return inspected(optimize(shared.load_model(model), policy, **options))


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


def _show_kernel(art: Any, name: str, arch: str | None, as_json: bool) -> None:
    from kvcompile.kernels.errors import KvCompileError

    if name not in art.kernels:
        known = ", ".join(sorted(art.kernels)) or "none"
        raise KvCompileError(f"--kernel {name}: no such kernel; this policy has {known}")
    kernel = art.kernels[name]
    if arch is None:
        _show("source", kernel.source, as_json)
        return
    from kvcompile.kernels.offline import compile_apart

    with shared.progress(f"compiling for {arch}"):
        needs = compile_apart([Path(kernel.path)], [arch])[Path(kernel.path).stem]
    if as_json:
        shared.print_json([_without_ptx(need) for need in needs])
    else:
        for need in needs:
            typer.echo(need.line())


def _without_ptx(need: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(need).items() if key != "ptx"}


def _show_all(policy: str, model: Path, options: dict[str, Any], as_json: bool) -> None:
    from kvcompile.cli_plan import plan_lines
    from kvcompile.kernels.choose import specs_for, unprintable

    compiled = _compiled(policy, model, options)
    plan = list(plan_lines(compiled.plan))
    passes = [*compiled.modules, GRAPH]
    names = [spec.name for spec in specs_for(compiled.plan)]
    missing = unprintable(compiled.plan)
    if as_json:
        facts = {"plan": plan, "passes": passes, "kernels": names, "without_kernel": missing}
        shared.print_json({"policy": compiled.plan.name, **facts})
        return
    for source in compiled.resolved.sources:
        typer.echo(f"# {source.name}\n{source.text.rstrip()}\n")
    for line in plan:
        typer.echo(line)
    typer.echo(f"\npasses (--after NAME): {', '.join(passes)}")
    typer.echo(f"kernels (--kernel NAME): {', '.join(names) or 'none'}")
    for reason in missing:
        typer.echo(f"no Triton kernel yet: {reason}")
