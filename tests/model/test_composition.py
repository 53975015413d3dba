"""Rules side by side in one policy: head classes, layer ranges, `extends`, sets reused by later layers.

Each policy is compared with a rule composed by hand: kept positions and logits after every call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import kvcompile
from tests import oracle_policies as rules
from tests.driving import BACKENDS, NEAR_TIE, call, drive, one_by_one, padded, same
from tests.models import random_model, tokens
from tests.oracle import Oracle, Piece, Row
from tests.oracle_states import ByLayer, Fires, InTurn, Judge, Lazy, at, end_or_every, top

LAYERS = 5
MASK = ((1, 0), (0, 1), (0, 0), (1, 1), (0, 1))
TURNS = [tokens(26, seed=1), *one_by_one(tokens(7, seed=2)), tokens(9, seed=3), *one_by_one(tokens(4, seed=4))]
AT_END = at("prefill.end")

# -- choices ----------------------------------------------------------------------------------------------------------


def attention(oracle: Oracle, row: Row) -> torch.Tensor:
    """mean[g] sum[q in last(4)] attn, of all positions."""
    return oracle.last_reads(row, 4).sum(1).mean(0)


def recent(row: Row, piece: Piece, n: int) -> set[int]:
    return {p for p in row.positions() if p > piece.now - n}


def best_of(oracle: Oracle, row: Row, scores: torch.Tensor, n: int, taken: set[int]) -> set[int]:
    places = [p for p in row.positions() if p not in taken]
    return top(oracle, scores[places].tolist(), places, n)


def best_each(oracle: Oracle, rows: list[Row], n: int, taken: int, piece: Piece) -> list[set[int]]:
    """The n best of each head beside its recent(taken)."""
    return [best_of(oracle, row, attention(oracle, row), n, recent(row, piece, taken)) for row in rows]


def best_together(oracle: Oracle, rows: list[Row], n: int, taken: int, piece: Piece) -> list[set[int]]:
    """One choice by the heads' mean; they hold the same."""
    mean = torch.stack([attention(oracle, row) for row in rows]).mean(0)
    return [best_of(oracle, rows[0], mean, n, recent(rows[0], piece, taken))] * len(rows)


def observed(n: int, width: int) -> Judge:
    """recent(width) and the n best by the last four queries, when a prompt ends."""

    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        return recent(row, piece, width) | best_of(oracle, row, attention(oracle, row), n, recent(row, piece, width))

    return Judge(fires=AT_END, keeps=keeps)


def window(sink: int, width: int, fires: Fires) -> Judge:
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        return {p for p in row.positions() if p < sink} | recent(row, piece, width)

    return Judge(fires=fires, keeps=keeps)


# -- rules that reach over layers -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reused(rules.KeepAll):
    """`pickers` pick 6 of all that is there; layers in `keepers` keep the newest picks and recent(3)."""

    pickers: tuple[int, ...] = ()
    keepers: tuple[int, ...] = ()
    fires: Fires = AT_END
    choose: Callable[..., list[set[int]]] = best_each
    picked: list[set[int]] = field(default_factory=list)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        rows = oracle.rows[layer]
        if not self.fires(oracle, rows[0], piece):
            return
        if layer in self.pickers:
            self.picked = self.choose(oracle, rows, 6, 0, piece)
        if layer in self.keepers:
            for row, picked in zip(rows, self.picked, strict=True):
                rules.keep_set(row, picked | recent(row, piece, 3))


@dataclass(slots=True)
class SharedLayers(rules.KeepAll):
    """`shared layers(size)`: of each so many layers the first chooses 6 beside recent(3), the others follow it."""

    size: int = 2
    fires: Fires = AT_END
    choose: Callable[..., list[set[int]]] = best_each
    chosen: list[set[int]] = field(default_factory=list)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        rows = oracle.rows[layer]
        if not self.fires(oracle, rows[0], piece):
            return
        if layer % self.size == 0:
            self.chosen = self.choose(oracle, rows, 6, 3, piece)
        for row, chosen in zip(rows, self.chosen, strict=True):
            rules.keep_set(row, chosen | recent(row, piece, 3))


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    text: str
    rule: Callable[[], rules.KeepAll]

    def options(self, folder: Path) -> dict[str, object]:
        if "table(" not in self.text:
            return {}
        path = folder / "mask.tsv"
        path.write_text("\n".join("\t".join(map(str, row)) for row in MASK) + "\n")
        return {"tables": {"retrieval": str(path)}}


HEADS = 'heads retrieval = table("masks.tsv")\nheads local = rest\n\n'
SCORE = "    score s = mean[g] sum[q in last(4)] attn\n"

PRULONG_WITH_SNAPKV = (
    HEADS
    + """policy prulong_snapkv(budget=14, observe=4, n_sink=2, window=6, c=8):
    score s = maxpool(mean[g] sum[q in last(observe)] attn, 3)
    retrieval:
        keep recent(observe) | top(budget - observe) by s per head
        at prefill.end
    local:
        keep sink(n_sink) | recent(window)
        at chunk(c), step
"""
)
LAYER_RANGES = """policy ranges():
    score s = mean[g] sum[q in last(4)] attn
    layers 0, last: keep all
    layers 1..2:
        keep sink(1) | recent(6)
        at chunk, step
    layers 3..last-1:
        keep recent(3) | top(7) by s per head
        at prefill.end
"""
WITHIN_LAYERS = (
    HEADS
    + """policy within():
    local: keep sink(1) | recent(6)
    retrieval: keep recent(12)
    layers 3..4:
        retrieval: keep recent(9)
    at prefill.end, step
"""
)
EXTENDED = """policy narrow(budget=13, observe=4) extends snapkv:
    keep sink(2) | recent(observe) | top(budget - observe - 2) by s per head
    layers 0, 4: keep recent(10)
"""
EXTENDED_TWICE = """policy narrow(budget=13, observe=4, pool=3) extends snapkv:
    layers 1: keep recent(9)
    at prefill.end, every(3)

policy narrower(budget=9) extends narrow:
    layers 1: keep sink(1) | recent(5)
"""
PICKED = f"""policy picked():
{SCORE}    layers 0:
        pick t = top(6) by s per head
        keep all
    layers 1..last: keep t | recent(3)
    at prefill.end
"""
PICKED_TWICE = f"""policy picked():
{SCORE}    layers 0, 2:
        pick t = top(6) by s per head
        keep all
    layers rest: keep t | recent(3)
    at prefill.end, step
"""
PICKED_EVERYWHERE = f"""policy picked():
{SCORE}    pick t = top(6) by s shared heads
    keep t | recent(3)
    at prefill.end, every(3)
"""
STATES = (
    HEADS
    + """policy states(budget=12, window=3, alpha=0.05):
    state acc = 0, seen = now, gap = 1
    on attend: acc += mean[g] sum[q] attn
    on attend where max[g] attn > alpha: gap = max(gap, now - seen), seen = now
    score s = sigmoid(-(now - seen) / gap) + sigmoid(-1 / gap)
    retrieval:
        keep recent(window) | top(budget - window) by s per head
        at every(window) if len > budget
    local:
        keep recent(10% of prompt) | top(25% of prompt) by acc per head
        at prefill.end, step
"""
)
TWO_RULES = (
    HEADS
    + f"""policy two_rules():
{SCORE}    retrieval:
        keep recent(4) | top(9) by s per head
        at prefill.end
        keep sink(1) | recent(8)
        at step
    local: keep recent(6)
    at prefill.end, step
"""
)


def shared(scope: str, triggers: str) -> str:
    return f"""policy grouped():
{SCORE}    keep recent(3) | top(6) by s {scope} shared layers(2)
    at {triggers}
"""


def prulong_with_snapkv() -> rules.KeepAll:
    retrieval = rules.SnapKV(chunk=8, budget=14, observe=4, pool=3)
    return rules.Classes(mask=MASK, one=retrieval, zero=rules.Streaming(chunk=8, sink=2, window=6))


def layer_ranges() -> rules.KeepAll:
    narrow = window(1, 6, at("chunk", "step"))
    return ByLayer(rules=(rules.KeepAll(), narrow, narrow, observed(7, 3), rules.KeepAll()))


def within_layers() -> rules.KeepAll:
    always = at("prefill.end", "step")

    def layer(retrieval: int) -> rules.KeepAll:
        return rules.Classes(mask=MASK, one=window(0, retrieval, always), zero=window(1, 6, always))

    return ByLayer(rules=(layer(12), layer(12), layer(12), layer(9), layer(9)))


def extended() -> rules.KeepAll:
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        taken = {p for p in row.positions() if p < 2} | recent(row, piece, 4)
        places = [p for p in row.positions() if p not in taken]
        scores = rules.pooled(attention(oracle, row)[places].tolist(), 7, "max")
        return taken | top(oracle, scores, places, 7)

    ends, inner = window(0, 10, AT_END), Judge(fires=AT_END, keeps=keeps)
    return ByLayer(rules=(ends, inner, inner, inner, ends))


def extended_twice() -> rules.KeepAll:
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        taken = recent(row, piece, 4)
        places = [p for p in row.positions() if p not in taken]
        return taken | top(oracle, rules.pooled(attention(oracle, row)[places].tolist(), 3, "max"), places, 5)

    inner = Judge(fires=end_or_every(3), keeps=keeps)
    return ByLayer(rules=(inner, window(1, 5, end_or_every(3)), inner, inner, inner))


def two_states() -> rules.KeepAll:
    heavy = rules.H2O(heavy=Fraction(1, 4), local=Fraction(1, 10))
    return rules.Classes(mask=MASK, one=Lazy(budget=12, window=3, alpha=0.05), zero=heavy)


def two_rules() -> rules.KeepAll:
    retrieval = InTurn(rules=(observed(9, 4), window(1, 8, at("step"))))
    return rules.Classes(mask=MASK, one=retrieval, zero=window(0, 6, at("prefill.end", "step")))


CASES: dict[str, Case] = {
    "prulong's classes, snapkv on retrieval heads": Case(PRULONG_WITH_SNAPKV, prulong_with_snapkv),
    "layer ranges": Case(LAYER_RANGES, layer_ranges),
    "a head class within layers": Case(WITHIN_LAYERS, within_layers),
    "extends": Case(EXTENDED, extended),
    "extends twice": Case(EXTENDED_TWICE, extended_twice),
    "picked by the first layer": Case(PICKED, lambda: Reused(pickers=(0,), keepers=(1, 2, 3, 4))),
    "picked by two layers, again at each step": Case(
        PICKED_TWICE, lambda: Reused(pickers=(0, 2), keepers=(1, 3, 4), fires=at("prefill.end", "step"))
    ),
    "picked by every layer for itself": Case(
        PICKED_EVERYWHERE,
        lambda: Reused(
            pickers=tuple(range(LAYERS)), keepers=tuple(range(LAYERS)), fires=end_or_every(3), choose=best_together
        ),
    ),
    "shared layers": Case(shared("per head", "prefill.end"), SharedLayers),
    "shared layers, again every 3 steps": Case(
        shared("per head", "prefill.end, every(3)"), lambda: SharedLayers(fires=end_or_every(3))
    ),
    "shared heads, shared layers": Case(
        shared("shared heads", "prefill.end, every(3)"),
        lambda: SharedLayers(fires=end_or_every(3), choose=best_together),
    ),
    "states of two classes": Case(STATES, two_states),
    "a prompt rule and a step rule beside a class": Case(TWO_RULES, two_rules),
}


def model_of_five():
    return random_model("llama64", num_hidden_layers=LAYERS)


def optimised(name: str, backend: str, folder: Path):
    model = model_of_five()
    case = CASES[name]
    one = {"name": "narrower"} if "policy narrower" in case.text else {}
    kvcompile.optimize(model, case.text, backend=backend, compile="off", **one, **case.options(folder))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_composed_policy_is_its_rules_side_by_side(name, backend, tmp_path):
    truth = Oracle(model_of_five(), CASES[name].rule())
    for i, (turn, found) in enumerate(zip(TURNS, drive(optimised(name, backend, tmp_path), *TURNS), strict=True)):
        logits = truth.feed(turn)
        assert truth.closest > NEAR_TIE, "a near tie: choose another seed"
        assert found.kept[0] == truth.kept(), f"kept positions after call {i}"
        same(found.logits[0], logits, f"call {i}")
    assert min(len(head) for layer in truth.kept() for head in layer) < truth.length, "nothing was dropped"


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_composed_policy_on_a_padded_batch(name, backend, tmp_path):
    """Each row of a padded batch keeps what it keeps alone, through the prompt and two steps."""
    model = optimised(name, backend, tmp_path)
    prompts, forced = [tokens(n, seed=60 + n) for n in (29, 12)], [tokens(2, seed=70 + b) for b in range(2)]
    alone = [drive(model, prompt, *one_by_one(steps)) for prompt, steps in zip(prompts, forced, strict=True)]
    ids, mask = padded(prompts, "left")
    found, cache = call(model, ids, mask=mask)
    for step in range(3):
        for b in range(2):
            assert found.kept[b] == alone[b][step].kept[0], f"call {step}, row {b}"
            same(found.logits[b, -1], alone[b][step].logits[0, -1], f"call {step}, row {b}")
        if step < 2:
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            found, cache = call(model, torch.tensor([[steps[step]] for steps in forced]), cache, mask)
