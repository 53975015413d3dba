"""P1 and P2 for scopes over layers, whole units, and shares inside counts.

Each policy is a text and a rule written by hand from the language's own sentences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch

from tests import oracle_policies as rules
from tests import oracle_systems as systems
from tests.driving import BACKENDS
from tests.following import END, H2O, STEPS, Case, batch_is_alone, follows, policy
from tests.oracle import Oracle, Piece, Row
from tests.oracle_states import Judge, at, covered, top

ALWAYS, AT_END = ("prefill.end", "step"), ("prefill.end",)


def attention(oracle: Oracle, row: Row, width: int = 4) -> torch.Tensor:
    """mean[g] sum[q in last(width)] attn, of all positions."""
    return oracle.last_reads(row, width).sum(1).mean(0)


def mean_over_heads(oracle: Oracle, rows: list[Row]) -> torch.Tensor:
    return torch.stack([attention(oracle, row) for row in rows]).mean(0)


# -- layers that compete ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Layers(rules.KeepAll):
    """recent(2), and the best by attention of the last four queries: all rows, or each head's, or each layer's mean.

    pooled: what competes. n per row, or with `part` that part of all candidates, or with `cover` what holds that part
    of their sum.
    """

    pooled: str = "rows"
    n: int = 5
    floor: Fraction = Fraction(0)
    part: Fraction | None = None
    cover: Fraction | None = None
    triggers: tuple[str, ...] = AT_END

    def decide_all(self, oracle: Oracle, piece: Piece) -> None:
        if not piece.fires(*self.triggers):
            return
        places = [(layer, head) for head in range(oracle.heads) for layer in range(oracle.layers)]
        if self.pooled == "rows":
            groups = [[[place] for place in places]]
        elif self.pooled == "same head":
            groups = [[[place] for place in places if place[1] == head] for head in range(oracle.heads)]
        else:
            groups = [[[(layer, head) for head in range(oracle.heads)] for layer in range(oracle.layers)]]
        won: dict[tuple[int, int], set[int]] = {place: set() for place in places}
        for group in groups:
            for sharers, position in self._winners(oracle, group, piece):
                for place in sharers:
                    won[place].add(position)
        for layer, head in places:
            row = oracle.rows[layer][head]
            rules.keep_set(row, won[layer, head] | {p for p in row.positions() if p > piece.now - 2})

    def _winners(self, oracle: Oracle, group: list[list[tuple[int, int]]], piece: Piece):
        """(places that share a decision, position) of each winner of one group."""
        first, rest = [], []
        for number, sharers in enumerate(group):
            rows = [oracle.rows[layer][head] for layer, head in sharers]
            scores = mean_over_heads(oracle, rows)
            scored = [(scores[p].item(), p, number) for p in rows[0].positions() if p <= piece.now - 2]
            safe = oracle.best(scored, math.floor(self.floor * self.n)) if self.floor else []
            first += safe
            rest += [s for s in scored if (s[1], s[2]) not in safe]
        if self.cover is not None:
            chosen = covered(oracle, rest, self.cover)
        else:
            n = self.n * len(group) if self.part is None else math.floor(self.part * len(rest))
            chosen = first + oracle.best(rest, n - len(first))
        return [(group[number], position) for position, number in chosen]


# -- whole units ------------------------------------------------------------------------------------------------------

PageScore = Callable[[Oracle, Row, Sequence[int], Sequence[int]], float]  # of a page's residents and the next one's


def pages(
    oracle: Oracle, row: Row, piece: Piece, recent: int, score: PageScore, reads_next: bool = False
) -> tuple[set[int], list[tuple[float, int]]]:
    """Of pages of 4: what stays anyway (recent, pages not full), and (score, page) of those that compete."""
    stays = {p for p in row.positions() if p > piece.now - recent}
    competing = []
    for page in range(piece.now // 4 + 1):
        members, following = ([p for p in row.positions() if p // 4 == u] for u in (page, page + 1))
        if (page + 1 + reads_next) * 4 - 1 > piece.now:
            stays |= set(members)
        elif set(members) - stays:
            competing.append((score(oracle, row, members, following), page))
    return stays, competing


def with_pages(row: Row, stays: set[int], chosen: set[int]) -> set[int]:
    return stays | {p for p in row.positions() if p // 4 in chosen}


def best_pages(n: int, recent: int, score: PageScore, sign: int = 1, reads_next: bool = False):
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        stays, competing = pages(oracle, row, piece, recent, score, reads_next)
        chosen = {u for u, _ in oracle.best([(sign * s, u, 0) for s, u in competing], n)}
        return with_pages(row, stays, chosen)

    return keeps


def covering_pages(oracle, layer, head, piece):
    row = oracle.rows[layer][head]
    stays, competing = pages(oracle, row, piece, 2, mean_attention)
    chosen = {u for u, _ in covered(oracle, [(s, u, 0) for s, u in competing], Fraction(1, 2))}
    return with_pages(row, stays, chosen)


def pages_across(oracle, layer, head, piece):
    """Two pages per head, each head one for certain."""
    found = [pages(oracle, row, piece, 2, mean_attention) for row in oracle.rows[layer]]
    first, rest = [], []
    for h, (_, competing) in enumerate(found):
        scored = [(s, u, h) for s, u in competing]
        safe = oracle.best(scored, 1)
        first += safe
        rest += [s for s in scored if (s[1], s[2]) not in safe]
    chosen = first + oracle.best(rest, 2 * len(found) - len(first))
    return with_pages(oracle.rows[layer][head], found[head][0], {u for u, h in chosen if h == head})


def mean_attention(oracle: Oracle, row: Row, members: Sequence[int], following: Sequence[int]) -> float:
    return attention(oracle, row)[members].mean().item()


def largest_attention(oracle: Oracle, row: Row, members: Sequence[int], following: Sequence[int]) -> float:
    return attention(oracle, row)[members].max().item()


def length_of_mean_key(oracle: Oracle, row: Row, members: Sequence[int], following: Sequence[int]) -> float:
    return row.keys[members].mean(0).norm().item()


def step_to_next(oracle: Oracle, row: Row, members: Sequence[int], following: Sequence[int]) -> float:
    """Distance of the mean keys of a page and of the next one, which may have lost all of its entries: 0 then."""
    after = row.keys[following].mean(0) if following else torch.zeros(row.keys.shape[1])
    return (row.keys[members].mean(0) - after).norm().item()


# -- shares inside counts ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Shared(rules.KeepAll):
    """recent(b / 4) and the best b - b / 4 by `score`, b the layer's part, found when a prompt ends."""

    divide: Callable[[Oracle, Piece], list[int]] = field(default=lambda oracle, piece: [])
    score: Callable[[Oracle, list[Row]], list[torch.Tensor]] = field(default=lambda oracle, rows: [])
    triggers: tuple[str, ...] = ALWAYS
    parts: list[int] = field(default_factory=list)

    def on_read(self, row: Row, reads: torch.Tensor) -> None:
        row.acc += reads.mean(0)

    def decide_all(self, oracle: Oracle, piece: Piece) -> None:
        if piece.fires("prefill.end"):
            self.parts = self.divide(oracle, piece)
        if not piece.fires(*self.triggers):
            return
        for rows, part in zip(oracle.rows, self.parts, strict=True):
            for row, scores in zip(rows, self.score(oracle, rows), strict=True):
                near = {p for p in row.positions() if p > piece.now - part // 4}
                places = [p for p in row.positions() if p not in near]
                n = math.floor(part - Fraction(part, 4))
                rules.keep_set(row, near | top(oracle, scores[places].tolist(), places, n))


def own_acc(oracle: Oracle, rows: list[Row]) -> list[torch.Tensor]:
    return [row.acc for row in rows]


def one_for_all(oracle: Oracle, rows: list[Row]) -> list[torch.Tensor]:
    return [mean_over_heads(oracle, rows)] * len(rows)


def by_spread(oracle: Oracle, piece: Piece) -> list[int]:
    """12 by softmax(-var[i] acc)."""
    spread = [-sum(systems.variance(row) for row in rows) / oracle.heads for rows in oracle.rows]
    return systems.by_softmax(oracle, 12, spread)


def by_mass(oracle: Oracle, piece: Piece) -> list[int]:
    """10 by cover(mean[h] sum[q in last(4)] attn)."""
    columns = [mean_over_heads(oracle, rows)[rows[0].positions()].tolist() for rows in oracle.rows]
    return systems.covering(oracle, 10, columns)


def by_table(oracle: Oracle, piece: Piece) -> list[int]:
    return systems.by_weights(11, [Fraction(3), Fraction(1), Fraction(5, 2)])


def by_depth(oracle: Oracle, piece: Piece) -> list[int]:
    return systems.falling(12, oracle.layers, 4, piece.prompt, 0)


# -- the table --------------------------------------------------------------------------------------------------------

LAST = "score s = mean[g] sum[q in last(4)] attn"
PAGE = "unit page(4)"

TEXTS: dict[str, Case] = {
    "across layers": (
        policy(LAST, "keep recent(2) | top(5) by s across layers", END),
        lambda: Layers(pooled="same head"),
    ),
    "across heads and layers": (
        policy(LAST, "keep recent(2) | top(5) by s across heads across layers", STEPS),
        lambda: Layers(triggers=ALWAYS),
    ),
    "across heads and layers with a floor": (
        policy(LAST, "keep recent(2) | top(5) by s across heads floor 60% across layers", END),
        lambda: Layers(floor=Fraction(3, 5)),
    ),
    "a part across heads and layers": (
        policy(LAST, "keep recent(2) | top(30%) by s across heads across layers", END),
        lambda: Layers(part=Fraction(3, 10)),
    ),
    "cover across heads and layers": (
        policy(LAST, "keep recent(2) | cover(60%) by s across heads across layers", END),
        lambda: Layers(cover=Fraction(3, 5)),
    ),
    "shared heads across layers": (
        policy(LAST, "keep recent(2) | top(5) by s shared heads across layers", END),
        lambda: Layers(pooled="layers"),
    ),
    "pages by what is left over": (
        policy(PAGE, LAST, "keep recent(2) | top(3) pages by s per head", STEPS),
        lambda: Judge(fires=at(*ALWAYS), keeps=best_pages(3, 2, mean_attention)),
    ),
    "pages by their largest": (
        policy(PAGE, "score s = max[i] mean[g] sum[q in last(4)] attn", "keep top(2) pages by s per head", END),
        lambda: Judge(fires=at(*AT_END), keeps=best_pages(2, 0, largest_attention)),
    ),
    "pages by a landmark": (
        policy(f"{PAGE} with c = mean[i] k", "keep recent(3) | bottom(3) pages by norm(c) per head", STEPS),
        lambda: Judge(fires=at(*ALWAYS), keeps=best_pages(3, 3, length_of_mean_key, sign=-1)),
    ),
    "pages by the next one": (
        policy(PAGE, "score s = norm(mean[i] k - mean[i] next.k)", "keep recent(2) | top(3) pages by s per head", END),
        lambda: Judge(fires=at(*AT_END), keeps=best_pages(3, 2, step_to_next, reads_next=True)),
    ),
    "pages that cover": (
        policy(PAGE, LAST, "keep recent(2) | cover(50%) pages by s per head", END),
        lambda: Judge(fires=at(*AT_END), keeps=covering_pages),
    ),
    "pages across heads": (
        policy(PAGE, LAST, "keep recent(2) | top(2) pages by s across heads floor 50%", END),
        lambda: Judge(fires=at(*AT_END), keeps=pages_across),
    ),
    "a share by softmax": (
        policy(*H2O, "share b = 12 by softmax(-var[i] acc)", "keep recent(b / 4) | top(b - b / 4) by acc per head",
               STEPS),
        lambda: Shared(divide=by_spread, score=own_acc),
    ),
    "a share by cover": (
        policy("score s = mean[h] sum[q in last(4)] attn", "share b = 10 by cover(s)",
               "keep recent(b / 4) | top(b - b / 4) by s shared heads", END),
        lambda: Shared(divide=by_mass, score=one_for_all, triggers=AT_END),
    ),
    "a share by a table": (
        policy(*H2O, 'share b = 11 by table("TABLE")', "keep recent(b / 4) | top(b - b / 4) by acc per head", STEPS),
        lambda: Shared(divide=by_table, score=own_acc),
    ),
    "a pyramid inside counts": (
        policy(*H2O, "share b = 12 by pyramid(4)", "keep recent(b / 4) | top(b - b / 4) by acc per head", STEPS),
        lambda: Shared(divide=by_depth, score=own_acc),
    ),
}  # fmt: skip
BATCHED = [
    "across heads and layers", "shared heads across layers", "pages across heads", "a share by softmax",
    "a share by cover",
]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """The text of a case; the layers' weights lie in a file."""
    path = tmp_path / "weights.txt"
    path.write_text("# one a layer\n3\n\n1\n2.5\n")
    return lambda name: TEXTS[name][0].replace("TABLE", str(path))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", TEXTS)
def test_p1_of_scopes_units_and_shares(text, backend, written):
    follows(written(text), TEXTS[text][1](), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", BATCHED)
def test_p2_of_scopes_units_and_shares(text, backend, written):
    batch_is_alone(written(text), backend)
