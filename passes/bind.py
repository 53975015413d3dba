"""Bind: which class every KV head of every layer belongs to, what it reads, and which files a policy stands on.

Takes `kv.class`, `kv.readers`, `kv.off` and `kv.heads` facts, the model's shape, tables and probes; adds one `kv.site`
per layer and the weights of shares by table. Guarantees: every head of a layer that runs has exactly one class; classes
and readers without heads are gone, with their sets; a layer that the model lacks, heads claimed twice and files that do
not fit are refused at the policy's place.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.transforms.dead_code_elimination import region_dce

from kvcompile.dsl.diagnostics import did_you_mean, fail, outside
from kvcompile.dsl.dialect import rational
from kvcompile.dsl.dialect_policy import ClassOp, HeadsOp, PolicyOp, SiteOp
from kvcompile.dsl.dialect_reads import PREFIX, OffOp, Ranges, ReadersOp
from kvcompile.dsl.dialect_sets import AnySet, TopOp
from kvcompile.dsl.lower_heads import decides_for_all
from kvcompile.dsl.module import policy_of
from kvcompile.passes.carried import terms_of
from kvcompile.passes.context import Context
from kvcompile.passes.files import bind_files, check_given, located
from kvcompile.passes.links import Owned, check_links
from kvcompile.passes.tables import best, heads_of_file, probe_key, probe_table

Heads = frozenset[tuple[int, int]]  # (layer, KV head)
Prefix = ClassOp | ReadersOp  # what names rows by layers and heads


@dataclass(frozen=True, slots=True)
class Bind:
    """Adds `kv.site` operations; no options."""

    name: str = "bind"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        policy = policy_of(module)
        ops = list(policy.body.block.ops)
        check_given(policy, context)
        named = _head_classes([op for op in ops if isinstance(op, HeadsOp)], context)
        prefixes = _Prefixes([op for op in ops if isinstance(op, Prefix | OffOp)], named, context)
        taken = prefixes.rows(ClassOp)
        _check_everyone(prefixes.running - taken.keys())
        reading = prefixes.rows(ReadersOp)
        facts = context.facts
        for layer in range(facts.layers):
            heads = [(layer, head) for head in range(facts.kv_heads) if (layer, head) in prefixes.running]
            readers = [reading[row].sym_name.data if row in reading else None for row in heads]
            site = SiteOp(layer, [taken[row].sym_name.data for row in heads], readers)
            site.location = policy.location
            policy.body.block.add_op(site)
        owned = _owned(taken) | _owned(reading)
        check_links(policy, owned, context)
        _erase_unused(policy, owned.keys() | {*(context.learning or ())})
        _check_whole_layers(policy, owned, context)
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


@dataclass(slots=True)
class _Prefixes:
    """All that names rows by layers and heads; `running`: the rows of layers that are not off."""

    ops: list[Prefix | OffOp]
    named: dict[str, Heads]
    context: Context
    running: Heads = frozenset()

    def __post_init__(self) -> None:
        off: frozenset[int] = frozenset()
        for op in self.ops:
            off |= self._layers(op) if isinstance(op, OffOp) else frozenset()
        self.running = frozenset(row for row in _everything(self.context) if row[0] not in off)
        if not self.running:
            last = [op for op in self.ops if isinstance(op, OffOp)][-1]
            raise fail("K705", "every layer of this model is off", self.context.places.span(last),
                       f"it has {self.context.facts.layers}: name fewer")  # fmt: skip

    def rows(self, kind: type[Prefix]) -> dict[tuple[int, int], Prefix]:
        """Who has each row: the one with both layers and heads first, then either, then the one without prefix."""
        mine = [op for op in self.ops if isinstance(op, kind)]
        claims = {op: self._claim(op) for op in mine}
        taken: dict[tuple[int, int], Prefix] = {}
        for op in sorted(mine, key=lambda op: -_detail(op)):
            claim = claims[op]
            if op.heads is not None and op.heads.data == "rest" and "rest" not in self.named:
                claim = claim.difference(*(self._claim(other) for other in self._beside(op)))
            for row in sorted(claim):
                owner = taken.setdefault(row, op)
                if owner is not op and _detail(owner) == _detail(op):
                    both = f"`{shown(owner)}` and `{shown(op)}`"
                    raise fail("K602", f"{both} both name layer {row[0]}, KV head {row[1]}",
                               self.context.places.span(op), "nest one prefix in the other")  # fmt: skip
        return taken

    def _beside(self, op: Prefix) -> list[Prefix]:
        """The prefixes that leave `rest` what it is: all that name heads, and of its own verb those that come first."""
        found: list[Prefix] = []
        for other in self.ops:
            if isinstance(other, OffOp) or shown(other) == shown(op):
                continue
            says = other.heads is not None and other.heads.data != "rest"
            first = _detail(other) - (other.heads is not None and not says) >= _detail(op)
            if says or (first and type(other) is type(op)):
                found.append(other)
        return found

    def _claim(self, op: Prefix) -> Heads:
        claim = self.running
        if op.ranges() is not None:
            wanted = self._layers(op)
            claim = frozenset(row for row in claim if row[0] in wanted)
            if wanted and not claim:
                raise fail("K705", f"all of the {len(wanted)} layers that are named here are off",
                           self.context.places.span(op), "leave out one of the two")  # fmt: skip
        if op.heads is not None and (op.heads.data != "rest" or "rest" in self.named):
            if op.heads.data not in self.named:
                raise fail("K601", f"head class `{op.heads.data}` is not declared", self.context.places.span(op),
                           did_you_mean(op.heads.data, self.named, "declared"))  # fmt: skip
            claim &= self.named[op.heads.data]
        return claim

    def _layers(self, op: Prefix | OffOp) -> frozenset[int]:
        ranges = op.ranges() or ()
        if ranges:
            return _layers(op, ranges, self.context)
        others = [_layers(other, found, self.context) for other in self.ops if (found := other.ranges())]
        return frozenset(range(self.context.facts.layers)).difference(*others)


def _check_everyone(left: Heads) -> None:
    for layer, head in sorted(left):
        message = f"no clause covers layer {layer}, KV head {head}"
        raise fail("K702", message, outside("<policy>"), "add a `rest:` clause")


def _detail(op: Prefix) -> int:
    return (op.heads is not None) + (op.layers is not None)


def shown(op: Prefix) -> str:
    """The prefix as the policy has it."""
    return op.sym_name.data.removeprefix(PREFIX)


def _owned(taken: dict[tuple[int, int], Prefix]) -> Owned:
    found: Owned = {}
    for row, op in sorted(taken.items()):
        found.setdefault(op.sym_name.data, []).append(row)
    return found


def _layers(op: Operation, ranges: Ranges, context: Context) -> frozenset[int]:
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


def _check_whole_layers(policy: PolicyOp, owned: Owned, context: Context) -> None:
    """`[h]` and `shared heads` are about all heads of a layer: a class that has only some of them cannot ask."""
    ops = list(policy.body.block.ops)
    for decision in ops:
        if not isinstance(decision, AnySet):
            continue
        name = decision.of.root_reference.data
        layers = [layer for layer, _ in owned.get(name, ())]
        partial = next((layer for layer in layers if layers.count(layer) < context.facts.kv_heads), None)
        for top in terms_of(decision):
            if partial is None or not isinstance(top, TopOp) or not decides_for_all(top, ops):
                continue
            code, what = ("K904", "`shared heads`") if top.scope.data == "shared" else ("K905", "`[h]`")
            message = (
                f"{what} is about all {context.facts.kv_heads} KV heads of a layer, "
                f"and `{name.removeprefix(PREFIX)}` has {layers.count(partial)} of layer {partial}"
            )
            raise fail(code, message, context.places.span(top), "decide `per head`, or give the class whole layers")


def _erase_unused(policy: PolicyOp, used: set[str]) -> None:
    for op in list(policy.body.block.ops):
        unused_keep = isinstance(op, AnySet) and op.of.root_reference.data not in used
        unused_class = isinstance(op, Prefix) and op.sym_name.data not in used
        if unused_keep or unused_class:
            policy.body.block.erase_op(op)
    region_dce(policy.body)
