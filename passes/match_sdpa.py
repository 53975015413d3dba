"""Finds the attentions of a plain PyTorch model in its Dynamo graph, and puts anchors in their place.

Takes a traced forward; gives one `SdpaCall` per call of `scaled_dot_product_attention`, in the order in which they
run, which is the order of layers. Guarantees that each is causal self-attention over all tokens of the call, and that
all are alike; anything else is a KvCompileError that names the call. KV heads are those before they are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes.facts import DTYPES
from kvcompile.passes.match_masks import mask_nodes, refusal
from kvcompile.passes.traced import Traced, called, changes_in_place, dims, is_number, placeholders, where

SDPA = "scaled_dot_product_attention"
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# What stands in a graph where attention is not the call that is looked for.
_OTHERS = {
    "flex_attention": "flex_attention, whose mask and score are code of their own",
    "_transformer_encoder_layer_fwd": "torch.nn.TransformerEncoderLayer's fused forward",
    "_native_multi_head_attention": "torch.nn.MultiheadAttention's fused forward",
    "multi_head_attention_forward": "torch.nn.MultiheadAttention, which gives attention weights back",
    "_scaled_dot_product_flash_attention": "a direct call of one SDPA kernel",
    "_scaled_dot_product_efficient_attention": "a direct call of one SDPA kernel",
    "softmax": "a softmax, as attention that is written out has",
}


@dataclass(frozen=True, slots=True)
class Heads:
    """Keys or values before their heads are repeated: [batch, heads, n, D], or with `swapped` [batch, n, heads, D]."""

    node: fx.Node
    swapped: bool

    @property
    def number(self) -> int:
        return int(dims(self.node)[2 if self.swapped else 1])


@dataclass(frozen=True, slots=True)
class SdpaCall:
    """One attention: query node [batch, q_heads, n, D], its keys and values, its mask if it has one, logit scale."""

    node: fx.Node
    query: fx.Node
    key: Heads
    value: Heads
    mask: fx.Node | None
    scale: float
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head_dim."""
        _, heads, _, width = dims(self.query)
        return int(heads), self.key.number, int(width)


def find_calls(traced: Traced) -> tuple[SdpaCall, ...]:
    """All attentions, in order. Raises KvCompileError for any that cannot stand on a policy's cache."""
    _refuse_nested(traced.module)
    nodes = [node for node in traced.graph.nodes if called(node) == SDPA]
    if not nodes:
        named = (words for node in traced.graph.nodes for key, words in _OTHERS.items() if called(node) == key)
        found = next(named, None)
        raise KvCompileError(
            f"the forward never calls {SDPA}: " + (f"there is {found}" if found else "no attention was found")
            + f". Write attention as torch.nn.functional.{SDPA}(q, k, v, is_causal=True)"
        )  # fmt: skip
    calls = tuple(_call(traced, node, index) for index, node in enumerate(nodes))
    for index, call in enumerate(calls):
        for what, mine, first in (
            ("query heads, KV heads, channels", call.shape, calls[0].shape),
            ("dtype", call.dtype, calls[0].dtype),
            ("scale", call.scale, calls[0].scale),
        ):
            if mine != first:
                raise _refused(call.node, index, f"{what}: {mine}, and {first} in attention 0; all must be alike")
    return calls


def facts_of(calls: Sequence[SdpaCall], hidden: int, weight_bytes: int, family: str) -> ModelFacts:
    """What a policy is bound to."""
    q_heads, kv_heads, head_dim = calls[0].shape
    return ModelFacts(
        layers=len(calls), q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=calls[0].dtype, hidden=hidden,
        weight_bytes=weight_bytes, family=family,
    )  # fmt: skip


def with_anchors(
    traced: Traced, calls: Sequence[SdpaCall], tensors: int, phase: str, site: str
) -> tuple[fx.GraphModule, int]:
    """A copy of the graph where an anchor stands for each attention, and where nothing makes masks any more.

    The copy takes `tensors` more inputs per layer after the graph's own: each layer's store, in order.
    Returns it and how many anchors there are.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    out = graph.graph_copy(traced.graph, env)
    graph.output(out)
    last = placeholders(graph)[-1]
    with graph.inserting_after(last):
        after = last
        stores = []
        for index in range(len(calls) * tensors):
            with graph.inserting_after(after):
                after = graph.placeholder(f"kvc_store_{index}")
            stores.append(after)
    for index, call in enumerate(calls):
        node = env[call.node]
        with graph.inserting_before(node):
            k, v = (_heads_first(graph, heads, env) for heads in (call.key, call.value))
            store = stores[index * tensors : (index + 1) * tensors]
            arguments = (env[call.query], k, v, store, call.scale, phase, site)
            anchor = graph.call_function(torch.ops.kvc.anchor_v1.default, arguments)
            back = graph.call_method("transpose", (anchor, 1, 2))
        anchor.meta, back.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(back)
        graph.erase_node(node)
    for node in reversed(mask_only(traced, calls)):  # each costs n * n
        graph.erase_node(env[node])
    graph.lint()
    return fx.GraphModule(traced.module, graph), len(calls)


def mask_only(traced: Traced, calls: Sequence[SdpaCall]) -> list[fx.Node]:
    """The calls that nothing but masks needs, in the order of the graph."""
    found = {n for call in calls if call.mask is not None for n in mask_nodes(traced, call.mask)}
    made = [n for n in traced.graph.nodes if n in found and n.op in ("call_function", "call_method")]
    readers = {call.node for call in calls}
    alone = all(user in found or user in readers for node in made if not is_number(node) for user in node.users)
    gone: set[fx.Node] = set()
    for node in reversed(made):
        # What writes in place has no users, and stays unless all of the mask goes.
        if (alone or not changes_in_place(node)) and all(user in gone or user in readers for user in node.users):
            gone.add(node)
    return [node for node in made if node in gone]


def _heads_first(graph: fx.Graph, heads: Heads, env: dict[fx.Node, fx.Node]) -> fx.Node:
    node = env[heads.node]
    return graph.call_method("transpose", (node, 1, 2)) if heads.swapped else node


def _call(traced: Traced, node: fx.Node, index: int) -> SdpaCall:
    given: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    query, key, value, mask = (given.get(name) for name in _PARAMETERS[:4])
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    shapes = [dims(n) for n in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise _refused(node, index, "queries, keys and values must have four dimensions, [batch, heads, n, head_dim]")
    if given.get("dropout_p", 0.0) != 0.0:
        raise _refused(node, index, f"it drops out {given['dropout_p']} of its weights: call model.eval() first")
    batch, heads, tokens, width = shapes[0]
    keys = {shapes[1][2], shapes[2][2]}
    if keys != {tokens} or (batch, tokens) != (traced.batch, traced.tokens):
        asked = ", ".join(str(size).replace(str(traced.tokens), "n") for size in (tokens, *keys))
        raise _refused(node, index, f"its numbers of queries and keys are {asked} for a forward of n tokens: only "
                                    "self-attention over all tokens of the call can be replaced, without a cache of "
                                    "the model's own")  # fmt: skip
    if shapes[1][3] != width or shapes[2][3] != width:
        raise _refused(node, index, "queries, keys and values must have the same number of channels")
    _check_mask(traced, node, index, mask, bool(given.get("is_causal", False)))
    scale = given.get("scale")
    if scale is None:
        scale = int(width) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise _refused(node, index, "its scale is computed in the forward: only a constant is supported")
    dtype = str(query.meta["example_value"].dtype).removeprefix("torch.")
    others = {str(n.meta["example_value"].dtype).removeprefix("torch.") for n in (key, value)}
    if others != {dtype}:
        theirs = " and ".join(sorted(others))
        raise _refused(node, index, f"its queries are {dtype}, its keys and values {theirs}: all must have one dtype, "
                                    "which under autocast they have not")  # fmt: skip
    if dtype not in DTYPES:
        raise _refused(node, index, f"keys and values in {dtype} are not supported: use {' or '.join(DTYPES)}")
    own = _heads(key, value)
    if int(heads) % own[0].number:
        raise _refused(node, index, f"{heads} query heads cannot share {own[0].number} KV heads evenly")
    return SdpaCall(node, query, *own, mask if isinstance(mask, fx.Node) else None, float(scale), dtype)


def _check_mask(traced: Traced, node: fx.Node, index: int, mask: Any, causal: bool) -> None:
    if isinstance(mask, fx.Node):
        reason = refusal(traced, mask)
        if reason is not None:
            raise _refused(node, index, f"its mask {reason}: only a mask that is the causal one at every length can be "
                                        "replaced; use is_causal=True")  # fmt: skip
    elif not causal and traced.tokens != 1:  # a single token reads itself, whatever the flag says
        raise _refused(node, index, "it is not causal (is_causal=False and no mask): a policy keeps what later tokens "
                                    "may read, so encoders have nothing to keep")  # fmt: skip


def _refused(node: fx.Node, index: int, why: str) -> KvCompileError:
    return KvCompileError(f"attention {index} ({where(node)}): {why}")


def _refuse_nested(module: fx.GraphModule) -> None:
    for name, part in module.named_modules():
        if name and isinstance(part, fx.GraphModule) and any(called(n) == SDPA for n in part.graph.nodes):
            raise KvCompileError(
                f"{SDPA} is called inside a part of the graph with a scope of its own ({name}: checkpointing, "
                "control flow or autocast), where it cannot be replaced: call it in the forward itself"
            )


def _heads(key: fx.Node, value: fx.Node) -> tuple[Heads, Heads]:
    """Keys and values before their heads are repeated, both or neither."""
    found = _unrepeated(key), _unrepeated(value)
    if found[0].number == found[1].number:
        return found
    return Heads(key, False), Heads(value, False)


def _unrepeated(node: fx.Node) -> Heads:
    """What `node` repeats so that neighbouring heads are equal; the node itself where it repeats nothing.

    Known forms: repeat_interleave, expand with a dimension of its own after the heads and then reshape, expand of
    one head; before or after tokens and heads change places.
    """
    at, swapped = node, False
    while True:
        if called(at) == "contiguous":
            at = _source(at)
        elif _swaps(at):
            at, swapped = _source(at), not swapped
        else:
            break
    dim = 2 if swapped else 1
    for form in (_repeat_interleave, _expanded_apart, _expanded_one):
        source = form(at, dim)
        if source is not None:
            return Heads(source, swapped)
    return Heads(node, False)


def _source(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _swaps(node: fx.Node) -> bool:
    given = [a % 4 for a in _ints(node.args[1:])] if len(dims(node)) == 4 else []
    return (called(node) == "transpose" and sorted(given) == [1, 2]) or (
        called(node) == "permute" and given == [0, 2, 1, 3]
    )


def _ints(args: Any) -> list[int]:
    flat = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return [a for a in flat if isinstance(a, int)]


def _repeat_interleave(node: fx.Node, dim: int) -> fx.Node | None:
    if called(node) != "repeat_interleave":
        return None
    given: dict[str, Any] = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
    along, times = given.get("dim"), given.get("repeats")
    if not isinstance(along, int) or along % 4 != dim or not isinstance(times, int):
        return None
    return given["input"] if isinstance(given["input"], fx.Node) else None


def _expanded_apart(node: fx.Node, dim: int) -> fx.Node | None:
    """[.., H, ..] to [.., H, 1, ..] to [.., H, r, ..] to [.., H * r, ..]."""
    if called(node) not in ("reshape", "view", "flatten"):
        return None
    wide = _source(node)
    if called(wide) == "contiguous":
        wide = _source(wide)
    if called(wide) != "expand":
        return None
    thin = _source(wide)
    if called(thin) not in ("unsqueeze", "getitem", "view", "reshape"):
        return None
    source = _source(thin)
    before, apart, spread, after = (dims(n) for n in (source, thin, wide, node))
    if len(before) != 4 or len(apart) != 5 or len(spread) != 5 or len(after) != 4:
        return None
    times = spread[dim + 1]
    whole = called(thin) != "getitem" or _takes_all(thin.args[1])
    right = (
        apart == (*before[: dim + 1], 1, *before[dim + 1 :])
        and spread == (*before[: dim + 1], times, *before[dim + 1 :])
        and after == (*before[:dim], before[dim] * times, *before[dim + 1 :])
    )
    return source if whole and right else None


def _expanded_one(node: fx.Node, dim: int) -> fx.Node | None:
    """One head for all queries."""
    if called(node) != "expand":
        return None
    source = _source(node)
    before, after = dims(source), dims(node)
    one = len(before) == 4 and before[dim] == 1 and before[:dim] + before[dim + 1 :] == after[:dim] + after[dim + 1 :]
    return source if one else None


def _takes_all(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)
