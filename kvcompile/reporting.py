"""`report`: what a run really did, next to what arithmetic allows. Counted by the cache itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kvcompile.api import optimized
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.status import runs_on
from kvcompile.placement import heads_here

KEYS = (
    "policy", "footprint", "peak", "kept", "bytes_resident", "bytes_allocated", "bytes_full", "bytes_peak", "lengths",
    "prefill_seconds", "decode_tokens_per_second", "ceiling", "evictions", "graph_breaks", "recompiles",
    "cuda_graphs", "cuda_graph_replays", "footprint_by_head", "peak_by_head",
    "runs_on",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The figures of a model's latest run. Bytes are bytes, times seconds, ratios fractions of the full cache.

    `lengths` [layer][KV head] are the first sequence's; footprint and peak are means over sequences, so are
    `footprint_by_head` and `peak_by_head` [layer][KV head]. The mean of the first over heads is `footprint`; each head
    has its peak in a forward of its own, so the mean of the second is at least `peak`. `evictions`: entries that the
    policy dropped; what slides out of a model's window is none where the policy keeps all. `runs_on`: what carried it
    out, in words: the backend, generated kernels or what runs in their place.
    """

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def __getattr__(self, key: str) -> Any:
        if key == "values" or key not in self.values:
            raise AttributeError(key)
        return self.values[key]

    def __str__(self) -> str:
        v = self.values
        lengths = [n for row in v["lengths"] for n in row]
        lines = [
            f"policy             {v['policy']}",
            f"KV footprint       {v['footprint']:.4f} of full attention, peak {v['peak']:.4f}"
            + _extremes(v["footprint_by_head"]),
            f"entries            {v['kept']:.1%} kept, {v['evictions']} evicted; "
            f"{min(lengths)} to {max(lengths)} per KV head (first sequence)",
            f"bytes held         {_bytes(v['bytes_resident'])} of {_bytes(v['bytes_full'])} "
            f"({v['bytes_resident'] / max(1, v['bytes_full']):.1%}); pools {_bytes(v['bytes_allocated'])}, "
            f"peak {_bytes(v['bytes_peak'])}",
            f"speed              prefill {v['prefill_seconds']:.3f} s, "
            f"decode {v['decode_tokens_per_second']:.1f} tokens/s",
            f"                   memory traffic allows at most {v['ceiling']:.2f} times the full cache at equal batch",
            f"runs on            {v['runs_on']}",
            f"graphs             {v['graph_breaks']} breaks, {v['recompiles']} recompiles"
            + (f"; CUDA: {v['cuda_graphs']} captured, {v['cuda_graph_replays']} replays" if v["cuda_graphs"] else ""),
        ]
        if v["evictions"]:
            lines.append("                   eviction is lossy: `kvcompile verify` measures what was lost")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """The report of an optimised model's latest run. Raises KvCompileError before the first one."""
    state = optimized(model)
    run = state.forward.run
    if run is None:
        raise KvCompileError("nothing has run yet: call model.generate(...) first, then kvcompile.report(model)")
    layers, graphs = state.forward.engine.layers, state.forward.engine.graphs
    values = {
        "policy": state.compiled.plan.name,
        **run.numbers(),
        "graph_breaks": len(layers.breaks),
        "recompiles": layers.recompiles,
        "runs_on": runs_on(state.compiled.plan, state.backend) + heads_here(state.compiled.plan),
        "cuda_graphs": 0 if graphs is None else graphs.captured,
        "cuda_graph_replays": 0 if graphs is None else graphs.replayed,
    }
    return Report({key: values[key] for key in KEYS})


def _extremes(by_head: list[list[float]]) -> str:
    """The lowest and the highest KV head, where they differ: `; 0.2000 (layer 0, KV head 1) to ...`."""
    heads = [(spent, layer, head) for layer, row in enumerate(by_head) for head, spent in enumerate(row)]
    low, high = min(heads), max(heads)
    if low[0] == high[0]:
        return ""
    return "; " + " to ".join(f"{spent:.4f} (layer {layer}, KV head {head})" for spent, layer, head in (low, high))


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError
