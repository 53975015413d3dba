"""The compiler from a policy to its frozen plan.

Takes a policy as the user gives it and the facts of a model; gives `Compiled`: plan, text of the kv module after
each pass, findings, seconds. Guarantees: after every pass the module verifies and its text parses back to it;
a policy that cannot run here ends in PolicyError at its own place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from xdsl.dialects.builtin import ModuleOp

from kvcompile.dsl import Diagnostic, PolicyError, Resolved, ast, check, load, resolve
from kvcompile.dsl.load import Loaded
from kvcompile.dsl.lower import lower
from kvcompile.dsl.module import Places, to_text, verify
from kvcompile.dsl.printer import canonical
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.passes.bind import Bind
from kvcompile.passes.budgets import Budgets
from kvcompile.passes.context import Context
from kvcompile.passes.freeze import freeze
from kvcompile.passes.memory import Memory
from kvcompile.passes.schedule import Schedule
from kvcompile.passes.slide import slide
from kvcompile.passes.tables import probe_key
from kvcompile.passes.trained_gates import check_gates


class Pass(Protocol):
    """Rewrites a kv module in place; options are its fields."""

    @property
    def name(self) -> str: ...

    def __call__(self, module: ModuleOp, context: Context) -> None: ...


PIPELINE: tuple[Pass, ...] = (Bind(), Budgets(), Schedule(), Memory())

After = Callable[[str, ModuleOp, Places, float], None]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A policy bound to a model. `modules` holds MLIR text by pass, "lower" first; `seconds` the time of each;
    `learned` the file of every trained score, by its name in the plan."""

    plan: PolicyPlan
    modules: Mapping[str, str]
    resolved: Resolved
    diagnostics: tuple[Diagnostic, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    learned: tuple[tuple[str, Path], ...] = ()


def compile_policy(
    policy: object,
    facts: ModelFacts,
    *,
    name: str | None = None,
    tables: Mapping[str, str | os.PathLike[str]] | None = None,
    probes: Mapping[str, Sequence[Sequence[float]]] | None = None,
    base: str | os.PathLike[str] | None = None,
    dump: str | os.PathLike[str] | None = None,
    **params: object,
) -> Compiled:
    """Compile a policy for a model.

    policy, name, params: as in `optimize`. tables: head class, share or state -> path of its table or weights;
    relative paths count from the working folder. probes: what probes measured, [layer][kv head], by `probes_of`; heads
    of a probe that is missing are a guess, with a warning. base: the folder that paths in the policy count from,
    instead of its own. dump: a folder for the text after each pass; without it the variable KVC_DUMP. PolicyError for
    everything that is wrong with the policy.
    """
    loaded = load(policy, name, base)
    resolved = resolve(loaded, params)
    findings = (*resolved.findings, *(d for d in check(resolved) if d not in resolved.findings))
    if any(finding.severity == "error" for finding in findings):
        raise PolicyError(*(finding for finding in findings if finding.severity == "error"))
    context = Context(
        facts,
        tables={head: Path(path) for head, path in (tables or {}).items()},
        bases=_bases(loaded, resolved),
        probes=probes or {},
    )
    compiled = compile_resolved(resolved, context, findings, dump)
    check_gates(compiled.plan, dict(compiled.learned))
    return compiled


def compile_resolved(
    resolved: Resolved,
    context: Context,
    findings: tuple[Diagnostic, ...] = (),
    dump: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile a policy that has been checked, for the model of a context, whose places are put in here.

    findings: of the checks; those of the passes are added. dump: as in `compile_policy`.
    """
    start = time.perf_counter()
    lowered = lower(resolved)
    context = replace(context, places=lowered.places)
    texts: dict[str, str] = {}
    seconds: dict[str, float] = {}
    folder = dump if dump is not None else os.environ.get("KVC_DUMP")
    target = Path(folder) / resolved.name if folder else None

    def after(name: str, module: ModuleOp, places: Places, took: float) -> None:
        verify(module, places)
        text = texts[name] = to_text(module)
        seconds[name] = took
        if target is not None:
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{len(texts) - 1:02d}-{name}.mlir").write_text(text, encoding="utf-8")

    after("lower", lowered.module, lowered.places, time.perf_counter() - start)
    run(lowered.module, context, after=after)
    params = tuple((key, canonical(value)) for key, value in resolved.params)
    plan = slide(freeze(lowered.module, context.facts, params))
    learned = tuple(context.learned.items())
    return Compiled(plan, texts, resolved, (*findings, *context.findings), seconds, learned)


def probes_of(resolved: Resolved) -> dict[str, tuple[str, int | None]]:
    """The measurements that a policy's head classes ask for: key -> (what, tokens, None for the usual number)."""
    found: dict[str, tuple[str, int | None]] = {}
    for head in resolved.heads:
        for source in head.decl.sources:
            match source:
                case ast.Call(fn="probe", args=(ast.Text() as what, *_)):
                    tokens = source.get("tokens")
                    number = int(tokens.value) if isinstance(tokens, ast.Number) else None
                    found[probe_key(what.value, number)] = what.value, number
    return found


def _bases(loaded: Loaded, resolved: Resolved) -> dict[str, Path | None]:
    """The folder that each name's path counts from; None for names of a library file."""
    found = {head.decl.name: head.base for head in resolved.heads}
    for placed in resolved.of(ast.Share, ast.State, ast.On, ast.Score):
        own = loaded.base if placed.clause.span.source == loaded.file.source else None
        match placed.clause:
            case ast.Share(name=name) | ast.Score(name=name):
                found[name] = own
            case ast.State(assigns=assigns):
                found |= {assign.name: own for assign in assigns}
            case ast.On(updates=updates):
                found |= {update.name: own for update in updates}
    return found


def run(module: ModuleOp, context: Context, passes: tuple[Pass, ...] = PIPELINE, after: After | None = None) -> None:
    """Run passes on a module, in place; `after` is called with name, module, places and seconds of each."""
    for step in passes:
        start = time.perf_counter()
        step(module, context)
        if after is not None:
            after(step.name, module, context.places, time.perf_counter() - start)
