"""Updates of states against plain loops: on insert, on attend, on step, for any cut, padding, batch and layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.extents import ExtentStore
from kvcompile.kernels import ops
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan, Expr, ModelFacts, PolicyPlan, QuerySource, Region, StatePlan, Update
from kvcompile.pages import PagedStore
from kvcompile.sequences import Piece, Sequences
from kvcompile.store import Store
from tests.driving import examples
from tests.kernels.test_noise import by_hand
from tests.kernels.triton_interpreted.plans import ACC, attn, binary, const, named, reduce

KV_HEADS, GROUP, WIDTH, LAYER = 2, 2, 8, 1
SCALE = WIDTH**-0.5
FORWARD, NEWEST = QuerySource("forward"), QuerySource("last", 1)
NOW, LEN, STEP, AGE, COUNT = (
    named("scalar", "now"),
    named("scalar", "len"),
    named("scalar", "step"),
    named("field", "age"),
    named("field", "count"),
)
SEEN, GAP, K, V = named("state", "seen"), named("state", "gap"), named("field", "k"), named("field", "v")
MINE = Expr("queries", (), NEWEST)


# -- one sequence and one KV head, entry by entry --------------------------------------------------------------------


@dataclass
class Moment:
    """One token of one KV head: q [group, D] of the query, keys and values of all entries so far, itself included."""

    head: int
    now: int
    step: int
    q: Tensor
    k: Tensor
    v: Tensor
    states: list[dict[str, float]]

    @property
    def logits(self) -> Tensor:
        return self.q @ self.k.T * SCALE

    @property
    def attn(self) -> Tensor:
        return torch.softmax(self.logits, -1)


@dataclass(frozen=True)
class Rule:
    """A policy's states twice: as a plan has them and as loops."""

    states: tuple[StatePlan, ...]
    updates: tuple[Update, ...]
    born: Callable[[Moment], dict[str, float]]
    attend: Callable[[Moment], None] = lambda moment: None
    stepped: Callable[[Moment], None] = lambda moment: None
    weights: tuple[tuple[str, Tensor], ...] = ()


def by_loops(rule: Rule, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> list[list[dict[str, float]]]:
    """[KV head][entry] -> states; q [q_heads, n, D], k, v [KV heads, n, D]; tokens from `prompt` on come one by one."""
    out = []
    for h in range(KV_HEADS):
        states: list[dict[str, float]] = []
        for t in range(k.shape[1]):
            asking = q[h * GROUP : (h + 1) * GROUP, t]
            moment = Moment(h, t, max(0, t - prompt + 1), asking, k[h, : t + 1], v[h, : t + 1], states)
            states.append(rule.born(moment))
            rule.attend(moment)
            if t >= prompt:
                rule.stepped(moment)
        out.append(states)
    return out


# -- the rules -------------------------------------------------------------------------------------------------------


def _keyformer() -> Rule:
    noisy = binary("+", attn(what="logit"), Expr("noise", (), (3, FORWARD)))
    heat = binary("+", const(1), binary("*", const(Fraction(1, 10)), STEP))
    add = reduce("mean", "g", reduce("sum", "q", reduce("softmax", "i", binary("/", noisy, heat))))

    def attend(m: Moment) -> None:
        for g in range(GROUP):
            words = [by_hand(3, LAYER, m.head * GROUP + g, m.now, i) for i in range(m.now + 1)]
            noise = torch.tensor([-math.log(-math.log(((w >> 9) + 0.5) / 2**23)) for w in words])
            mass = torch.softmax((m.logits[g] + noise) / (1 + 0.1 * m.step), -1)
            for i, state in enumerate(m.states):
                state["acc"] += float(mass[i]) / GROUP

    return Rule((StatePlan("acc", const(0), add),), (), lambda m: {"acc": 0.0}, attend)


def _lazy() -> Rule:
    hit = binary(">", reduce("max", "g", attn()), const(Fraction(1, 8)))
    gap = binary("max", GAP, binary("-", NOW, SEEN))
    # attn has a query axis of one query; a mean over it is how a number per entry comes of it
    update = Update("attend", (("gap", gap), ("seen", NOW)), reduce("mean", "q", hit))

    def attend(m: Moment) -> None:
        for i, state in enumerate(m.states):
            if float(m.attn[:, i].max()) > 1 / 8:
                state["gap"] = max(state["gap"], m.now - state["seen"])
                state["seen"] = m.now

    plans = (StatePlan("seen", NOW, None), StatePlan("gap", const(1), None))
    return Rule(plans, (update,), lambda m: {"seen": m.now, "gap": 1.0}, attend)


def _running() -> Rule:
    """A sum that is not 0 for entries to come, and an update that reads it while it runs, and `len`."""
    add = reduce("mean", "g", reduce("sum", "q", binary("-", const(1), attn())))
    peak = binary("max", named("state", "peak"), binary("/", ACC, LEN))
    update = Update("attend", (("peak", peak), ("late", named("state", "peak"))))

    def attend(m: Moment) -> None:
        for i, state in enumerate(m.states):
            state["acc"] += 1 - float(m.attn[:, i].mean())
            state["peak"] = state["late"] = max(state["peak"], state["acc"] / len(m.states))

    names = ("acc", "peak", "late")
    plans = tuple(StatePlan(n, const(0), add if n == "acc" else None) for n in names)
    return Rule(plans, (update,), lambda m: dict.fromkeys(names, 0.0), attend)


def _sums() -> Rule:
    """Sums alone: one with a mean over the entries that a query may read, one over sampled queries."""
    above = binary(">", attn(), reduce("mean", "i", attn()))
    half = QuerySource("sample", 0, Fraction(2, 5))
    sampled = reduce("sum", "q", reduce("max", "g", Expr("evidence", (), ("attn", half))))
    likeness = Expr("pair", (K, reduce("mean", "i", K)), "cos")
    apart = reduce("mean", "g", reduce("sum", "q", binary("*", attn(), likeness)))
    plans = (
        StatePlan("above", const(0), reduce("mean", "g", reduce("sum", "q", above))),
        StatePlan("some", const(2), sampled),
        StatePlan("apart", const(0), apart),
    )

    def attend(m: Moment) -> None:
        centre = m.k.mean(0)
        due = m.now * 2 // 5 > (m.now - 1) * 2 // 5
        for i, state in enumerate(m.states):
            state["above"] += sum(float(m.attn[g, i] > m.attn[g].mean()) for g in range(GROUP)) / GROUP
            state["some"] += due * float(m.attn[:, i].max())
            state["apart"] += float(m.attn[:, i].mean() * torch.cosine_similarity(m.k[i], centre, 0))

    return Rule(plans, (), lambda m: {"above": 0.0, "some": 2.0, "apart": 0.0}, attend)


def _events() -> Rule:
    """On insert, with the own token's query; on step, some entries; count is 1 where nothing is merged."""
    own = reduce("max", "g", Expr("pair", (MINE, K), "dot"))
    insert = Update("insert", (("own", own), ("twice", binary("+", named("state", "own"), LEN))))
    older = binary("and", binary(">", AGE, const(2)), binary("<", STEP, const(4)))
    fade = binary("+", binary("*", named("state", "own"), const(Fraction(1, 2))), COUNT)
    step = Update("step", (("own", fade),), older)

    def born(m: Moment) -> dict[str, float]:
        mine = float((m.q @ m.k[-1]).max())
        return {"own": mine, "twice": mine + m.now + 1, "first": float(m.v[-1].norm())}

    def stepped(m: Moment) -> None:
        for i, state in enumerate(m.states):
            if m.now - i > 2 and m.step < 4:
                state["own"] = state["own"] / 2 + 1

    init = Expr("unary", (V,), "norm")
    plans = (StatePlan("own", const(9), None), StatePlan("twice", const(0), None), StatePlan("first", init, None))
    return Rule(plans, (insert, step), born, stepped=stepped)


def _learned() -> Rule:
    generator = torch.Generator().manual_seed(5)
    shapes = {"w1": (5, (KV_HEADS * GROUP + KV_HEADS) * WIDTH), "b1": (5,), "w2": (KV_HEADS, 5)}
    weights = {f"x:layers.{LAYER}.{n}": torch.randn(*s, generator=generator) for n, s in shapes.items()}
    return Rule(
        (StatePlan("trained", Expr("learned", (MINE, K), "x"), None),),
        (),
        lambda m: {"trained": math.nan},
        weights=tuple(weights.items()),
    )


RULES = {rule.__name__[1:]: rule() for rule in (_keyformer, _lazy, _running, _sums, _events)}


# -- running the operators -------------------------------------------------------------------------------------------


def plan_of(rule: Rule, compact: bool = False) -> PolicyPlan:
    facts = ModelFacts(LAYER + 1, KV_HEADS * GROUP, KV_HEADS, WIDTH)
    every = ClassPlan("all", (Region("all"),), ())
    owner = ((0,) * KV_HEADS,) * facts.layers
    digest = f"{id(rule):016x}{compact}"
    return PolicyPlan("test", digest, facts, (every,), owner, states=rule.states, updates=rule.updates, compact=compact)


class Layer:
    """One layer under a policy, fed pieces and steps of q, k, v per sequence, as a model would."""

    def __init__(self, rule: Rule, batch: int, backend: str, paged: bool, compact: bool = False) -> None:
        self.plan = plan_of(rule, compact)
        self.key = ops.register(ops.Program(self.plan, ops.backend(backend), dict(rule.weights)))
        self.sequences = Sequences(self.plan, batch)
        make = PagedStore if paged else ExtentStore
        self.store: Store = make(self.plan, batch, torch.float32, torch.device("cpu"))
        if compact:
            self.store.rope = rope_table(64)

    def prompt(self, tokens: list[int]) -> None:
        self.sequences.begin_prefill(tokens)

    def feed(self, parts: list[tuple[Tensor, Tensor, Tensor]], pieces: list[Piece]) -> None:
        """parts: (q, k, v) of each sequence, [heads, its tokens and then peeked ones, D]."""
        store, width = self.store, max(p[0].shape[1] for p in parts)
        clock, _ = self.sequences.numbers(pieces)
        store.clock.copy_(clock)
        phase = "step" if any(p.step for p in pieces) else "chunk"
        new = [p.new for p in pieces]
        if phase == "step":
            store.reserve_step(torch.tensor([n > 0 for n in new]))
        else:
            lengths = store.lengths()[LAYER]
            bounds = (lengths + torch.tensor(new)[:, None]).flatten().tolist()
            store.reserve(LAYER, bounds)
            if isinstance(store, PagedStore):
                store.commit()
        padded = [
            torch.stack([torch.cat([torch.full((t.shape[0], width - t.shape[1], WIDTH), 7.0), t], 1) for t in side])
            for side in zip(*parts, strict=True)
        ]
        torch.ops.kvc.anchor_v1(*padded, list(store.site(LAYER)), SCALE, phase, self.key)
        self.sequences.advance(pieces, [[0] * len(pieces)])

    def states(self, b: int) -> list[list[dict[str, float]]]:
        site, out = self.store.site(LAYER), []
        for h in range(KV_HEADS):
            row = site.base(KV_HEADS) + b * KV_HEADS + h
            slots = site.slots(row, 0, int(site.length[row]))
            assert site.pos[slots].tolist() == list(range(len(slots)))
            values = {s.name: site.state[i, slots].tolist() for i, s in enumerate(self.plan.states)}
            out.append([{name: column[i] for name, column in values.items()} for i in range(len(slots))])
        return out


def tokens_of(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(h, n, WIDTH, generator=generator) for h in heads)
    return 2 * q, k, v


def part(all_of_it: tuple[Tensor, Tensor, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t[:, start:stop] for t in all_of_it)
    return q, k, v


def rope_table(places: int) -> Tensor:
    """Cosine and sine of places, [2, places, D], half-split."""
    angle = torch.arange(float(places))[:, None] * 100.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2))
    angle = torch.cat([angle, angle], 1)
    return torch.stack([angle.cos(), angle.sin()])


def turned(x: Tensor) -> Tensor:
    """x [heads, n, D], each token turned by its own position."""
    cos, sin = rope_table(x.shape[1])
    return x * cos + torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1) * sin


def run(
    rule: Rule, prompts: list[int], steps: int, cut: int, peek: int, backend: str, paged: bool, compact: bool = False
) -> Layer:
    """Prompts of these lengths in pieces of `cut` tokens with peeked ones behind, then so many steps of each."""
    layer = Layer(rule, len(prompts), backend, paged, compact)
    given = [tokens_of(n + steps, b) for b, n in enumerate(prompts)]
    layer.prompt(prompts)
    for at in range(0, max(prompts), cut):
        parts, pieces = [], []
        for n, one in zip(prompts, given, strict=True):
            new = max(0, min(cut, n - at))
            ends = new > 0 and at + new == n
            ahead = 0 if ends or not new else min(peek, n)
            tail = part(one, n - ahead, n)
            parts.append(tuple(torch.cat(pair, 1) for pair in zip(part(one, at, at + new), tail, strict=True)))
            pieces.append(Piece(new, ahead, ends))
        layer.feed(parts, pieces)  # type: ignore[arg-type]
    for step in range(steps):
        parts = [part(one, n + step, n + step + 1) for n, one in zip(prompts, given, strict=True)]
        layer.feed(parts, [Piece(1, step=True)] * len(prompts))
    return layer


def check(rule: Rule, layer: Layer, prompts: list[int], steps: int, compact: bool = False) -> None:
    for b, n in enumerate(prompts):
        q, k, v = tokens_of(n + steps, b)
        if compact:  # nothing is ever dropped, so places are positions
            q, k = turned(q), turned(k)
        meant, found = by_loops(rule, q, k, v, n), layer.states(b)
        for h in range(KV_HEADS):
            assert len(found[h]) == n + steps
            for i, (mine, truth) in enumerate(zip(found[h], meant[h], strict=True)):
                for name, value in mine.items():
                    assert value == pytest.approx(truth[name], rel=1e-4, abs=1e-5), (b, h, i, name)


@pytest.mark.parametrize(("backend", "paged"), [("reference", False), ("reference", True), ("cpu", False)])
@pytest.mark.parametrize("name", RULES)
@examples(6)
@given(data=st.data())
def test_states_are_those_of_plain_loops(name: str, backend: str, paged: bool, data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3), "prompts")
    steps, cut = data.draw(st.integers(0, 6), "steps"), data.draw(st.integers(1, 15), "cut")
    peek = data.draw(st.integers(0, 3), "peek")
    layer = run(RULES[name], prompts, steps, cut, peek, backend, paged)
    check(RULES[name], layer, prompts, steps)


@pytest.mark.parametrize(("backend", "paged"), [("reference", False), ("reference", True), ("cpu", False)])
@pytest.mark.parametrize("name", RULES)
def test_states_read_keys_turned_by_their_place(name: str, backend: str, paged: bool) -> None:
    prompts, steps = [9, 13], 3
    layer = run(RULES[name], prompts, steps, 5, 2, backend, paged, compact=True)
    check(RULES[name], layer, prompts, steps, compact=True)


@pytest.mark.parametrize("name", RULES)
def test_a_piece_may_be_longer_than_a_block_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompile.kernels.states.BLOCK", 3)
    check(RULES[name], run(RULES[name], [11, 7], 2, 20, 0, "reference", False), [11, 7], 2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cut", [1, 4, 20])
def test_a_trained_score_is_that_of_its_layers(cut: int, backend: str) -> None:
    rule, prompts, steps = _learned(), [9, 3], 2
    layer = run(rule, prompts, steps, cut, 2, backend, False)
    weights = {name.rsplit(".", 1)[1]: w for name, w in rule.weights}
    for b, n in enumerate(prompts):
        q, k, _ = tokens_of(n + steps, b)
        for t in range(n + steps):
            x = torch.cat([q[:, t].flatten(), k[:, t].flatten()])
            inner = weights["w1"] @ x + weights["b1"]
            truth = weights["w2"] @ (inner * torch.sigmoid(inner))
            for h in range(KV_HEADS):
                assert layer.states(b)[h][t]["trained"] == pytest.approx(float(truth[h]), rel=1e-4, abs=1e-5)


def test_a_new_entry_cannot_be_measured_by_its_row() -> None:
    init = reduce("mean", "i", Expr("unary", (K,), "norm"))
    rule = Rule((StatePlan("s", init, None),), (), lambda m: {})
    with pytest.raises(KvCompileError, match="entries of its row"):
        run(rule, [5], 0, 9, 0, "reference", False)


def test_programs_of_other_weights_are_other_programs() -> None:
    rule = _learned()
    plan, backend = plan_of(rule), ops.backend("reference")
    first = ops.Program(plan, backend, dict(rule.weights))
    other = replace(first, weights={name: w + 1 for name, w in rule.weights})
    keys = {ops.register(p) for p in (first, other, replace(first, weights={}))}
    assert len(keys) == 3
    assert ops.register(first) in keys


def test_a_step_leaves_sequences_without_a_token_alone() -> None:
    for backend in ("reference", "cpu"):
        layer = run(RULES["events"], [5, 6], 1, 20, 0, backend, False)
        before = layer.states(1)
        given = tokens_of(7, 0)
        nothing = part(tokens_of(1, 9), 0, 1)
        layer.feed([part(given, 6, 7), nothing], [Piece(1, step=True), Piece(0)])
        assert layer.states(1) == before
        assert layer.states(0) != before
