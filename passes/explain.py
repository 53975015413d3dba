"""`explain`: what a policy holds and costs on a model, before anything runs.

Takes a policy, a model or its configuration, and lengths; gives `Explanation`: classes, what is read, layers,
footprint, peak, bytes, and the largest speed-up of a decode step that memory traffic allows. Guarantees: nothing runs
on the model; footprint and peak are exact for static policies and say so where they are bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvcompile.dsl.diagnostics import Diagnostic
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import gpu as gpu_facts
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.kernels.roofline import Traffic
from kvcompile.kernels.sizes import parse_bytes, size_text
from kvcompile.passes.class_facts import ClassFacts, class_facts, never_full, read_clauses
from kvcompile.passes.facts import model_facts
from kvcompile.passes.footprint import Footprint, Spent, footprint
from kvcompile.passes.held import Held, held
from kvcompile.passes.pipeline import compile_policy
from kvcompile.passes.reading import ReadFacts, StepReads, idle_weights, residents, step_reads


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer at the end: KV heads by class, and the entries that those of one sequence hold together, by class.

    Where layers compete, or divide a share by what is in them, only their sum is known: each shows an equal part.
    spent: footprint and peak of the layer's KV heads together; by_head: of each. Bounds where they say so.
    """

    layer: int
    heads: Mapping[str, int]
    held: Mapping[str, int]
    spent: Spent
    by_head: tuple[Spent, ...]

    @property
    def entries(self) -> int:
        """Of all KV heads."""
        return sum(self.held.values())

    def to_dict(self) -> dict[str, object]:
        """Plain values; `exact` is that of the layer, `exact_by_head` that of every single KV head."""
        return {
            "entries": self.entries,
            "heads": dict(self.heads),
            "held": dict(self.held),
            **asdict(self.spent),
            "footprint_by_head": [head.footprint for head in self.by_head],
            "peak_by_head": [head.peak for head in self.by_head],
            "exact_by_head": all(head.exact for head in self.by_head),
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """The figures of one policy on one model. Bytes are of the whole batch.

    `exact` is False where footprint and peak are upper bounds, `exact_entries` where entries and bytes at the end are.
    by_class: footprint and peak of the KV heads of each class that has any.
    """

    plan: PolicyPlan
    prompt: int
    generate: int
    batch: int
    classes: tuple[ClassFacts, ...]
    layers: tuple[LayerFacts, ...]
    by_class: Mapping[str, Spent]
    footprint: float
    peak: float
    exact: bool
    exact_entries: bool
    bytes: int
    bytes_peak: int
    bytes_full: int
    ceiling: float
    gpu: str | None
    step_seconds: float | None  # of a decode step at best, on the GPU asked for
    step_seconds_full: float | None  # the same of the untouched cache
    max_bytes: int | None  # the limit asked about
    diagnostics: tuple[Diagnostic, ...]
    tables: int  # of `bytes_peak`, what stands once for all sequences
    reads: tuple[ReadFacts, ...] = ()  # of KV heads that do not read all

    @property
    def fits(self) -> bool | None:
        """Whether the peak stays within `max_bytes`; None without one."""
        return None if self.max_bytes is None else self.bytes_peak <= self.max_bytes

    @property
    def batch_that_fits(self) -> int | None:
        """The most sequences of these lengths whose peak stays within `max_bytes`; None without one."""
        each = (self.bytes_peak - self.tables) // self.batch
        return None if self.max_bytes is None else max(0, self.max_bytes - self.tables) // max(1, each)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries: fit for JSON."""
        out: dict[str, Any] = {
            "policy": self.plan.name,
            "prompt": self.prompt,
            "generate": self.generate,
            "batch": self.batch,
            "classes": {c.name: c.to_dict() | self._spent(c.name) for c in self.classes},
            "reads": {read.name: read.to_dict() for read in self.reads},
            "off": list(self.plan.off),
            "layers": len(self.layers),
            "by_layer": [layer.to_dict() for layer in self.layers],
            "footprint": self.footprint,
            "peak": self.peak,
            "exact": self.exact,
            "exact_entries": self.exact_entries,
            "bytes": self.bytes,
            "bytes_peak": self.bytes_peak,
            "bytes_full": self.bytes_full,
            "ceiling": self.ceiling,
        }
        if self.max_bytes is not None:
            out |= {"max_bytes": self.max_bytes, "fits": self.fits, "batch_that_fits": self.batch_that_fits}
        if self.gpu is not None:
            out |= {"gpu": self.gpu, "step_seconds": self.step_seconds, "step_seconds_full": self.step_seconds_full}
        return out

    def __str__(self) -> str:
        facts, about = self.plan.facts, "" if self.exact else " (upper bound)"
        most = "" if self.exact_entries else "at most "
        lines = [
            f"policy      {self.plan.name} on {facts.family or 'a model'}: {facts.layers} layers, "
            f"{facts.kv_heads} KV heads of {facts.head_dim} channels, {facts.dtype}",
            f"lengths     prompt {self.prompt}, {self.generate} decode forwards, batch {self.batch}"
            + (f", prompt in pieces of {self.plan.chunk}" if self.plan.chunk else ""),
        ]
        for part in self.classes:
            first, *more = part.lines()
            lines += [f"class       {first}", *(f"{'':12}{line}" for line in more)]
        for read in self.reads:
            first, *more = read.lines()
            lines += [f"reads       {first}", *(f"{'':12}{line}" for line in more)]
        if self.reads:
            lines.append(f"{'':12}what is not read stays in memory: footprint and peak are those of `keep`")
        if self.plan.off:
            lines.append(f"off         {_runs(self.plan.off)}: no attention runs and nothing is held")
        lines += [
            f"footprint   {self.footprint:.7f}{about}",
            f"peak        {self.peak:.7f}{about}",
            *(f"{'':12}footprint {line}" for line in self._extremes()),
            *(f"{label:<12}{line}" for label, line in self._entries()),
            f"bytes       {most}{size_text(self.bytes)} at the end, {size_text(self.bytes_peak)} at the peak, "
            f"{size_text(self.bytes_full)} untouched",
            f"ceiling     a decode step at most {self.ceiling:.2f} times as fast, by memory traffic",
        ]
        if self.step_seconds is not None and self.step_seconds_full is not None:
            lines.append(
                f"{self.gpu:<12}a decode step takes {self.step_seconds * 1e3:.2f} ms at best, untouched "
                f"{self.step_seconds_full * 1e3:.2f} ms: {self.step_seconds_full / self.step_seconds:.2f} times as fast"
            )
        if self.max_bytes is not None:
            room = "fits" if self.fits else "does not fit" if self.exact_entries else "may not fit"
            lines.append(
                f"limit       {room} in {size_text(self.max_bytes)}: up to {self.batch_that_fits} such sequences do"
            )
        warnings = dict.fromkeys(f"{d.message} [{d.code}]" for d in self.diagnostics if d.severity == "warning")
        return "\n".join([*lines, *(f"{'warning':<12}{warning}" for warning in warnings)])

    def _spent(self, name: str) -> dict[str, Any]:
        """A class's own figures; none of a class without KV heads."""
        return asdict(self.by_class[name]) if name in self.by_class else {}

    def _extremes(self) -> list[str]:
        """One line where classes or layers differ: the lowest and the highest."""
        parts = {f"class {name}": spent for name, spent in self.by_class.items()}
        if len(parts) < 2:
            parts = {f"layer {layer.layer}": layer.spent for layer in self.layers}
        low, high = (choose(parts.items(), key=lambda item: item[1].footprint) for choose in (min, max))
        if low[1].footprint == high[1].footprint:
            return []
        return [" to ".join(f"{'' if x.exact else 'at most '}{x.footprint:.4f} in {name}" for name, x in (low, high))]

    def _entries(self) -> list[tuple[str, str]]:
        """Layers that hold the same, a line for each run of them: what each class's KV heads hold together."""
        runs: list[tuple[LayerFacts, int]] = []
        for layer in self.layers:
            if runs and (runs[-1][0].held, runs[-1][0].heads) == (layer.held, layer.heads):
                runs[-1] = runs[-1][0], layer.layer
            else:
                runs.append((layer, layer.layer))
        out: list[tuple[str, str]] = []
        for first, last in runs:
            if not first.heads:  # off
                continue
            where = f"layer {last}" if first.layer == last else f"layers {first.layer}..{last}"
            most = "" if self.exact_entries else "at most "
            heads = {name: f"{n} head{'' if n == 1 else 's'} of {name}" for name, n in first.heads.items()}
            each = ", ".join(f"{most}{n} in {heads[name]}" for name, n in first.held.items())
            out.append(("entries" if not out else "", f"{where}: {each}"))
        return out


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
    max_bytes: int | str | None = None,
    **params: Any,
) -> Explanation:
    """What a policy would hold and cost.

    prompt: tokens of each sequence; generate: decode forwards; gpu: a GPU to predict the step time for. Memory is
    counted in pages, for a model on the CPU in extents. max_bytes: a limit, as `optimize` takes it; `fits` says whether
    the peak stays below, `batch_that_fits` how many such sequences would. PolicyError for the policy, KvCompileError
    for the model, the lengths, the limit and the GPU.
    """
    for label, value, least in (("prompt", prompt, 1), ("generate", generate, 0), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise KvCompileError(f"{label}={value!r}: give a whole number of at least {least}")
    device = gpu_facts(gpu) if gpu is not None else None
    facts = model_facts(model_or_config)
    compiled = compile_policy(policy, facts, name=name, tables=tables, **params)
    plan = compiled.plan
    in_pages = gpu is not None or not _on_cpu(model_or_config)
    spent: Footprint = footprint(plan, prompt, generate)
    if any(found.code == "K617" for found in compiled.diagnostics):  # a probe has yet to choose heads
        spent = spent.wherever()
    memory: Held = held(plan, prompt, generate, paged=in_pages)
    everything = facts.untouched(prompt + generate)
    full = everything * facts.entry_bytes * batch
    step = step_reads(plan, residents(plan, memory), prompt, generate, read_clauses(compiled.resolved))
    weights = facts.weight_bytes - idle_weights(plan)
    read = weights + batch * int(step.entries * facts.entry_bytes + step.landmark_bytes)
    return Explanation(
        plan=plan,
        prompt=prompt,
        generate=generate,
        batch=batch,
        classes=class_facts(compiled.resolved, plan, prompt, generate),
        layers=_layers(plan, memory, spent),
        by_class={plan.classes[owner].name: part for owner, part in spent.by_class.items()},
        footprint=spent.footprint,
        peak=spent.peak,
        exact=spent.exact,
        exact_entries=memory.exact,
        bytes=batch * memory.bytes + memory.tables,
        bytes_peak=batch * memory.bytes_peak + memory.tables,
        bytes_full=full,
        ceiling=(facts.weight_bytes + full) / read if read else 1.0,
        gpu=device.name if device is not None else None,
        step_seconds=_step(facts, weights, step, batch).seconds(device) if device is not None else None,
        step_seconds_full=_step(facts, facts.weight_bytes, StepReads((), everything, 0), batch).seconds(device)
        if device is not None
        else None,
        max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
        diagnostics=(*compiled.diagnostics, *never_full(compiled.resolved, plan, prompt + generate)),
        tables=memory.tables,
        reads=step.reads,
    )


def _layers(plan: PolicyPlan, memory: Held, spent: Footprint) -> tuple[LayerFacts, ...]:
    """Heads and entries by layer and class, classes in the plan's order; what each layer and KV head spends."""
    owners = [i for i, cls in enumerate(plan.classes) if cls.rows_of is None]
    found: list[dict[str, int]] = [{} for _ in range(plan.facts.layers)]
    for group, by_layer in memory.groups:
        name = next(plan.classes[rule].name for rule in group.rules if rule in owners)
        for layer, entries in zip(group.layers, by_layer, strict=True):
            found[layer][name] = found[layer].get(name, 0) + entries
    return tuple(
        LayerFacts(
            layer,
            {plan.classes[i].name: n for i in owners if (n := len(plan.heads(layer, i)))},
            by_class,
            spent.by_layer[layer],
            spent.by_head[layer],
        )
        for layer, by_class in enumerate(found)
    )


def _on_cpu(source: Any) -> bool:
    if not hasattr(source, "parameters"):
        return False
    return str(next(source.parameters()).device.type) == "cpu"


def _step(facts: ModelFacts, weights: int, step: StepReads, batch: int) -> Traffic:
    """A decode step at its best: weights and what is read of the cache once, and multiplied once for each query."""
    cache = batch * int(step.entries * facts.entry_bytes + step.landmark_bytes)
    numbers = weights // (facts.entry_bytes // (2 * facts.head_dim))
    products = batch * (2 * numbers + int(4 * step.entries * facts.head_dim * facts.group))
    return Traffic((("weights", weights), ("cache", cache)), launches=0, operations=products)


def _runs(layers: tuple[int, ...]) -> str:
    """Layers in words: `layers 3, 21..27`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] + 1 == layer:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
