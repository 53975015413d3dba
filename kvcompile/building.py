"""From a Hugging Face model and a policy to the engine that runs it; nothing on the model changes here.

Takes a `Request`; gives a `Choice`, then an `Engine`. Guarantees: what cannot be carried out is refused before the
model is touched, and where several processes share the heads, in all of them if in one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kvcompile.backends import GRAPHED, backend_for, inner_for
from kvcompile.compiled import Layers, variants_of
from kvcompile.cuda_graphs import StepGraphs, step_graphs
from kvcompile.forward import Engine
from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.project import project_of
from kvcompile.kernels.layout import Site
from kvcompile.kernels.learned import fingerprint
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.kernels.ranks import sharded
from kvcompile.limits import Limit
from kvcompile.off import refuse_off
from kvcompile.passes import Compiled, compile_policy
from kvcompile.passes.facts import model_facts
from kvcompile.passes.open_anchors import gathered_evictions
from kvcompile.passes.pipeline import probes_of
from kvcompile.passes.sites import AttentionSite
from kvcompile.placement import (
    Processes,
    Scores,
    agreed,
    home_of,
    local,
    local_bytes,
    of_all_processes,
    spoken,
)
from kvcompile.probe import run_probes
from kvcompile.projections import Projections
from kvcompile.rotary import RopeTable
from kvcompile.telling import refuse_peeked
from kvcompile.weights import load_weights

Sites = tuple[AttentionSite, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What `optimize` was asked for, as it was given."""

    policy: Any
    backend: str
    compile: str
    name: str | None
    tables: dict[str, str | Path] | None
    max_bytes: int | str | None
    positions: str | None
    params: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """`optimize(model, policy, **arguments)` asks for the same again."""
        own = ("backend", "compile", "name", "tables", "max_bytes", "positions")
        return {**{key: getattr(self, key) for key in own}, **self.params}

    def compiled(self, facts: ModelFacts, probes: dict[str, Scores] | None = None) -> Compiled:
        return compile_policy(self.policy, facts, name=self.name, tables=self.tables, probes=probes, **self.params)


@dataclass(frozen=True, slots=True)
class Choice:
    """What will run, and where: `whole` is the plan of the whole model, `compiled` has that of the heads here."""

    compiled: Compiled
    whole: PolicyPlan
    backend: str
    inner: str
    home: torch.device
    captured: bool  # whether steps are replayed as CUDA graphs


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is put together from."""

    program: ops.Program
    rope: RopeTable | None
    graphs: StepGraphs | None
    projections: Projections | None


def choose(model: nn.Module, sites: Sites, processes: Processes | None, request: Request) -> Choice:
    """Compile the policy for the model, its probes run, and cut it to the heads that are here."""
    with agreed(processes) as said:
        home = home_of(sites)
        backend = backend_for(request.backend, home)
        inner = inner_for(request.compile, backend)
        facts = model_facts(model)
        compiled = request.compiled(facts)
        asked = probes_of(compiled.resolved)
        said += [*spoken(compiled.plan, backend, inner), f"max_bytes {request.max_bytes}"]
    if asked:  # only now, because a probe takes a forward and a policy with mistakes none
        compiled = request.compiled(facts, of_all_processes(processes, run_probes(model, sites, asked)))
    whole = compiled.plan
    refuse_off(sites, whole.off)
    refuse_peeked(whole)
    if processes is not None:
        compiled = replace(compiled, plan=sharded(whole, processes, processes.key, local_bytes(model)))
    return Choice(compiled, whole, backend, inner, home, request.compile in GRAPHED)


def prepare(model: nn.Module, sites: Sites, processes: Processes | None, choice: Choice) -> Parts:
    """Load and build all that may yet fail: step graphs, trained scores, rotary tables, kernels."""
    plan, whole = choice.compiled.plan, choice.whole
    graphs = step_graphs(plan, choice.backend, choice.home) if choice.captured else None
    with agreed(processes) as said:
        weights = load_weights(whole, dict(choice.compiled.learned), choice.home)
        rope = RopeTable(model, sites) if whole.rotates else None
        program = ops.Program(plan, ops.backend(choice.backend), weights)
        program.backend.prepare(plan)
        found = type(program.backend).__name__
        said += [*spoken(whole, found, choice.inner), f"trained scores {fingerprint(weights)}"]
        project = project_of(plan) if isinstance(program.backend, Cpp) and choice.inner == "off" else None
    return Parts(program, rope, graphs, None if project is None else Projections(project))


def engine_of(sites: Sites, choice: Choice, parts: Parts, limit: Limit) -> Engine:
    """Make the program known to the operators, and put together what the model's forward runs on."""
    plan, scale = choice.compiled.plan, sites[0].scale
    key = ops.register(parts.program)
    layers = Layers(plan.name, choice.inner, variants_of(plan.facts, scale), plan.off)
    tail = gathered_evictions(plan, key, scale, len(Site._fields))
    sinks = tuple(local(cast(Tensor, site.attention.sinks)) for site in sites) if plan.facts.sinks else ()
    return Engine(
        plan, key, choice.backend == "triton", layers, tail, scale, choice.inner != "off",
        rope=parts.rope, graphs=parts.graphs, projections=parts.projections, sink_logits=sinks, home=choice.home,
        limit=limit,
    )  # fmt: skip
