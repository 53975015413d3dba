"""What the docstring of each generated kernel says: sites, shapes, bytes of a launch, predicted time.

Takes a plan, a spec and the sizes to predict for, gives a `render.Header`. Bytes are counted by hand from
the shapes: what must cross the memory bus once, not what a cache may save or waste.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcompile.kernels.gpus import GPUS, Gpu
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.render import Header, Target
from kvcompile.kernels.roofline import Traffic
from kvcompile.kernels.spec import KernelSpec

Shapes = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to predict and time: sequences, entries of a row (decode), tokens of the prompt (prefill)."""

    batch: int = 1
    tokens: int = 4096
    gpu: Gpu = GPUS["H200"]


def header_for(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes = Sizes(), target: Target = "triton") -> Header:
    """The header of one kernel of a plan."""
    facts = plan.facts
    shapes, traffic = _ABOUT[spec.template](plan, spec, sizes)
    if spec.template in _POOLED:
        shapes += _extents(plan) if target == "cpp" else _pools(plan)
    given = ", ".join(f"{name}={value}" for name, value in plan.params)
    often = "two launches" if target == "triton" and traffic.launches == 2 else "one launch"
    return Header(
        policy=f"{plan.name}({given})" if given else plan.name,
        sites=f"{facts.layers} layers of {facts.kv_heads} KV heads ({facts.family or 'any'} model), {often} "
        + _LAUNCHES.get(spec.template, "a layer"),
        shapes=shapes,
        traffic=traffic,
        bench=(
            ("batch", sizes.batch),
            ("kv_heads", facts.kv_heads),
            ("layers", facts.layers),
            ("tokens", sizes.tokens),
        ),
        gpu=sizes.gpu,
    )


def _entries(plan: PolicyPlan, sizes: Sizes) -> int:
    return sizes.batch * plan.facts.kv_heads * sizes.tokens


def _pools(plan: PolicyPlan) -> Shapes:
    facts = plan.facts
    return (
        (
            "k, v",
            f"[slots, {facts.head_dim}] {facts.dtype}, slot = page * {plan.page} + place, one pool for all layers",
        ),
        ("table", "[rows, pages] int32, row = (layer * B + sequence) * Hkv + head"),
    )


def _extents(plan: PolicyPlan) -> Shapes:
    facts = plan.facts
    return (
        ("k, v", f"[slots, {facts.head_dim}] {facts.dtype}, a pool for each layer"),
        ("table", "[rows, 2] int64, first slot and room of row = sequence * Hkv + head; its entries lie side by side"),
    )


def _decode(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    facts, entries = plan.facts, _entries(plan, sizes)
    parts = [("keys and values", entries * facts.entry_bytes)]
    if spec.fact("logits") != "none":
        parts.append(("logits out and in", 2 * entries * facts.group * (2 if spec.fact("logits") == "fp16" else 4)))
    grown = sum(1 for name, _ in spec.holes if name.startswith("add "))
    if grown:
        parts.append(("states in and out", 8 * grown * entries))
    query = ("q, out", f"[B, {facts.q_heads}, {facts.head_dim}]")
    return (query,), Traffic(tuple(parts), 2, operations=4 * entries * facts.group * facts.head_dim)


def _prefill(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of a prompt read as one piece by dense heads; a past or local heads add or take their share of both."""
    facts, tokens = plan.facts, sizes.batch * sizes.tokens
    lines = 2 * tokens * facts.q_heads * facts.head_dim * facts.entry_bytes // (2 * facts.head_dim)
    parts = (("queries and outputs", lines), ("keys and values", _entries(plan, sizes) * facts.entry_bytes))
    pairs = facts.q_heads * tokens * (sizes.tokens + 1) // 2
    shapes = (
        ("q, out", f"[B, {facts.q_heads}, M, {facts.head_dim}], [B, M, {facts.q_heads}, {facts.head_dim}]"),
        ("k_new, v_new", f"[B, {facts.kv_heads}, M, {facts.head_dim}], the piece; M tokens of all sequences, padded"),
        ("first, window", "[B * Hkv] int32, which entries each row's queries read"),
    )
    return shapes, Traffic(parts, operations=4 * pairs * facts.head_dim)


def _evict(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    rows = sizes.batch * sum(len(heads) for heads in plan.class_of)
    judged = ("positions, scores and keys of the judged", rows * sizes.tokens * (4 + 4 + 4 + 4))
    moved = ("one entry moved a row", rows * 2 * plan.facts.entry_bytes)
    return (), Traffic((judged, moved))


def _select(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    shapes = (("scores, candidates, pos, keep", "[B, Hkv, N], float32, uint8, int32, uint8"),)
    return shapes, Traffic((("scores, candidates, positions, answer", _entries(plan, sizes) * (4 + 1 + 4 + 1)),))


def _pack(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    survivors = _entries(plan, sizes) * 2 // 5
    parts = (("two fifths of the entries, in and out", 2 * survivors * plan.facts.entry_bytes),)
    shape = ("k_in, v_in", f"[B, {plan.facts.kv_heads}, N, {plan.facts.head_dim}]")
    return (shape,), Traffic(parts, launches=2)


def _columns(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    facts, entries = plan.facts, _entries(plan, sizes)
    window = spec.number("window")
    asked = window or sizes.tokens
    passes = 2 if window else 1
    pairs = sizes.batch * facts.q_heads * sizes.tokens * asked // (1 if window else 2)
    shapes = (
        ("q", f"[B, {facts.q_heads}, {window or 'N'}, {facts.head_dim}]"),
        ("k", f"[B, {facts.kv_heads}, N, {facts.head_dim}]"),
        ("out", f"[B, {facts.kv_heads}, N] float32"),
    )
    queries = sizes.batch * facts.q_heads * asked * facts.entry_bytes // 2
    parts = (
        ("keys, each pass", passes * entries * facts.entry_bytes // 2),
        ("queries, each pass", passes * queries),
        ("scores", entries * 4),
    )
    return shapes, Traffic(parts, launches=passes, operations=2 * passes * pairs * facts.head_dim)


def _keys(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    entries = _entries(plan, sizes)
    shapes = (("k", f"[B, {plan.facts.kv_heads}, N, {plan.facts.head_dim}]"), ("out", "[B, Hkv, N] float32"))
    return shapes, Traffic((("keys", entries * plan.facts.entry_bytes // 2), ("scores", entries * 4)))


def _pool(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    shapes = (("score, out", "[B * Hkv, N] float32, columns in position order"),)
    return shapes, Traffic((("scores, order, answer", _entries(plan, sizes) * (4 + 4 + 4)),))


def _marks(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of a prompt that came in as one piece; in a step it is a unit at times."""
    layout, facts = layout_of(plan), plan.facts
    rows = sizes.batch * max(sum(reader >= 0 for reader in line) for line in layout.readers)
    out = rows * layout.blocks(sizes.tokens) * layout.width * layout.itemsize
    parts = (("keys and values", rows * sizes.tokens * facts.entry_bytes), ("landmarks", out))
    return (("marks", f"[readers, B, blocks, {layout.width}] {layout.dtype}"),), Traffic(parts)


def _units(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of one query of every row."""
    layout, facts = layout_of(plan), plan.facts
    rows = sizes.batch * facts.kv_heads
    marks = rows * layout.blocks(sizes.tokens) * layout.width * layout.itemsize
    query = ("q", f"[B, {facts.q_heads}, M, {facts.head_dim}]")
    return (query,), Traffic((("landmarks", marks), ("positions", 4 * rows * sizes.tokens)))


def _choice_of_entries(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of one query of every row: all keys."""
    facts = plan.facts
    query = ("q", f"[B, {facts.q_heads}, {facts.head_dim}]")
    return (query,), Traffic((("keys", _entries(plan, sizes) * facts.entry_bytes // 2),))


# Instructions of a lane for each score of a piece's choice, counted in what Triton 3.7.1 makes of it for sm_90 (heads
# of 128, 4 of a KV head, landmarks in float32): landmark to key; a key's load, ends of its line, its bit; a round of
# the search. Rounds: the mean over draws of 16 lines of 512 normal scores of which 51 win, until all lines are done;
# of queries that choose alike it is 1 or 2. Tiles are as wide as a power of two.
TO_KEY, TO_BIT, ROUND, ROUNDS, PADDED = 29, 28, 6, 13, 4 / 3
IN_PARTS = 3  # products that a float32 landmark takes


def _chosen(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of a prompt read as one piece: every query's scores of the units before it, which go to memory and come back."""
    facts, layout, tokens = plan.facts, layout_of(plan), sizes.batch * sizes.tokens
    query = ("q", f"[B, {facts.q_heads}, M, {facts.head_dim}]")
    parts = [("queries", tokens * facts.q_heads * facts.entry_bytes // 2)]
    tile = spec.number("tile")
    parts.append(("lists", facts.kv_heads * tokens * (sizes.tokens // tile) * 4 // 128))
    if dict(spec.holes).get("score") is None:
        return (query,), Traffic(tuple(parts))
    units = -(-sizes.tokens // spec.number("size"))
    marked = units * spec.number("size") // spec.number("inner_stride")
    lines, sets = tokens * facts.q_heads, facts.q_heads if spec.number("sets") > 1 else facts.kv_heads
    marks = sizes.batch * facts.kv_heads * layout.blocks(sizes.tokens) * layout.width * layout.itemsize
    parts += [
        ("landmarks", marks),
        ("scores out and in", 8 * lines * marked // 2),
        ("what is chosen", 4 * tokens * sets * -(-units // 32)),
    ]
    split = not spec.fact("own") and facts.dtype != "float32"
    if split:  # into three parts of half their bytes each, which lie in the cache for tiles of queries
        parts.append(("landmarks in parts, out and in", marks // 2 * IN_PARTS * 2))
    products = IN_PARTS if split else 1
    lanes = lines * marked // 2 * TO_KEY + int(tokens * sets * units // 2 * PADDED * (TO_BIT + ROUNDS * ROUND))
    work = lines * marked * facts.head_dim * products  # half of the pairs, a multiplication and an addition each
    return (query,), Traffic(tuple(parts), 2 + split, operations=work, lanes=lanes)


def _spans(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of rows that are read as a whole; lists read their share of it."""
    facts = plan.facts
    query = ("q, out", f"[B, {facts.q_heads}, {facts.head_dim}]")
    return (query,), Traffic((("keys and values, if all are read", _entries(plan, sizes) * facts.entry_bytes),))


def _project(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes) -> tuple[Shapes, Traffic]:
    """Of all linear layers of a step together."""
    shapes = (("x, w, bias, out", "[rows, columns], [lines, columns], [lines], [rows, lines]"),)
    return shapes, Traffic((("all weights of the model, in as many launches", plan.facts.weight_bytes),))


_LAUNCHES = {"evict": "for all layers", "project": "a linear layer"}
_POOLED = ("decode", "prefill", "evict", "pack", "spans", "blocks")
_ABOUT: dict[str, Callable[[PolicyPlan, KernelSpec, Sizes], tuple[Shapes, Traffic]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "evict": _evict,
    "select": _select,
    "pack": _pack,
    "columns": _columns,
    "keys": _keys,
    "pool": _pool,
    "marks": _marks,
    "units": _units,
    "entries": _choice_of_entries,
    "spans": _spans,
    "blocks": _prefill,
    "chosen": _chosen,
    "project": _project,
}
