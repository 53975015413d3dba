"""The graph pass: opens each attention anchor into head-specialised attention and eviction operators.

Takes a Dynamo graph with `kvc::anchor_v1` nodes of one phase; gives the same graph where no anchor is
left: attention, state updates, then one insert or eviction per head class. In a decode step evictions
leave the layer's graph altogether: `gathered_evictions` is the one launch after the last layer. What needs all
layers (`kvc::evict_span_v1`) is in no graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvcompile.kernels import ops
from kvcompile.kernels.plan import PolicyPlan

_ops = torch.ops.kvc


@dataclass(frozen=True)
class OpenAnchors:
    """Options of the pass: the phase that is being compiled."""

    phase: str

    def __call__(self, graph: fx.Graph) -> int:
        """Rewrite in place; returns how many anchors were opened. Nothing but anchors is erased."""
        anchors = [n for n in graph.nodes if n.op == "call_function" and _is_anchor(n.target)]
        for anchor in anchors:
            with graph.inserting_before(anchor):
                self._open(graph, anchor)
        graph.lint()
        return len(anchors)

    def _open(self, graph: fx.Graph, anchor: fx.Node) -> None:
        q, k, v, store, scale, phase, site = _arguments(anchor)
        if phase != self.phase:
            raise RuntimeError(f"anchor of phase {phase} in a graph of phase {self.phase}")
        plan = ops.program(site).plan
        emit = _Emitter(graph, anchor)
        if phase == "step":
            out = emit(_ops.attend_step_v1.default, q, k, v, store, scale, site)
        else:
            out = emit(_ops.attend_prefill_v1.default, q, k, v, store, scale, site)
            state = emit(_ops.observe_v2.default, q, k, v, store, scale, site) if plan.states else None
            for cls, judges in ops.stages(plan, phase):
                if judges:
                    emit(_ops.evict_prefill_v1.default, q, k, v, state, store, scale, cls, site)
                else:
                    emit(_ops.insert_v1.default, k, v, state, store, cls, site)
        out.meta = dict(anchor.meta)
        anchor.replace_all_uses_with(out)
        graph.erase_node(anchor)


class _Emitter:
    """Inserts calls that inherit the anchor's place in the model (module stack, stack trace)."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self.graph = graph
        self.kept: dict[str, Any] = {
            key: anchor.meta[key] for key in ("nn_module_stack", "stack_trace") if key in anchor.meta
        }

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta.update(self.kept)
        return node


def gathered_evictions(plan: PolicyPlan, site: str, scale: float, tensors: int) -> fx.GraphModule | None:
    """The graph after the last layer of a decode step: one eviction over the stores of all layers that are not off.

    `tensors` is the number of tensors of one layer's store; None where the policy never evicts in a step.
    """
    if not plan.evicts_in_step:
        return None
    graph = fx.Graph()
    layers = len(plan.live)
    stores = [graph.placeholder(f"store_{i}") for i in range(layers * tensors)]
    graph.call_function(_ops.evict_step_v1.default, (stores, layers, scale, site))
    graph.output(())
    return fx.GraphModule(torch.nn.Module(), graph, "GatheredEvictions")


def _is_anchor(target: Any) -> bool:
    return target in (_ops.anchor_v1, _ops.anchor_v1.default)


def _arguments(anchor: fx.Node) -> list[Any]:
    names = ("q", "k", "v", "store", "scale", "phase", "site")
    given = dict(zip(names, anchor.args, strict=False)) | dict(anchor.kwargs)
    return [given[name] for name in names]
