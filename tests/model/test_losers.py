"""P1, P2 and P4 for losers that leave something behind, and for places in the row instead of positions.

Each policy is a text and a rule written by hand from the language's own sentences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
import torch

import kvcompile
from tests import oracle_policies as rules
from tests import oracle_systems as systems
from tests.driving import BACKENDS, drive
from tests.following import END, H2O, STEPS, Case, batch_is_alone, follows, policy
from tests.models import random_model, tokens
from tests.oracle import Oracle, Piece, Row
from tests.oracle_states import Judge, at, top

ALWAYS, AT_END = ("prefill.end", "step"), ("prefill.end",)

# -- losers -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Leaving(rules.KeepAll):
    """`keeps(oracle, row, piece)` says what stays, `leaves(oracle, layer, head, kept, losers)` what losers become: the
    positions that it returns stay too."""

    keeps: Callable[[Oracle, Row, Piece], set[int]] | None = None
    leaves: Callable[[Oracle, int, int, list[int], list[int]], Sequence[int]] | None = None
    triggers: tuple[str, ...] = ALWAYS
    full: int = 0

    def on_read(self, row: Row, reads: torch.Tensor) -> None:
        row.acc += reads.mean(0)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        for head in heads:
            row = oracle.rows[layer][head]
            if len(row) >= self.full if self.full else piece.fires(*self.triggers):
                kept = self.keeps(oracle, row, piece)
                losers = [p for p in row.positions() if p not in kept]
                left = self.leaves(oracle, layer, head, sorted(kept), losers)
                rules.keep_set(row, kept | set(left))


@dataclass(slots=True)
class LeavingCompact(Leaving):
    compact: ClassVar[bool] = True


def ends(sink: int, recent: int):
    return lambda oracle, row, piece: {p for p in row.positions() if p < sink or p > piece.now - recent}


def ends_and_best(sink: int, recent: int, n: int, score: Callable[[Row, list[int]], torch.Tensor]):
    def keeps(oracle, row, piece):
        taken = ends(sink, recent)(oracle, row, piece)
        places = [p for p in row.positions() if p not in taken]
        return taken | top(oracle, score(row, places).tolist(), places, n)

    return keeps


def accumulated(row: Row, places: list[int]) -> torch.Tensor:
    return row.acc[places]


def key_lengths(row: Row, places: list[int]) -> torch.Tensor:
    return row.keys[places].norm(dim=1)


def weight_of_values(row: Row, places: list[int]) -> torch.Tensor:
    """count * norm(v)."""
    return row.count[places] * row.values[places].norm(dim=1)


def nothing(oracle, layer, head, kept, losers):
    return []


def into_one(oracle, layer, head, kept, losers):
    systems.fold_mean(oracle.rows[layer][head], losers)
    return []


def into_runs(oracle, layer, head, kept, losers):
    return systems.fold_pool(oracle.rows[layer][head], losers, 3)


def into_frequencies(oracle, layer, head, kept, losers):
    return systems.fold_dct(oracle.rows[layer][head], losers, Fraction(1, 4))


def dot(oracle: Oracle, row: Row, p: int, survivors: list[int]) -> torch.Tensor:
    return row.keys[survivors] @ row.keys[p]


def cosine_of_values(oracle: Oracle, row: Row, p: int, survivors: list[int]) -> torch.Tensor:
    return torch.cosine_similarity(row.values[survivors], row.values[p][None], dim=1)


def into_like(likeness, weight: Callable[[float], float], least: float = -math.inf, rest=nothing):
    """Merges each loser into the survivor most like it, if that is at least `least`; `rest` takes the others."""

    def leaves(oracle, layer, head, kept, losers):
        row = oracle.rows[layer][head]
        found = {p: systems.most_like(oracle, row, p, kept, likeness) for p in losers}
        for _, sim in found.values():
            oracle.near(sim, least)
        joined = {p: (to, weight(sim)) for p, (to, sim) in found.items() if sim >= least}
        left = [p for p in losers if p not in joined]
        # What is left is folded from before the merge: none of it is a survivor, so the order does not matter.
        systems.merge(row, joined)
        return rest(oracle, layer, head, kept, left)

    return leaves


# -- places -----------------------------------------------------------------------------------------------------------


def towards_mean_of_turned(oracle: Oracle, layer: int, head: int, piece: Piece) -> set[int]:
    """recent(3) and the 7 best by dot(k, mean[i] k), k as queries read it."""
    row = oracle.rows[layer][head]
    places = row.positions()
    keys = oracle.turned(row.keys[places], 0)
    scores = dict(zip(places, (keys @ keys.mean(0)).tolist(), strict=True))
    return best_beside(oracle, scores, {p for p in places if p > piece.now - 3}, 7)


def towards_mean_of_raw(oracle: Oracle, layer: int, head: int, piece: Piece) -> set[int]:
    """recent(3) and the 7 best by dot(raw.k, mean[i] raw.k)."""
    row = oracle.rows[layer][head]
    places = row.positions()
    raw = torch.stack([unturned(oracle, row.keys[p], p) for p in places])
    scores = dict(zip(places, (raw @ raw.mean(0)).tolist(), strict=True))
    return best_beside(oracle, scores, {p for p in places if p > piece.now - 3}, 7)


def stored(oracle: Oracle, layer: int, head: int, piece: Piece) -> set[int]:
    """The same where keys lie before RoPE anyway."""
    row = oracle.rows[layer][head]
    places = row.positions()
    scores = dict(zip(places, (row.keys[places] @ row.keys[places].mean(0)).tolist(), strict=True))
    return best_beside(oracle, scores, {p for p in places if p > piece.now - 3}, 7)


def best_beside(oracle: Oracle, scores: dict[int, float], taken: set[int], n: int) -> set[int]:
    places = [p for p in scores if p not in taken]
    return taken | top(oracle, [scores[p] for p in places], places, n)


def unturned(oracle: Oracle, key: torch.Tensor, position: int) -> torch.Tensor:
    """A key rotated back by its position."""
    angle = -position * oracle.model.model.rotary_emb.inv_freq
    real, imaginary = key.chunk(2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin])


class CompactJudge(Judge):
    compact: ClassVar[bool] = True


class CompactH2O(rules.H2O):
    compact: ClassVar[bool] = True


class CompactSnapKV(rules.SnapKV):
    compact: ClassVar[bool] = True


# -- the table --------------------------------------------------------------------------------------------------------

TEXTS: dict[str, Case] = {
    "folded into one": (
        policy(*H2O, "keep recent(4) | top(6) by acc per head", "    else fold mean", STEPS),
        lambda: Leaving(keeps=ends_and_best(0, 4, 6, accumulated), leaves=into_one),
    ),
    "folded when full": (
        policy("keep sink(2) | recent(6)", "    else fold mean weight count", "at full(18)"),
        lambda: Leaving(keeps=ends(2, 6), leaves=into_one, full=18),
    ),
    "folded into runs": (
        policy("keep sink(2) | recent(5)", "    else fold pool(3)", STEPS),
        lambda: Leaving(keeps=ends(2, 5), leaves=into_runs),
    ),
    "folded into frequencies": (
        policy("keep sink(2) | recent(5)", "    else fold dct(25%)", "at full(20)"),
        lambda: Leaving(keeps=ends(2, 5), leaves=into_frequencies, full=20),
    ),
    "merged by keys": (
        policy(*H2O, "keep sink(1) | recent(3) | top(6) by acc per head",
               "    else merge into nearest by cos(k) weight sim", STEPS),
        lambda: Leaving(
            keeps=ends_and_best(1, 3, 6, accumulated), leaves=into_like(systems.cosine, lambda sim: sim)
        ),
    ),
    "merged by values, and what weighs more stays": (
        policy("keep recent(3) | top(6) by count * norm(v) per head", "    else merge into nearest by cos(v)", STEPS),
        lambda: Leaving(
            keeps=ends_and_best(0, 3, 6, weight_of_values), leaves=into_like(cosine_of_values, lambda sim: 1.0)
        ),
    ),
    "merged by distance": (
        policy("keep sink(1) | recent(2) | top(6) by norm(k) per head",
               "    else merge into nearest by distance(pos) when sim >= -2 weight 1 / 2", END),
        lambda: Leaving(
            keeps=ends_and_best(1, 2, 6, key_lengths), triggers=AT_END,
            leaves=into_like(systems.closeness, lambda sim: 0.5, least=-2.0),
        ),
    ),
    "merged, the rest folded": (
        policy("keep sink(1) | recent(3) | top(6) by norm(k) per head",
               "    else merge into nearest by dot(k) when sim >= 40 weight sim", "    else fold mean", STEPS),
        lambda: Leaving(
            keeps=ends_and_best(1, 3, 6, key_lengths),
            leaves=into_like(dot, lambda sim: sim, least=40.0, rest=into_one),
        ),
    ),
    "compact, by accumulated attention": (
        policy("positions compact", *H2O, "keep recent(10% of prompt) | top(25% of prompt) by acc per head", STEPS),
        lambda: CompactH2O(heavy=Fraction(1, 4), local=Fraction(1, 10)),
    ),
    "compact, by the last queries": (
        policy("positions compact", "score s = maxpool(mean[g] sum[q in last(4)] attn, 3)",
               "keep recent(4) | top(8) by s per head", END),
        lambda: CompactSnapKV(budget=12, observe=4, pool=3),
    ),
    "compact, by keys as they are read": (
        policy("positions compact", "keep recent(3) | top(7) by dot(k, mean[i] k) per head", STEPS),
        lambda: CompactJudge(fires=at(*ALWAYS), keeps=towards_mean_of_turned),
    ),
    "compact, by keys as they lie": (
        policy("positions compact", "keep recent(3) | top(7) by dot(raw.k, mean[i] raw.k) per head", STEPS),
        lambda: CompactJudge(fires=at(*ALWAYS), keeps=stored),
    ),
    "keys before RoPE": (
        policy("keep recent(3) | top(7) by dot(raw.k, mean[i] raw.k) per head", STEPS),
        lambda: Judge(fires=at(*ALWAYS), keeps=towards_mean_of_raw),
    ),
    "compact, folded into one": (
        policy("positions compact", "keep sink(2) | recent(6)", "    else fold mean", STEPS),
        lambda: LeavingCompact(keeps=ends(2, 6), leaves=into_one),
    ),
    "compact, merged by keys": (
        policy("positions compact", "keep sink(1) | recent(3) | top(6) by norm(k) per head",
               "    else merge into nearest by cos(k)", STEPS),
        lambda: LeavingCompact(
            keeps=ends_and_best(1, 3, 6, key_lengths), leaves=into_like(systems.cosine, lambda sim: 1.0)
        ),
    ),
}  # fmt: skip
BATCHED = [
    "folded into one", "folded into runs", "merged by keys", "merged, the rest folded",
    "compact, by accumulated attention", "compact, folded into one",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", TEXTS)
def test_p1_of_losers_and_places(text, backend):
    follows(TEXTS[text][0], TEXTS[text][1](), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", BATCHED)
def test_p2_of_losers_and_places(text, backend):
    batch_is_alone(TEXTS[text][0], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_p4_the_room_of_losers_is_given_back_at_once(backend):
    """A piece of the prompt lies whole before it is folded; half of it may not stay behind as unused room."""
    text = policy("keep sink(2) | recent(8)", "    else fold dct(50%)", END)
    model = random_model("llama64")
    kvcompile.optimize(model, text, backend=backend, compile="off")
    [seen] = drive(model, tokens(200, seed=5))
    held = sum(len(head) + 64 for layer in seen.kept[0] for head in layer)
    assert [len(head) for layer in seen.kept[0] for head in layer] == [10 + 95] * 6
    assert kvcompile.report(model).to_dict()["bytes_resident"] <= held * (2 * 64 * 4 + 16)
