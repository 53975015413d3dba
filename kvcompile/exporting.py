"""`export`: what the compiler makes of a policy, as MLIR text that other compilers read. Needs torch-mlir.

`torch`: one rewritten decoder layer, its kvc operators kept. `linalg` and `stablehlo`: the layer's policy step
decomposed into tensor math of fixed shapes (`kernels.decomposed`). Guarantees: the same bytes for the same arguments;
each text stands alone, with a header that says what goes in and out; what has no such form is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from kvcompile import __version__
from kvcompile.exporting_graph import LayerGraph, layer_graphs
from kvcompile.kernels.decomposed import PHASES, DecomposedLayer, Port
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.functional import NotFunctional
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes import compile_policy
from kvcompile.passes.facts import model_facts
from kvcompile.passes.pipeline import probes_of
from kvcompile.passes.sites import find_sites

DIALECTS = {"torch": "raw", "linalg": "linalg-on-tensors", "stablehlo": "stablehlo"}
LENGTH = 64
STEP = "policy_step"  # the function of a decomposed layer


@dataclass(frozen=True, slots=True)
class Exported:
    """MLIR text and what its first function takes and gives, in order."""

    text: str
    policy: str
    to: str
    layer: int
    phase: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values; ports as their lines in the header."""
        ports = {"inputs": [line(p) for p in self.inputs], "outputs": [line(p) for p in self.outputs]}
        facts = {"policy": self.policy, "to": self.to, "layer": self.layer, "phase": self.phase}
        return {**facts, **ports, "text": self.text}


def export(
    model_or_config: Any,
    policy: Any,
    *,
    to: str = "torch",
    layer: int = 0,
    phase: str = "step",
    length: int = LENGTH,
    name: str | None = None,
    tables: Any = None,
    **params: Any,
) -> Exported:
    """One layer under a policy as MLIR text.

    to: `torch`, `linalg` or `stablehlo`; the last two need no weights, so that a configuration is enough. phase:
    `step`, one token of decode, or `prefill`, a whole prompt. length: tokens of the prompt; decomposed, the columns of
    a row. policy, name, tables, params: as for `optimize`.

    Raises PolicyError for the policy; KvCompileError where torch-mlir is missing, for arguments, and for what cannot
    be lowered, with the policy, the class and what it is.
    """
    require_torch_mlir()
    if to not in DIALECTS:
        raise KvCompileError(f"cannot export to {to!r}: one of {', '.join(DIALECTS)}")
    if phase not in PHASES:
        raise KvCompileError(f"no phase {phase!r}: one of {', '.join(PHASES)}")
    if length < 1:
        raise KvCompileError(f"length {length}: a prompt has at least one token")
    options = {"name": name, "tables": tables, **params}
    if to == "torch":
        return _rewritten(model_or_config, policy, layer, phase, length, options)
    return _decomposed(model_or_config, policy, to, layer, phase, length, options)


def require_torch_mlir() -> None:
    """KvCompileError with the way to install it, where torch-mlir is missing."""
    if find_spec("torch_mlir") is None:
        raise KvCompileError("export needs torch-mlir, which is not installed: pip install 'kvcompile[mlir]'")


# -- the rewritten layer -----------------------------------------------------------------------------------------------


def _rewritten(model: Any, policy: Any, layer: int, phase: str, length: int, options: dict[str, Any]) -> Exported:
    if not isinstance(model, nn.Module):
        raise KvCompileError("the rewritten layer is traced on the model itself: give the model, not its configuration")
    _check_layer(layer, len(find_sites(model)))
    plan, graphs = layer_graphs(model, policy, layer, phase, length, options)
    notes = ["kvc operators change the tensors of their store in place, though their types here are values."]
    if any(plan.spans(cls) for cls in range(len(plan.classes))):
        notes.append("What waits for all layers (kvc::evict_span_v1) runs after the model and is in no graph.")
    lines = _title(plan, "the rewritten layer in the torch dialect", layer, phase) + notes
    first, *after = graphs
    lines += [f"@{first.name}", *_numbered(first.inputs, first.outputs)]
    for graph in after:
        lines += [f"@{graph.name}", f"  %arg0 to %arg{len(graph.inputs) - 1}: the stores of all layers, in order"]
    with _named(plan, layer, phase, "torch"):
        body = _imported(graphs)
    return Exported(_headed(lines, body), plan.name, "torch", layer, phase, first.inputs, first.outputs)


def _imported(graphs: tuple[LayerGraph, ...]) -> str:
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_importer import FxImporter

    context = ir.Context()
    torch_dialect.register_dialect(context)
    importer = FxImporter(context=context)
    for graph in graphs:
        importer.import_stateless_graph(graph.graph, func_name=graph.name)
    return str(importer.module)


# -- the decomposed reference ------------------------------------------------------------------------------------------


def _decomposed(
    source: Any, policy: Any, to: str, layer: int, phase: str, length: int, options: dict[str, Any]
) -> Exported:
    compiled = compile_policy(policy, model_facts(source), **options)
    asked = probes_of(compiled.resolved)
    if asked and not isinstance(source, nn.Module):
        raise KvCompileError(
            f"{compiled.plan.name} chooses heads by a probe, which needs the weights: call kvcompile.export with the "
            "loaded model, or give the head class a table"
        )
    decoder = source if isinstance(source, nn.Module) else _without_weights(source)
    sites = find_sites(decoder)
    _check_layer(layer, len(sites))
    if asked:
        from kvcompile.probe import run_probes

        compiled = compile_policy(policy, model_facts(source), probes=run_probes(decoder, sites, asked), **options)
    plan, scale = compiled.plan, sites[layer].scale
    with _named(plan, layer, phase, to), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_mlir import fx

        module = DecomposedLayer(plan, layer, phase, length, scale)
        body = str(fx.export_and_import(_traced(module), output_type=DIALECTS[to], func_name=STEP))
    ports = _numbered(module.inputs, module.outputs)
    lines = [*_title(plan, f"its policy step in {to}", layer, phase), f"@{STEP}", *ports]
    return Exported(_headed(lines, body), plan.name, to, layer, phase, module.inputs, module.outputs)


def _traced(module: DecomposedLayer) -> torch.export.ExportedProgram:
    inputs = tuple(torch.zeros(port.shape, dtype=port.dtype) for port in module.inputs)
    with torch.no_grad():
        return torch.export.export(module, inputs, strict=False)


def _without_weights(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise KvCompileError(f"{type(config).__name__}: transformers has no causal model for it: {error}") from error
    return model


# -- text --------------------------------------------------------------------------------------------------------------

_TYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def line(port: Port) -> str:
    """`name f32[4x64]: what it is`."""
    shape = "x".join(map(str, port.shape))
    says = f": {port.says}" if port.says else ""
    return f"{port.name} {_TYPES.get(port.dtype, str(port.dtype))}[{shape}]{says}"


def _title(plan: PolicyPlan, what: str, layer: int, phase: str) -> list[str]:
    facts = plan.facts
    model = f"{facts.layers} layers, {facts.q_heads} query and {facts.kv_heads} KV heads of {facts.head_dim} channels"
    made = f"kvcompile {__version__}, torch-mlir {version('torch-mlir')}"
    return [
        f"Policy {plan.name}, layer {layer}, phase {phase}: {what}. Made by {made}.",
        f"Model: {facts.family or 'decoder'}, {model}. Plan {plan.digest}.",
    ]


def _numbered(inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Iterator[str]:
    yield from (f"  %arg{i} {line(port)}" for i, port in enumerate(inputs))
    yield from (f"  result {i} {line(port)}" for i, port in enumerate(outputs))


def _headed(lines: list[str], body: str) -> str:
    return "\n".join(f"// {text}" for text in lines) + "\n" + body.rstrip() + "\n"


# -- errors ------------------------------------------------------------------------------------------------------------


def _check_layer(layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise KvCompileError(f"no layer {layer}: the model has layers 0 to {layers - 1}")


@contextmanager
def _named(plan: PolicyPlan, layer: int, phase: str, to: str) -> Iterator[None]:
    """What cannot be lowered, whoever found out, as one error that says what it is."""
    if layer in plan.off:
        raise KvCompileError(f"policy {plan.name}: layer {layer} is off, so it has no attention to export")
    try:
        yield
    except NotFunctional as error:
        raise KvCompileError(
            f"policy {plan.name}, layer {layer}, phase {phase}: no form with fixed shapes for {to} yet: {error}. "
            "Export to torch keeps it as an operator"
        ) from error
    except Exception as error:  # torch-mlir's and torch.export's own, of many kinds
        reason = next((text.strip() for text in str(error).splitlines() if "error:" in text), str(error)[:300])
        raise KvCompileError(
            f"policy {plan.name}, layer {layer}, phase {phase}: torch-mlir could not lower it to {to}: {reason}"
        ) from error
