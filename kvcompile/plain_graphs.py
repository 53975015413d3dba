"""Runs a plain PyTorch model's forward as Dynamo graphs whose attentions are ours.

Takes a model and the name of its positions argument; gives a `PlainModel`, what `OptimizedForward` needs of a model:
`forward` with a `Call`, dtype, mode. A graph is traced once per kind of length and batch; a call's phase and program
choose which copy of it runs, so that another policy needs no new trace.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from kvcompile.compiled import ATTENTION, Call, GraphRecord, Layers
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes.dump import dump_graph
from kvcompile.passes.match_positions import counts_positions
from kvcompile.passes.match_sdpa import SdpaCall, facts_of, find_calls, mask_only, with_anchors
from kvcompile.passes.open_anchors import OpenAnchors
from kvcompile.passes.traced import Traced

SHOWN = 400  # characters of torch's own message


def is_plain(model: object) -> bool:
    """Whether a model belongs here: it is neither one of transformers' nor a wrapper around one."""
    return (
        isinstance(model, nn.Module)
        and not isinstance(model, PreTrainedModel)
        and not hasattr(model, "_supports_attention_backend")
    )


@dataclass
class Output:
    """What a forward gives: logits [batch, n, vocabulary] or of the last token alone, as a Hugging Face model would."""

    logits: Tensor
    past_key_values: Any = None


@dataclass
class Graphs(Layers):
    """The graphs of one model. `calls`: the attentions of the first; `counts`: where positions are counted inside."""

    facts: ModelFacts | None = None
    scale: float = 1.0
    counts: str | None = None
    traces: list[Graph] = field(default_factory=list)

    @property
    def recompiles(self) -> int:
        """Traces beyond the first of one token and the first of more."""
        return len(self.traces) - len({graph.steps for graph in self.traces})

    def forget(self) -> None:
        """Drop all rewritten copies; what was traced stays."""
        self.records.clear()
        for graph in self.traces:
            graph.opened.clear()


class Graph:
    """One traced graph. Stands where Dynamo calls it; runs as it is, or as the call in flight says."""

    def __init__(self, owner: PlainModel, module: fx.GraphModule) -> None:
        self.owner, self.module = owner, module
        self.name = str(torch._guards.CompileContext.current_compile_id())
        self.traced: Traced | None = None
        self.calls: tuple[SdpaCall, ...] = ()
        self.opened: dict[tuple[str, str], Callable[..., Any]] = {}

    @property
    def steps(self) -> bool:
        """Whether this is a graph of one token."""
        return self.traced is not None and self.traced.tokens == 1

    def __call__(self, *inputs: Any) -> Any:
        owner = self.owner
        if self.traced is None:
            # Only now are stored masks at hand; what is refused is refused in the caller's own stack.
            self._look(inputs)
        call = owner.call
        if call is None:
            return self.module(*inputs)
        key = call.phase, call.site
        if key not in self.opened:
            self.opened[key] = self._open(*key)
        out = self.opened[key](*inputs, *[tensor for site in call.sites for tensor in site])
        if call.phase == "step":
            call.opened.extend(range(len(call.sites)))
        return out

    def _look(self, inputs: Sequence[Any]) -> None:
        owner, graphs = self.owner, self.owner.graphs
        assert owner.asked is not None
        try:
            traced = Traced.of(self.module, inputs, *owner.asked)
        except LookupError as error:
            raise KvCompileError(f"{owner.name}: {error}") from error
        calls = find_calls(traced)
        sizes = {id(p): p.numel() * p.element_size() for p in owner.parameters()}
        facts = facts_of(calls, calls[0].shape[0] * calls[0].shape[2], sum(sizes.values()), owner.name)
        if graphs.facts is None:
            if isinstance(traced.tokens, int):
                raise KvCompileError(
                    f"{owner.name}: its forward fixes how many tokens it is given ({traced.tokens} here), so every "
                    "length would be a graph of its own: compute sizes with the tensors' own shapes"
                )
            graphs.facts, graphs.scale = facts, calls[0].scale
            graphs.counts = counts_positions(traced, set(mask_only(traced, calls)))
        if (facts, calls[0].scale) != (graphs.facts, graphs.scale):
            many = traced.tokens if isinstance(traced.tokens, int) else "several"
            raise KvCompileError(
                f"{owner.name} has other attentions for {many} tokens than it had when it was optimised: "
                f"{facts.layers} of {calls[0].shape} in {facts.dtype}"
            )
        graphs.traces.append(self)
        self.traced, self.calls = traced, calls

    def _open(self, phase: str, site: str) -> Callable[..., Any]:
        assert self.traced is not None
        module, anchors = with_anchors(self.traced, self.calls, len(Site._fields), phase, site)
        OpenAnchors(phase)(module.graph)
        module.recompile()
        graphs = self.owner.graphs
        before, after = (m.print_readable(print_output=False) for m in (self.module, module))
        graphs.records.append(GraphRecord(phase, before, after, anchors, self.name))
        dump_graph(graphs.policy, f"graph-{phase}-before.txt", before)
        dump_graph(graphs.policy, f"graph-{phase}-after.txt", after)
        return module.forward


class PlainModel:
    """A plain model as `OptimizedForward` takes one: right-aligned token ids and positions in, `Output` out."""

    config = types.SimpleNamespace(_attn_implementation=ATTENTION, output_hidden_states=False)

    def __init__(self, model: nn.Module, original: Callable[..., Any], positions: str | None, policy: str) -> None:
        self.model, self.original, self.positions = model, original, positions
        self.name = type(model).__name__
        self.graphs = Graphs(policy, "eager", ())
        self.call: Call | None = None
        self.asked: tuple[Tensor, Tensor] | None = None  # what the graph in flight was handed
        self.last_only = False  # whether the forward gives logits of the last token alone
        self.wrap: Callable[[Tensor], Any] = lambda logits: logits  # logits, as the forward itself would return them
        self._run = self._compiled()

    @property
    def training(self) -> bool:
        return self.model.training

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def modules(self) -> Iterator[nn.Module]:
        return self.model.modules()

    def forward(self, input_ids: Tensor, position_ids: Tensor, kvc: Call | None = None, **_: Any) -> Output:
        """One piece, or without `kvc` the untouched model."""
        # Slices have strides of their own, which would be graphs of their own.
        ids, places = (t.clone(memory_format=torch.contiguous_format) for t in (input_ids, position_ids))
        for tensor in (ids, places):
            for dim in (0, 1):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        self.call, self.asked = kvc, (ids, places)
        try:
            return Output(self._logits(self._run(self.model, ids, places), ids.shape[1]))
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise KvCompileError(
                f"{self.name} needs more graphs than torch keeps ({torch._dynamo.config.recompile_limit}): its forward "
                "takes another path for each input"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            said = " ".join(str(error).split("Hint:")[0].split())
            raise KvCompileError(
                f"{self.name} cannot be traced as one graph, and only in a graph can its attentions be found: "
                + said[:SHOWN]
            ) from error
        finally:
            self.call, self.asked = None, None

    def _logits(self, out: Any, n: int) -> Tensor:
        logits, wrap = _split(out)
        if logits is None or logits.ndim != 3 or logits.shape[1] not in (1, n):
            shape = type(out).__name__ if logits is None else tuple(logits.shape)
            raise KvCompileError(
                f"{self.name} returns {shape}: its forward must return logits [batch, n or 1, vocabulary], alone or "
                "first in a tuple whose other values are None"
            )
        if n > 1:
            self.last_only = logits.shape[1] == 1
        self.wrap = wrap
        return logits

    def _compiled(self) -> Callable[..., Any]:
        forward, positions = self.original, self.positions

        def run(model: nn.Module, ids: Tensor, places: Tensor) -> Any:
            return forward(ids) if positions is None else forward(ids, **{positions: places})

        # torch keeps graphs per code object: each model has its own.
        code = run.__code__.replace(co_name=f"{self.name}_forward")
        own = types.FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)

        def backend(module: fx.GraphModule, inputs: list[Any]) -> Graph:
            return Graph(self, module)

        return torch.compile(own, backend=backend, fullgraph=True)


def _split(out: Any) -> tuple[Tensor | None, Callable[[Tensor], Any]]:
    """The logits of what a forward returned, and how they are put back; None where they are not found."""
    if isinstance(out, Tensor):
        return out, lambda logits: logits
    if type(out) in (tuple, list) and out and isinstance(out[0], Tensor) and all(rest is None for rest in out[1:]):
        kind, others = type(out), len(out) - 1
        return out[0], lambda logits: kind((logits, *[None] * others))
    return None, lambda logits: logits
