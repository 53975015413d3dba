"""Bind: which class every KV head of every layer belongs to, and which files a policy stands on.

Takes `kv.class` and `kv.heads` facts, the model's shape, tables and probes; adds one `kv.site` per layer and the
weights of shares by table. Guarantees: every head has exactly one class; classes without heads are gone, with their
sets; a layer that the model lacks, heads claimed twice and files that do not fit are refused at the policy's place.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from xdsl.dialects.builtin import ModuleOp
from xdsl.transforms.dead_code_elimination import region_dce

from kvcompile.dsl.diagnostics import did_you_mean, fail, outside
from kvcompile.dsl.dialect import rational
from kvcompile.dsl.dialect_policy import ClassOp, HeadsOp, PolicyOp, SiteOp
from kvcompile.dsl.dialect_sets import KeepOp, PickOp, TopOp
from kvcompile.dsl.lower_heads import decides_for_all
from kvcompile.dsl.module import policy_of
from kvcompile.passes.carried import terms_of
from kvcompile.passes.context import Context
from kvcompile.passes.files import bind_files, check_given, located
from kvcompile.passes.links import check_links
from kvcompile.passes.tables import best, heads_of_file, probe_key, probe_table

Heads = frozenset[tuple[int, int]]  # (layer, KV head)


@dataclass(frozen=True, slots=True)
class Bind:
    """Adds `kv.site` operations; no options."""

    name: str = "bind"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        policy = policy_of(module)
        ops = list(policy.body.block.ops)
        check_given(policy, context)
        named = _head_classes([op for op in ops if isinstance(op, HeadsOp)], context)
        classes = [op for op in ops if isinstance(op, ClassOp)]
        taken = _rows(classes, named, context)
        facts = context.facts
        for layer in range(facts.layers):
            owners = [taken[layer, head].sym_name.data for head in range(facts.kv_heads)]
            site = SiteOp(layer, owners)
            site.location = policy.location
            policy.body.block.add_op(site)
        check_links(policy, taken, context)
        _erase_unused(policy, {op.sym_name.data for op in taken.values()} | {*(context.learning or ())})
        _check_whole_layers(policy, taken, context)
        bind_files(policy, context)


def _everything(context: Context) -> Heads:
    facts = context.facts
    return frozenset((layer, head) for layer in range(facts.layers) for head in range(facts.kv_heads))


# ---------------------------------------------------------------- head classes


def _head_classes(ops: list[HeadsOp], context: Context) -> dict[str, Heads]:
    """The heads of every declared class; `rest` is what the other declared classes leave."""
    declared: dict[str, list[HeadsOp]] = {}
    for op in ops:
        declared.setdefault(op.label.data, []).append(op)
    if context.learning is not None:
        return {name: _everything(context) if name == context.learning[0] else frozenset() for name in declared}
    tables: dict[str, Heads] = {}
    for name, sources in declared.items():
        parts = [_table_heads(op, context) for op in sources if op.kind.data == "table"]
        parts += [_probe_heads(op, context) for op in sources if op.kind.data == "probe"]
        tables[name] = frozenset().union(*parts)

    found = dict(tables)
    for name in _in_order(declared, context):
        for op in declared[name]:
            if op.kind.data == "rest":
                others = [part for other, part in tables.items() if other != name]
                found[name] |= _everything(context).difference(*others)
            elif op.kind.data == "same":
                found[name] |= found.get(op.source.data, frozenset())
    return found


def _in_order(declared: dict[str, list[HeadsOp]], context: Context) -> list[str]:
    """Head classes so that each comes after those it is made of; classes made of each other are refused."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(declared)
    for name, sources in declared.items():
        graph.add_edges_from((op.source.data, name) for op in sources if op.kind.data == "same")
    try:
        return [name for name in nx.lexicographical_topological_sort(graph) if name in declared]
    except nx.NetworkXUnfeasible:
        cycle = [source for source, _ in nx.find_cycle(graph)]
        raise fail(
            "K108",
            f"head classes are made of each other: {' <- '.join([*cycle, cycle[0]])}",
            context.places.span(declared[cycle[0]][0]),
            "let one of them stand on a table",
        ) from None


def _table_heads(op: HeadsOp, context: Context) -> Heads:
    span = context.places.span(op)
    path = located(op.label.data, op.source.data, span, context)
    heads, warnings = heads_of_file(path, context.facts, rational(op.top) if op.top is not None else None, span)
    context.findings.extend(warnings)
    return heads


def _probe_heads(op: HeadsOp, context: Context) -> Heads:
    assert op.top is not None
    key = probe_key(op.source.data, op.tokens.value.data if op.tokens is not None else None)
    table, warnings = probe_table(context.probes.get(key), context.facts, key, context.places.span(op))
    context.findings.extend(warnings)
    return best(table, rational(op.top))


# ---------------------------------------------------------------- classes of rows


def _rows(classes: list[ClassOp], named: dict[str, Heads], context: Context) -> dict[tuple[int, int], ClassOp]:
    """The class of every head: the one with both layers and heads first, then either, then the one without prefix."""
    claims = {op: _claim(op, named, classes, context) for op in classes}
    taken: dict[tuple[int, int], ClassOp] = {}
    for op in sorted(classes, key=lambda op: -_detail(op)):
        claim = claims[op]
        if op.heads is not None and op.heads.data == "rest" and "rest" not in named:
            others = [o for o in classes if o is not op and (o.heads is not None or _detail(o) >= _detail(op))]
            claim = claim.difference(*(claims[other] for other in others))
        for row in sorted(claim):
            owner = taken.setdefault(row, op)
            if owner is not op and _detail(owner) == _detail(op):
                both = f"`{owner.sym_name.data}` and `{op.sym_name.data}`"
                raise fail("K602", f"{both} both name layer {row[0]}, KV head {row[1]}", context.places.span(op),
                           "nest one prefix in the other")  # fmt: skip
    for row in sorted(_everything(context) - taken.keys()):
        message = f"no clause covers layer {row[0]}, KV head {row[1]}"
        raise fail("K702", message, outside("<policy>"), "add a `rest:` clause")
    return taken


def _detail(op: ClassOp) -> int:
    return (op.heads is not None) + (op.layers is not None)


def _claim(op: ClassOp, named: dict[str, Heads], classes: list[ClassOp], context: Context) -> Heads:
    claim = _everything(context)
    ranges = op.ranges()
    if ranges is not None:
        wanted = _layers(op, ranges, context)
        if not ranges:
            others = [_layers(other, other.ranges() or (), context) for other in classes if other.ranges()]
            wanted = frozenset(range(context.facts.layers)).difference(*others)
        claim = frozenset(row for row in claim if row[0] in wanted)
    if op.heads is not None and (op.heads.data != "rest" or "rest" in named):
        if op.heads.data not in named:
            raise fail("K601", f"head class `{op.heads.data}` is not declared", context.places.span(op),
                       did_you_mean(op.heads.data, named, "declared"))  # fmt: skip
        claim &= named[op.heads.data]
    return claim


def _layers(op: ClassOp, ranges: tuple[tuple[int, int], ...], context: Context) -> frozenset[int]:
    count = context.facts.layers
    found: set[int] = set()
    for first, last in ranges:
        ends = [end if end >= 0 else count + end for end in (first, last)]
        for end in ends:
            if not 0 <= end < count:
                raise fail("K701", f"the model has no layer {end}", context.places.span(op),
                           f"its layers are 0 to {count - 1}")  # fmt: skip
        if ends[0] > ends[1]:
            raise fail("K701", f"layers {ends[0]}..{ends[1]} of this model are none", context.places.span(op),
                       "the first layer comes first")  # fmt: skip
        found.update(range(ends[0], ends[1] + 1))
    return frozenset(found)


def _check_whole_layers(policy: PolicyOp, taken: dict[tuple[int, int], ClassOp], context: Context) -> None:
    """`[h]` and `shared heads` are about all heads of a layer: a class that has only some of them cannot ask."""
    ops = list(policy.body.block.ops)
    for decision in ops:
        if not isinstance(decision, KeepOp | PickOp):
            continue
        name = decision.of.root_reference.data
        owned = [layer for (layer, _), op in sorted(taken.items()) if op.sym_name.data == name]
        partial = next((layer for layer in owned if owned.count(layer) < context.facts.kv_heads), None)
        for top in terms_of(decision):
            if partial is None or not isinstance(top, TopOp) or not decides_for_all(top, ops):
                continue
            code, what = ("K904", "`shared heads`") if top.scope.data == "shared" else ("K905", "`[h]`")
            message = (
                f"{what} is about all {context.facts.kv_heads} KV heads of a layer, "
                f"and `{name}` has {owned.count(partial)} of layer {partial}"
            )
            raise fail(code, message, context.places.span(top), "decide `per head`, or give the class whole layers")


def _erase_unused(policy: PolicyOp, used: set[str]) -> None:
    for op in list(policy.body.block.ops):
        unused_keep = isinstance(op, KeepOp | PickOp) and op.of.root_reference.data not in used
        unused_class = isinstance(op, ClassOp) and op.sym_name.data not in used
        if unused_keep or unused_class:
            policy.body.block.erase_op(op)
    region_dce(policy.body)
