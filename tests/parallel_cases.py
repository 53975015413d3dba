"""What several processes are run on beside one: policies, graphs, reads, families with windows and sinks.

A case goes by its name. `compare` runs some of them in one process and in several, and asserts that nothing differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvcompile
from kvcompile.api import optimized
from kvcompile.gate_files import Trained, gate_bytes
from tests.driving import LIBRARY, Positions, Sizes, same
from tests.families import ALTERNATE, PLAIN, SLIDING, config_of, family_model
from tests.following import policy
from tests.model.test_reads_together import TOGETHER, classes
from tests.parallel import SHAPE, answers, divided, exchanges, one, save_model, together
from tests.reading import CASES

MASK = ((1, 0, 0, 1), (0, 1, 0, 0), (0, 0, 1, 1))
FEW = ((1, 0), (0, 1))  # of the models with windows
LONGER = (52, 19)  # of prompts that graphs have seen before
WINDOWS = ("gemma2", "gemma3", "mistral_sliding", "qwen2_sliding", "granite_swa")

SHARED = """
policy voted(n=12):
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep recent(4) | top(n) by acc shared heads
    at prefill.end, step
"""
OWN = {
    "scattered": """
policy scattered(n=10):
    keep recent(4) | random(n, 7)
    at prefill.end, step
""",
    "voted": SHARED,
    "loudest": """
policy loudest(n=12):
    score s = max[h] max[g] mean[q in last(4)] attn
    keep recent(4) | top(n) by s shared heads
    at prefill.end
""",
    "filled": """
policy filled(n=12):
    score s = mean[g] mean[q in last(4)] attn
    keep recent(4) | top(n) by s across heads floor 10%
    at prefill.end, full(40)
""",
}
CLASSED = """
policy classed(n=10):
    few: keep recent(4) | top(n) by mean[g] mean[q in last(4)] attn across heads
    many: keep sink(2) | top(n) by mean[g] mean[q in last(4)] attn across heads floor 20%
    at prefill.end
heads few = table("mask.tsv", top=50%)
heads many = rest
"""
PAGES = "unit page(4) with lo = min[i] k, hi = max[i] k, c = mean[i] k"
MOBA = ("attend own page | top(2) pages by dot(q, c) per query_head", "at chunk, step")
READS: dict[str, str] = {
    "off": policy(PAGES, "layers 1: off", *MOBA),
    "off where heads compete": """
policy p():
    layers 1: off
    keep recent(4) | top(12) by mean[g] sum[q in last(4)] attn across heads
    at prefill.end
""",
    "a condition of each head": policy("attend sink(2) | recent(6)", "at step if mean[g] cos(q, prev.q) < 0.6"),
    "pages of what adakv keeps": policy(
        PAGES,
        "score bound = sum[d] max(q * lo, q * hi)",
        "keep recent(4) | top(16) by mean[g] sum[q in last(4)] attn across heads floor 20%",
        "at prefill.end",
        "attend newest page | top(2) pages by bound per query_head",
        "at step",
    ),
}
CLASS_READS = {
    "classes, moba": classes(MOBA[0], "chunk, step"),
    "classes, quest": classes("attend newest page | top(2) pages by bound per query_head", "step"),
}
NARROWED = {
    name: c
    for name, c in {**CASES, **TOGETHER}.items()
    if name not in ("bigbird", "llmdrop") and c.gates is None  # two need long ones; gates are of one model's heads
}
ALL_READS = (*READS, *CLASS_READS, *NARROWED, "seerattention_gated")


@dataclass(frozen=True, slots=True)
class Case:
    """Policy, options of `optimize`, changes of the model; family: of `WINDOWS`, or the plain model."""

    policy: str
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, object] = field(default_factory=dict)
    family: str = ""


def written(path: Path, mask: tuple[tuple[int, ...], ...] = MASK) -> Path:
    """A table of heads."""
    path.write_text("\n".join("\t".join(map(str, row)) for row in mask) + "\n")
    return path


def case(name: str, folder: Path) -> Case:
    """The case of a name: of a policy or of reads, `NAME, eager` or `NAME, inductor` with graphs, `FAMILY NAME`."""
    folder.mkdir(exist_ok=True)
    if name.endswith((", eager", ", inductor")):
        plain, mode = name.rsplit(", ", 1)
        found = case(plain, folder)
        return replace(found, options={**found.options, "compile": mode})
    family, _, rest = name.partition(" ")
    if family in WINDOWS:
        if rest in READS:
            return Case(READS[rest], family=family)
        few = (*FEW, FEW[0])[: windowed(family).config.num_hidden_layers]
        sample = LIBRARY[rest](Sizes(budget=14, mask=few))
        return Case(sample.policy, sample.options(folder), family=family)
    if name == "classed":
        return Case(CLASSED, {"tables": {"few": str(written(folder / "mask.tsv"))}})
    if name == "seerattention_gated":
        return Case(name, {"size": 4, "tau": 0.02, "tables": {"live": str(gates(folder / "gates.safetensors"))}})
    if name in CLASS_READS:
        return Case(CLASS_READS[name], {"tables": {"retrieval": str(written(folder / "mask.tsv"))}})
    if name in NARROWED:
        return Case(NARROWED[name].policy, dict(NARROWED[name].params), NARROWED[name].changes)
    if name in OWN or name in READS:
        return Case({**OWN, **READS}[name])
    sample = LIBRARY[name](Sizes(budget=14, mask=MASK))
    sample = replace(sample, changes={**SHAPE, **sample.changes})
    return Case(sample.policy, sample.options(folder), dict(sample.changes))


def gates(path: Path) -> Path:
    """A file of random gates for the plain model, of each layer and head another."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (8, 64, 6), "k": (4, 3 * 64, 6)}  # query heads; KV heads, of three landmarks
    found = {
        f"layers.{layer}.{name}": 0.3 * torch.randn(shape, generator=generator)
        for layer in range(3)
        for name, shape in shapes.items()
    }
    found["rope"] = torch.rand(3, generator=generator)
    path.write_bytes(gate_bytes(found, Trained(4, 0, "pooled", "raw.k", ("max", "min", "mean")), {"model": "random"}))
    return path


def windowed(family: str) -> PreTrainedModel:
    """A random model with windows of 9 tokens; granite_swa has sinks, too, which transformers' plan divides."""
    if family != "granite_swa":
        return family_model(family, vocab_size=256)
    torch.manual_seed(0)
    options = {**PLAIN, **SLIDING, "layer_types": ALTERNATE, "head_dim": 16, "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(config_of(family, **options)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.uniform_(0, 2)
    model.generation_config.eos_token_id = None
    return model


def runs(rank: int, cases: list[tuple[str, str, dict[str, Any], str, str]]) -> dict[str, Any]:
    """In each process: of every case what came out, and how many exchanges the run took. Asserts the logits."""
    found: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, text, options, folder, expected in cases:
        if folder not in models:
            models[folder] = divided(Path(folder))
        model = models[folder]
        kvcompile.optimize(model, text, **options)
        before = exchanges(model)
        new, kept, logits = seen(model, options)
        same(logits, torch.load(expected), f"{name}, process {rank}")
        found[name] = {"tokens": new, "kept": kept, "exchanges": exchanges(model) - before, "graphs": graphs(model)}
    return found


def seen(model: PreTrainedModel, options: dict[str, Any]) -> tuple[list[list[int]], list[Positions], torch.Tensor]:
    """What a model answers; where graphs are made they have met other lengths before."""
    if options.get("compile") in ("eager", "inductor"):
        answers(model, LONGER)
    return answers(model)


def graphs(model: PreTrainedModel) -> list[Any]:
    """Graph breaks, recompiles, and the phase of every graph."""
    layers = optimized(model).forward.engine.layers
    return [layers.breaks, layers.recompiles, [record.phase for record in layers.records]]


def prepared(names: tuple[str, ...], tmp_path: Path, backend: str) -> tuple[list[Any], dict[str, Any]]:
    """What processes are to run, and what one process makes of it."""
    cases, expected = [], {}
    for i, name in enumerate(names):
        found = case(name, tmp_path / f"case{i}")
        shape = {**SHAPE, **found.changes}
        folder = tmp_path / ("model" + found.family + "".join(map(str, shape.values())))
        if not folder.exists() and found.family:
            windowed(found.family).save_pretrained(folder)
        elif not folder.exists():
            save_model(folder, **shape)
        options, path = {**found.options, "backend": backend}, tmp_path / f"logits{i}.pt"
        model = one(folder)
        with kvcompile.use(model, found.policy, **options):
            new, kept, logits = seen(model, options)
            torch.save(logits, path)
            expected[name] = {"tokens": new, "kept": kept, "graphs": graphs(model)}
        cases.append((name, found.policy, options, str(folder), str(path)))
    return cases, expected


def agree(parts: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Asserts the same tokens in every process, the same number of graphs, and that the positions of their heads, in
    order, are the model's."""
    for name, truth in expected.items():
        assert all(part[name]["tokens"] == truth["tokens"] for part in parts), name
        assert all(part[name]["graphs"] == truth["graphs"] for part in parts), name
        for b, layers in enumerate(truth["kept"]):
            for layer, heads in enumerate(layers):
                kept = [tuple(head) for part in parts for head in part[name]["kept"][b][layer]]
                assert kept == list(heads), f"{name}, sequence {b}, layer {layer}"


def compare(names: tuple[str, ...], world: int, tmp_path: Path, backend: str = "cpu") -> dict[str, Any]:
    """Runs cases in one process and in `world`; returns what one of them made of each."""
    cases, expected = prepared(names, tmp_path, backend)
    parts = together(runs, world, cases, folder=tmp_path)
    agree(parts, expected)
    return parts[0]
