"""`explain`: what a policy holds and costs on a model, before anything runs.

Takes a policy, a model or its configuration, and lengths; gives `Explanation`: classes, footprint, peak, bytes, and
the largest speed-up of a decode step that memory traffic allows. Guarantees: nothing runs on the model; footprint
and peak are exact for static policies and say so where they are bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcompile.dsl import ast
from kvcompile.dsl.check_cost import COSTS
from kvcompile.dsl.diagnostics import Diagnostic
from kvcompile.dsl.lower import class_name
from kvcompile.dsl.printer import text
from kvcompile.dsl.resolve import Resolved
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, QuerySource
from kvcompile.passes.facts import model_facts
from kvcompile.passes.footprint import Footprint, footprint
from kvcompile.passes.held import Held, held
from kvcompile.passes.pipeline import compile_policy

_COST_ORDER = list(COSTS)


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """One head class: KV heads over all layers, what it keeps and when, and what its scores cost."""

    name: str
    heads: int
    keep: str
    cost: str


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer at the end: entries of its KV heads of one sequence together, and heads by class."""

    layer: int
    entries: int
    heads: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The figures of one policy on one model. Bytes are of the whole batch; `exact` is False for upper bounds."""

    plan: PolicyPlan
    prompt: int
    generate: int
    batch: int
    classes: tuple[ClassFacts, ...]
    layers: tuple[LayerFacts, ...]
    footprint: float
    peak: float
    exact: bool
    bytes: int
    bytes_peak: int
    bytes_full: int
    ceiling: float
    step_seconds: float | None  # of reading weights and cache once, on the GPU asked for
    gpu: str | None
    diagnostics: tuple[Diagnostic, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries: fit for JSON."""
        out: dict[str, Any] = {
            "policy": self.plan.name,
            "prompt": self.prompt,
            "generate": self.generate,
            "batch": self.batch,
            "classes": {c.name: {"heads": c.heads, "keep": c.keep, "cost": c.cost} for c in self.classes},
            "layers": len(self.layers),
            "by_layer": [{"entries": x.entries, "heads": dict(x.heads)} for x in self.layers],
            "footprint": self.footprint,
            "peak": self.peak,
            "exact": self.exact,
            "bytes": self.bytes,
            "bytes_peak": self.bytes_peak,
            "bytes_full": self.bytes_full,
            "ceiling": self.ceiling,
        }
        if self.gpu is not None:
            out |= {"gpu": self.gpu, "step_seconds": self.step_seconds}
        return out

    def __str__(self) -> str:
        facts, about = self.plan.facts, "" if self.exact else " (upper bound)"
        lines = [
            f"policy      {self.plan.name} on {facts.family or 'a model'}: {facts.layers} layers, "
            f"{facts.kv_heads} KV heads of {facts.head_dim} channels, {facts.dtype}",
            f"lengths     prompt {self.prompt}, {self.generate} decode forwards, batch {self.batch}"
            + (f", prompt in pieces of {self.plan.chunk}" if self.plan.chunk else ""),
        ]
        for part in self.classes:
            lines += [f"class       {part.name}: {part.heads} KV heads", f"{'':12}{part.keep}", f"{'':12}{part.cost}"]
        lines += [
            f"footprint   {self.footprint:.7f}{about}",
            f"peak        {self.peak:.7f}{about}",
            f"entries     {self._entries()}",
            f"bytes       {_size(self.bytes)} at the end, {_size(self.bytes_peak)} at the peak, "
            f"{_size(self.bytes_full)} untouched",
            f"ceiling     a decode step at most {self.ceiling:.2f} times as fast, by memory traffic",
        ]
        if self.step_seconds is not None:
            lines.append(f"{self.gpu:<12}a decode step reads its memory in {self.step_seconds * 1e3:.2f} ms at best")
        return "\n".join(lines)

    def _entries(self) -> str:
        each = [x.entries for x in self.layers]
        if len(set(each)) == 1:
            return f"{each[0]} a layer"
        return f"{min(each)} to {max(each)} a layer: " + " ".join(str(n) for n in each)


def explain(
    policy: object,
    model_or_config: Any,
    *,
    prompt: int = 131072,
    generate: int = 0,
    batch: int = 1,
    gpu: str | None = None,
    name: str | None = None,
    tables: Mapping[str, str | os.PathLike[str]] | None = None,
    **params: Any,
) -> Explanation:
    """What a policy would hold and cost.

    prompt: tokens of each sequence; generate: decode forwards; gpu: a GPU to predict the step time for. Memory is
    counted in pages, for a model on the CPU in extents. PolicyError for the policy, KvCompileError for the model,
    the lengths and the GPU.
    """
    for label, value, least in (("prompt", prompt, 1), ("generate", generate, 0), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise KvCompileError(f"{label}={value!r}: give a whole number of at least {least}")
    facts = model_facts(model_or_config)
    compiled = compile_policy(policy, facts, name=name, tables=tables, **params)
    plan = compiled.plan
    in_pages = gpu is not None or not _on_cpu(model_or_config)
    spent: Footprint = footprint(plan, prompt, generate)
    memory: Held = held(plan, prompt, generate, paged=in_pages)
    full = (prompt + generate) * facts.layers * facts.kv_heads * facts.entry_bytes * batch
    read = facts.weight_bytes + batch * sum(memory.entries) * facts.entry_bytes
    return Explanation(
        plan=plan,
        prompt=prompt,
        generate=generate,
        batch=batch,
        classes=tuple(
            ClassFacts(cls.name, plan.class_size(index), _keep_text(cls, compiled.resolved), COSTS[_cost(plan, cls)])
            for index, cls in enumerate(plan.classes)
        ),
        layers=tuple(
            LayerFacts(layer, memory.entries[layer], {plan.classes[c].name: len(plan.heads(layer, c)) for c in classes})
            for layer in range(facts.layers)
            for classes in (plan.site_classes(layer),)
        ),
        footprint=spent.footprint,
        peak=spent.peak,
        exact=spent.exact,
        bytes=batch * memory.bytes,
        bytes_peak=batch * memory.bytes_peak,
        bytes_full=full,
        ceiling=(facts.weight_bytes + full) / read if read else 1.0,
        step_seconds=_step_seconds(gpu, read),
        gpu=gpu,
        diagnostics=compiled.diagnostics,
    )


def _on_cpu(source: Any) -> bool:
    if not hasattr(source, "parameters"):
        return False
    return str(next(source.parameters()).device.type) == "cpu"


def _keep_text(cls: ClassPlan, resolved: Resolved) -> str:
    """The clause as written, parameters filled in."""
    keeps = resolved.of(ast.Keep)
    for placed in keeps:
        if class_name(placed, keeps) == cls.name and not cls.keeps_all:
            when = f" at {', '.join(text(trigger) for trigger in placed.triggers)}" if placed.triggers else ""
            return text(placed.clause) + when
    return "keep all"


def _cost(plan: PolicyPlan, cls: ClassPlan) -> str:
    """The dearest source of the scores of a class, as a class of `COSTS`."""
    kinds = {"position"}
    todo = [node for term in cls.selections for node in term.score.walk()]
    for name in cls.states:
        add = plan.state(name).add
        if add is not None and any(node.op == "evidence" for node in add.walk()):
            kinds.add("everything")
    in_prefill = cls.fires_on("prefill.end") or cls.fires_on("chunk")
    for node in todo:
        match node.op, node.value:
            case "evidence", (_, QuerySource(kind="forward")):
                kinds.add("everything" if in_prefill else "logits")
            case "evidence", _:
                kinds.add("queries")
            case "field", "k" | "v" | "next.k" | "next.v":
                kinds.add("entries")
            case "landmark", _:
                kinds.add("entries")
            case _:
                pass
    return max(kinds, key=_COST_ORDER.index)


def _step_seconds(gpu: str | None, read: int) -> float | None:
    if gpu is None:
        return None
    from kvcompile.kernels.gpus import gpu as facts_of

    return read / facts_of(gpu).bandwidth


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
