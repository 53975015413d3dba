"""The graph of one rewritten decoder layer in ATen operators, its kvc operators in place: what `export` hands on.

Takes a model and a policy, runs a made-up prompt and traces the layer in the phase that is asked for. Guarantees: the
graph pass is the one that compiled models go through; weights are inputs, never literals; the model is left as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from kvcompile.api import optimized, use
from kvcompile.compiled import Anchor, Call, LayerForward
from kvcompile.kernels.decomposed import PHASES, Port
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.families import CARRIERS
from kvcompile.passes.open_anchors import OpenAnchors, gathered_evictions
from kvcompile.probe import positions_of, random_tokens


@dataclass(frozen=True)
class LayerGraph:
    """A function of the export; every node has its value's shape and dtype in `meta["val"]`."""

    name: str
    graph: fx.Graph
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def layer_graphs(
    model: nn.Module, policy: Any, layer: int, phase: str, length: int, options: dict[str, Any]
) -> tuple[PolicyPlan, tuple[LayerGraph, ...]]:
    """The rewritten layer and, where a step evicts, what runs once after the last layer.

    phase: `step` or `prefill`; length: tokens of the made-up prompt; options: those of `optimize`.
    """
    most = positions_of(model)
    if most is not None and length + 1 > most:
        raise KvCompileError(f"length {length}: the model has {most} positions, one of which the step takes")
    found: list[tuple[LayerGraph, ...]] = []
    with use(model, policy, **options | {"compile": "off"}):
        engine = optimized(model).forward.engine
        plain = engine.layers.run

        def run(call: Call, at: LayerForward, args: Any, kwargs: Any) -> Any:
            if at.index == layer and call.phase == PHASES[phase]:
                found[:] = [_traced(engine.plan, call, at.layer, at.index, engine.scale, args, kwargs)]
            return plain(call, at, args, kwargs)

        engine.layers.run = run  # type: ignore[method-assign]
        new = 1 if phase == "prefill" else 2
        ids = random_tokens(model, length)[None].to(next(model.parameters()).device)
        generate: Any = model.generate
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
        )
        plan = engine.plan
    if not found:
        raise KvCompileError(f"layer {layer} ran no forward of phase {phase}")
    return plan, found[0]


class _Plain(nn.Module):
    """A decoder layer's own forward, whatever stands in the instance's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _traced(
    plan: PolicyPlan, call: Call, layer: nn.Module, index: int, scale: float, args: Any, kwargs: Any
) -> tuple[LayerGraph, ...]:
    anchor = Anchor(call.phase, call.site, list(call.sites[index]))
    carrier = CARRIERS.get(type(layer).__name__, "kvc")
    paths, spec = pytree.tree_flatten_with_path((args, {**kwargs, carrier: anchor}))
    leaves = [leaf for _, leaf in paths]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    module = _Plain(layer)
    weights = dict(module.named_parameters()) | dict(module.named_buffers())

    def run(weights: dict[str, Tensor], tensors: list[Tensor]) -> Any:
        whole = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            whole[i] = tensor
        given, named = pytree.tree_unflatten(whole, spec)
        return torch.func.functional_call(module, weights, given, named)

    with torch.no_grad():
        traced = make_fx(run, tracing_mode="fake")(weights, [leaves[i] for i in places])
    names = [name.removeprefix("layer.") for name in weights] + [_name(paths[i][0]) for i in places]
    graph, mode = traced.graph, _mode(traced.graph)
    OpenAnchors(call.phase)(graph)
    inputs = []
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        if node.users:
            inputs.append(_port(name, node.meta["val"]))
        else:
            graph.erase_node(node)
    _complete(graph, mode)
    hidden = _port("hidden_states", _result(graph), "after the layer")
    functions = [LayerGraph("layer", graph, tuple(inputs), (hidden,))]
    if call.phase == "step":
        functions += _after_last_layer(plan, call, scale, mode)
    return tuple(functions)


def _after_last_layer(plan: PolicyPlan, call: Call, scale: float, mode: FakeTensorMode) -> list[LayerGraph]:
    """The one launch that evicts in all layers of a step."""
    tail = gathered_evictions(plan, call.site, scale, len(Site._fields))
    if tail is None:
        return []
    stores = [(index, name, t) for index in plan.live for name, t in call.sites[index]._asdict().items()]
    inputs = []
    for node, (index, name, tensor) in zip(tail.graph.find_nodes(op="placeholder"), stores, strict=True):
        node.meta["val"] = mode.from_tensor(tensor)
        inputs.append(_port(f"layer{index}.{name}", tensor))
    _complete(tail.graph, mode)
    return [LayerGraph("after_last_layer", tail.graph, tuple(inputs), ())]


def _complete(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Values of the nodes that the graph pass has put in."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            with mode, torch.no_grad():
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))


def _mode(graph: fx.Graph) -> FakeTensorMode:
    return next(node.meta["val"].fake_mode for node in graph.nodes if node.op == "placeholder")


def _result(graph: fx.Graph) -> Tensor:
    (output,) = graph.find_nodes(op="output")
    result = output.args[0]
    found = result[0] if isinstance(result, (list, tuple)) else result
    value: Tensor = found.meta["val"]
    return value


def _port(name: str, tensor: Tensor, says: str = "") -> Port:
    return Port(name, tuple(int(n) for n in tensor.shape), tensor.dtype, says)


def _name(path: tuple[Any, ...]) -> str:
    """`hidden_states`, `position_embeddings.0`, `store.length`."""
    words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if "store" in words:
        return f"store.{Site._fields[int(words[-1])]}"
    if words[0] == "0":  # positional
        return "hidden_states" if words[1:] == ["0"] else ".".join(["argument", *words[1:]])
    return ".".join(words[1:])
