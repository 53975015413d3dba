"""One layer's policy step as plain tensor math: attention over its rows, states, and what is kept, as a mask.

Takes a plan, a layer, a phase and a number of columns; gives a module of fixed shapes that changes nothing in place.
Guarantees: out, states and kept sets are those of `reference`, which tests hold. A winner is an entry that fewer than
n candidates beat, so nothing is sorted. What has no such form raises `NotFunctional` when the module is made or traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from kvcompile.kernels.counts import count_value, scalars_of
from kvcompile.kernels.formulas import sources_of, ties_heads
from kvcompile.kernels.functional import Asking, Columns, NotFunctional, attention, formula
from kvcompile.kernels.ops import fires_in
from kvcompile.kernels.plan import ClassPlan, Expr, PolicyPlan, QuerySource, Region, Selection, formulas_of

PHASES = {"step": "step", "prefill": "prefill.end"}
FORWARD = QuerySource("forward")


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output: its name, shape, torch dtype and what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    says: str


class DecomposedLayer(nn.Module):
    """The policy step of one layer of one sequence; `inputs` and `outputs` say what it takes and gives.

    phase `step`: one token, whose entry is in the rows already; `prefill`: a whole prompt, all of whose tokens are.
    Every class that may decide in that phase does. entries: columns of a row, whether they hold an entry or not.
    aligned: whether heads look at each other, so that a column has to be the same entry in all rows.
    """

    def __init__(self, plan: PolicyPlan, layer: int, phase: str, entries: int, scale: float) -> None:
        super().__init__()
        self.plan, self.phase, self.scale = plan, phase, scale
        self.parts = [(plan.classes[c], list(plan.heads(layer, c))) for c in plan.site_classes(layer)]
        self.deciding = [fires_in(plan, c, PHASES[phase]) for c in plan.site_classes(layer)]
        refuse_attention(plan, layer)
        refuse_states(plan)
        for index, decides in zip(plan.site_classes(layer), self.deciding, strict=True):
            if decides:
                refuse_class(plan, index)
        judged = [part for (part, _), decides in zip(self.parts, self.deciding, strict=True) if decides]
        self.adds = {s.name: s.add for s in plan.states if s.add is not None}
        self.formulas = [e for part in judged for e in formulas_of(part)]
        self.aligned = any(t.scope == "shared" for part in judged for t in part.selections) or any(
            ties_heads(e) for e in [*self.formulas, *self.adds.values()]
        )
        self.sources = {s: self._width(s, entries) for s in sorted(sources_of(self.formulas), key=repr)}
        self.inputs = self._inputs(judged, layer, entries)
        self.outputs = self._outputs(entries)

    # -- what goes in and out ------------------------------------------------------------------------------------

    def _width(self, source: QuerySource, entries: int) -> int:
        """How many of the newest queries a source needs."""
        if source.kind == "peek" and self.phase == "step":
            raise NotFunctional("`q in peek` after a step")
        width = {"last": source.width, "peek": source.width, "previous": 2}.get(source.kind, 1)
        if self.phase == "prefill" and width > entries:
            raise NotFunctional(f"a prompt of {entries} tokens with a score that asks for its last {width} queries")
        return width

    def _inputs(self, judged: list[ClassPlan], layer: int, n: int) -> tuple[Port, ...]:
        facts, i64 = self.plan.facts, torch.int64
        width = n if self.phase == "prefill" else max([1, *self.sources.values()])
        kind, heads = getattr(torch, facts.dtype), facts.kv_heads
        said = "of the prompt's tokens" if self.phase == "prefill" else "the newest, the step's own last"
        ports = [
            Port("q", (facts.q_heads, width, facts.head_dim), kind, f"queries, rotated; {said}"),
            Port("at", (width,), i64, "their positions, -1: absent"),
            Port("k", (heads, n, facts.head_dim), kind, "keys of each row, this forward's tokens among them"),
            Port("v", (heads, n, facts.head_dim), kind, "values"),
            Port("pos", (heads, n), i64, f"original positions, in any order{', the same in all rows' * self.aligned}"),
            Port("resident", (heads, n), torch.bool, "columns that hold an entry"),
        ]
        if self.plan.states:
            names = " ".join(s.name for s in self.plan.states)
            ports.append(Port("states", (len(self.plan.states), heads, n), torch.float32, f"{names}, as before"))
        terms = [term for part in judged for term in part.keep]
        if any(isinstance(t, Region) and t.kind == "frozen" for t in terms):
            ports.append(Port("frozen", (heads, n), torch.bool, "entries that have won before"))
        used = sorted({t.count for t in terms if t.count is not None})
        self.fixed = {i: count_value(self.plan.counts[i], {}) for i in used if _constant(self.plan, i)}
        self.given = [i for i in used if i not in self.fixed]
        if self.given:
            names = " ".join(f"[{place}] {self.plan.counts[i].name}" for place, i in enumerate(self.given))
            ports.append(Port("counts", (len(self.given),), i64, f"layer {layer}'s counts, truncated: {names}"))
        asked = self._scalars_read(terms)
        ports += [Port(name, (), i64, says) for name, says in _SCALARS.items() if name in asked]
        return tuple(ports)

    def _scalars_read(self, terms: list[Region | Selection]) -> set[str]:
        """The run-time numbers that follow neither from shapes nor from positions."""
        nodes = [n for e in [*self.formulas, *self.adds.values()] for n in e.walk()]
        asked = {str(n.value) for n in nodes if n.op == "scalar"}
        if any(isinstance(t, Region) and t.kind in ("prompt", "generated") for t in terms):
            asked.add("prompt")
        return asked & set(_SCALARS) if self.phase == "step" else set()

    def _outputs(self, n: int) -> tuple[Port, ...]:
        facts = self.plan.facts
        m = n if self.phase == "prefill" else 1
        dtype = getattr(torch, facts.dtype)
        ports = [Port("out", (m, facts.q_heads, facts.head_dim), dtype, "what attention gives; 0 for absent queries")]
        ports.append(Port("keep", (facts.kv_heads, n), torch.bool, "entries that stay"))
        for name, says in (("states", "as after this forward"), ("frozen", "and those that won now")):
            ports += [replace(port, says=says) for port in self.inputs if port.name == name]
        return tuple(ports)

    # -- the step ------------------------------------------------------------------------------------------------

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {port.name: tensor for port, tensor in zip(self.inputs, tensors, strict=True)}
        facts = self.plan.facts
        q, at = given["q"].unflatten(0, (facts.kv_heads, facts.group)), given["at"]
        now = at.amax()
        ends = self.phase == "prefill"
        scalars = {"now": now, "chunk": (at >= 0).sum() if ends else torch.ones_like(now)}
        scalars |= {"prompt": now + 1, "step": torch.zeros_like(now)} if ends else {}
        scalars |= {name: given[name] for name in _SCALARS if name in given}
        reading = Asking(q, at) if ends else Asking(q[:, :, -1:], at[-1:])
        rows = (given["k"], given["v"], given["pos"], given["resident"])
        columns = Columns(*rows, self.scale, facts.softcap, scalars=scalars)
        out = torch.einsum("hgqn,hnd->qhgd", attention(columns, reading), columns.v.float()).flatten(1, 2)
        if self.plan.states:
            columns = replace(columns, state=self._grown(columns, reading, given["states"]))
        asking = {s: _asked(s, width, q, at, reading) for s, width in self.sources.items()}
        keep, won = self._decide(replace(columns, asking=asking), given, ends)
        results = [out.to(given["q"].dtype), keep]
        if self.plan.states:
            results.append(torch.stack([columns.state[s.name] for s in self.plan.states]))
        return (*results, given["frozen"] | (won & keep)) if "frozen" in given else tuple(results)

    def _grown(self, columns: Columns, reading: Asking, states: Tensor) -> dict[str, Tensor]:
        """States after the read: new entries start, then every entry's sum grows."""
        first = torch.where(reading.at >= 0, reading.at, columns.pos.amax()).amin()
        new = columns.there & (columns.pos >= first)
        found: dict[str, Tensor] = {}
        for i, state in enumerate(self.plan.states):
            init = _first(state.init, columns.pos)
            found[state.name] = torch.where(new, init, torch.where(columns.there, states[i], 0.0))
        for name, add in self.adds.items():
            asking = {s: _sampled(s, reading) for s in sources_of([add])} or {FORWARD: reading}
            part = replace(columns, asking=asking, state=found)
            found[name] = found[name] + formula(add, part, columns.there, causal=True)
        return found

    def _decide(self, columns: Columns, given: dict[str, Tensor], ends: bool) -> tuple[Tensor, Tensor]:
        """(keep, won) bool [kv_heads, n], class by class, put together in the order of heads."""
        keeps, wons, order = [], [], []
        for (part, heads), decides in zip(self.parts, self.deciding, strict=True):
            there = _rows(columns.there, heads)
            keep, won = there, torch.zeros_like(there)
            if decides:
                frozen = _rows(given["frozen"], heads) if "frozen" in given else None
                keep, won = self._kept(part, _of_heads(columns, heads), frozen, given.get("counts"), ends)
            keeps.append(keep)
            wons.append(won)
            order += heads
        back = [order.index(head) for head in range(len(order))]
        return _rows(torch.cat(keeps), back), _rows(torch.cat(wons), back)

    def _kept(
        self, part: ClassPlan, columns: Columns, frozen: Tensor | None, counts: Tensor | None, ends: bool
    ) -> tuple[Tensor, Tensor]:
        taken = torch.zeros_like(columns.there)
        for term in part.keep:
            if isinstance(term, Region):
                taken = taken | (self._region(term, columns, frozen, counts) & columns.there)
        won = torch.zeros_like(taken)
        for term in part.keep:
            if isinstance(term, Selection):
                chosen = self._chosen(term, columns, columns.there & ~taken, counts, ends)
                taken, won = taken | chosen, won | chosen
        return taken, won

    def _number(self, index: int | None, counts: Tensor | None) -> Tensor:
        if index is None:
            return torch.zeros((), dtype=torch.int64)
        if index in self.fixed:
            return torch.full((), self.fixed[index], dtype=torch.int64)
        assert counts is not None
        return counts[self.given.index(index)]

    def _region(self, region: Region, columns: Columns, frozen: Tensor | None, counts: Tensor | None) -> Tensor:
        pos, now = columns.pos, columns.scalars["now"]
        count = self._number(region.count, counts)
        match region.kind:
            case "all":
                return torch.ones_like(columns.there)
            case "sink":
                return pos < count
            case "recent":
                return pos > now - count
            case "stride":
                return (count > 0) & (pos % count.clamp(min=1) == 0)
            case "prompt":
                return pos < columns.scalars["prompt"]
            case "generated":
                return pos >= columns.scalars["prompt"]
            case "frozen":
                assert frozen is not None
                return frozen
            case other:
                raise NotFunctional(f"the region `{other}`")

    def _chosen(
        self, term: Selection, columns: Columns, candidates: Tensor, counts: Tensor | None, ends: bool
    ) -> Tensor:
        """The winners of one selection, the watched newest among them: bool [heads, n]."""
        watched = torch.zeros_like(candidates)
        if term.observed and ends:
            watched = candidates & (columns.pos > columns.scalars["now"] - term.observed)
        total = self._number(term.count, counts).expand(len(candidates))
        if term.fraction is not None:
            total = candidates.sum(1)
        if term.scope == "shared":
            total = total[:1]
        elif term.scope == "across":
            total = total.sum()[None]
        if term.fraction is not None:
            total = _part(total, term.fraction)
        if term.observed:
            used = watched.sum(1)
            used = {"shared": used[:1], "across": used.sum()[None]}.get(term.scope, used)
            total = (total - used).clamp(min=0)
        candidates = candidates & ~watched
        values = formula(term.score, columns, candidates, groups=term.scope == "query_head")
        return watched | _winners(term, values, columns.pos, candidates, total)


# -- who wins ----------------------------------------------------------------------------------------------------------


def _winners(term: Selection, values: Tensor, pos: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """bool [heads, n]; values [heads, n] or [heads, g, n]; n int64 of each line: [heads], [1] where heads are one."""
    if term.rank == "where":
        return candidates & (values != 0) & ~values.isnan()
    values = -values if term.rank == "bottom" else values
    if term.scope == "query_head":
        group = values.shape[1]
        pos, candidates, n = (x.repeat_interleave(group, 0) for x in (pos, candidates, n))
        return _line(term, values.flatten(0, 1), pos, candidates, n).unflatten(0, (-1, group)).any(1)
    if term.scope == "shared":
        one = _line(term, values.mean(0, keepdim=True), pos[:1], candidates[:1], n)
        return one.expand_as(candidates)
    if term.scope == "head":
        return _line(term, values, pos, candidates, n)
    heads, width = candidates.shape
    safe = torch.zeros_like(candidates)
    if term.rank != "cover":
        # The floor is of the equal share, truncated once.
        share = n * term.floor.numerator // (term.floor.denominator * heads)
        safe = _line(term, values, pos, candidates, share.expand(heads))
    # One line of all heads' entries: ties to the older, then to the lower head.
    age = pos * heads + torch.arange(heads)[:, None]
    values, age, open_ = (x.reshape(1, heads * width) for x in (values, age, candidates & ~safe))
    return safe | _line(term, values, age, open_, (n - safe.sum()).clamp(min=0)).reshape(heads, width)


def _line(term: Selection, values: Tensor, age: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """Each line's winners, all bool [lines, n]; higher is better, ties to the smaller age, NaN last."""
    if term.rank == "cover":
        assert term.fraction is not None
        mass = torch.where(candidates & (values > 0), values, 0.0).double()
        before = torch.where(_beats(mass, age, candidates), mass[:, None, :], 0.0).sum(2)
        return candidates & (before < float(term.fraction) * mass.sum(1, keepdim=True))
    return candidates & (_beats(values, age, candidates).sum(2) < n[:, None])


def _beats(values: Tensor, age: Tensor, candidates: Tensor) -> Tensor:
    """Whether candidate j comes before entry i: bool [lines, i, j]."""
    broken = values.isnan()
    value = torch.where(broken, 0.0, values)
    mine, theirs = value[:, :, None], value[:, None, :]
    higher = (theirs > mine) | ((theirs == mine) & (age[:, None, :] < age[:, :, None]))
    same = broken[:, :, None] == broken[:, None, :]
    return candidates[:, None, :] & torch.where(same, higher, broken[:, :, None])


def _part(total: Tensor, fraction: Fraction) -> Tensor:
    return total * fraction.numerator // fraction.denominator


# -- small things ------------------------------------------------------------------------------------------------------

_SCALARS = {"prompt": "tokens of the prompt", "step": "number of the step"}


def _constant(plan: PolicyPlan, index: int) -> bool:
    return all(node.op not in ("scalar", "share") for node in plan.counts[index].expr.walk())


def _of_heads(columns: Columns, heads: list[int]) -> Columns:
    """The same for some KV heads."""
    asking = {s: Asking(_rows(x.q, heads), x.at) for s, x in columns.asking.items()}
    state = {name: _rows(s, heads) for name, s in columns.state.items()}
    k, v, pos, there = (_rows(t, heads) for t in (columns.k, columns.v, columns.pos, columns.there))
    return replace(columns, k=k, v=v, pos=pos, there=there, asking=asking, state=state)


def _rows(x: Tensor, heads: list[int]) -> Tensor:
    """x[heads], by slices: an index would be a table in the exported text."""
    if heads == list(range(len(x))):
        return x
    return torch.cat([x[head : head + 1] for head in heads])


def _asked(source: QuerySource, width: int, q: Tensor, at: Tensor, reading: Asking) -> Asking:
    if source.kind in ("forward", "sample"):
        return _sampled(source, reading)
    newest = Asking(q[:, :, -width:], at[-width:])
    return Asking(newest.q[:, :, :1], newest.at[:1]) if source.kind == "previous" else newest


def _sampled(source: QuerySource, reading: Asking) -> Asking:
    """This forward's queries as a source has them: those that are not in the sample are absent."""
    if source.kind != "sample":
        return reading
    at, part = reading.at, source.part
    due = at * part.numerator // part.denominator > (at - 1) * part.numerator // part.denominator
    return Asking(reading.q, torch.where(due, at, -1))


def _first(init: Expr, pos: Tensor) -> Tensor:
    """What a new entry's state starts with, float32 [heads, n]."""
    if isinstance(init.value, (Fraction, int, float)) and init.op == "const":
        return torch.full(pos.shape, float(init.value))
    return pos.float()


def refuse_attention(plan: PolicyPlan, layer: int) -> None:
    """NotFunctional for a model whose attention is more than a softmax over all that came before, capped or not."""
    facts = plan.facts
    if facts.sinks:
        raise NotFunctional("attention sinks with learned logits")
    if facts.reach(layer):
        raise NotFunctional(f"a sliding window of {facts.reach(layer)} tokens, which layer {layer} has")


def refuse_states(plan: PolicyPlan) -> None:
    """NotFunctional for reads that are more than attention, and for states that are more than sums over queries."""
    if plan.compact:
        raise NotFunctional("positions compact, where keys are rotated anew at each read")
    if plan.folds:
        raise NotFunctional("an entry whose count weighs in the softmax")
    for update in plan.updates:
        raise NotFunctional(
            f"`on {update.event}`" + (" beyond one sum over queries" if update.event == "attend" else "")
        )
    for state in plan.states:
        plain = state.init.op == "const" or (state.init.op, state.init.value) in (("scalar", "now"), ("field", "pos"))
        if not plain:
            raise NotFunctional(f"the state {state.name}, which starts with a formula")


def refuse_class(plan: PolicyPlan, index: int) -> None:
    """NotFunctional for what a class of one layer, taken alone and at fixed shapes, cannot say."""
    part = plan.classes[index]
    named = f"class {part.name}: " if len(plan.classes) > 1 else ""
    reasons = {
        "several rules for the same rows": part.rows_of is not None,
        "choices that later layers take over": part.only_picks or any(t.pick is not None for t in part.keep),
        "losers that leave something behind": part.moves,
        "a decision that waits for all layers": plan.spans(index),
        "a trigger with a condition": any(t.cond is not None for t in part.triggers),
        "a selection within or of units": any(t.unit or t.whole for t in part.selections),
        "a choice that layers share": any(t.layers != "each" for t in part.selections),
        "a count that reads len": any(
            "len" in scalars_of(plan.counts[t.count]) for t in part.keep if t.count is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotFunctional(named + reason)
