"""What each form of `tests/model/test_language_forms.py` keeps, written by hand from the language's own sentences.

A function `(oracle, layer, head, piece)` gives the positions that a row keeps; `(oracle, layer, head, place)` does what
one query does to states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch

from tests import oracle_policies as rules
from tests.oracle import Oracle, Piece, Row
from tests.oracle_states import covered, drawn, gumbel, last_logits, top


def region(row: Row, piece: Piece, sink: int = 0, recent: int = 0) -> set[int]:
    return {p for p in row.positions() if p < sink or p > piece.now - recent}


def rest(row: Row, taken: set[int]) -> list[int]:
    return [p for p in row.positions() if p not in taken]


def lengths(vectors: torch.Tensor, places: list[int]) -> list[float]:
    return [vectors[p].norm().item() for p in places]


def attention(oracle: Oracle, row: Row, width: int) -> torch.Tensor:
    """mean[g] sum[q in last(width)] attn, of all positions."""
    return oracle.last_reads(row, width).sum(1).mean(0)


def window(sink: int, recent: int):
    return lambda oracle, layer, head, piece: region(oracle.rows[layer][head], piece, sink, recent)


# -- choices ----------------------------------------------------------------------------------------------------------


def by_lot(oracle, layer, head, piece):
    return region(oracle.rows[layer][head], piece, 1, 3) | drawn(oracle, layer, head, piece, 12, 7)


def longer_than_most(oracle, layer, head, piece):
    """recent(2), and of the rest what has a longer key than the row's mean."""
    row = oracle.rows[layer][head]
    taken, mean = region(row, piece, recent=2), sum(lengths(row.keys, row.positions())) / len(row.positions())
    places = rest(row, taken)
    for length in lengths(row.keys, places):
        oracle.near(length, mean)
    return taken | {p for p in places if row.keys[p].norm() > mean}


def longer_than_most_for_good(oracle, layer, head, piece):
    """The same with values, among those that have not won before; who wins stays."""
    row = oracle.rows[layer][head]
    taken = region(row, piece, recent=3) | {p for p in row.positions() if row.frozen[p]}
    mean = sum(lengths(row.values, row.positions())) / len(row.positions())
    places = rest(row, taken)
    won = {p for p in places if row.values[p].norm() > mean}
    for length in lengths(row.values, places):
        oracle.near(length, mean)
    row.frozen[sorted(won)] = True
    return taken | won


def unsteady(oracle, layer, head, piece):
    """recent(1), what the last four queries all could read with a high mean logit, then 3 by key."""
    row = oracle.rows[layer][head]
    taken = region(row, piece, recent=1)
    logits = last_logits(oracle, row, 4).mean((0, 1))
    for p in rest(row, taken):
        oracle.near(logits[p].item(), 0.25)
    taken |= {p for p in rest(row, taken) if logits[p] > 0.25}
    return taken | top(oracle, lengths(row.keys, rest(row, taken)), rest(row, taken), 3)


def covering(sink: int, part: Fraction, per_head: Callable[[Oracle, Row], torch.Tensor]):
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        taken = region(row, piece, sink)
        scores = per_head(oracle, row)
        return taken | {p for p, _ in covered(oracle, [(scores[p].item(), p, 0) for p in rest(row, taken)], part)}

    return keeps


def towards_the_mean(oracle: Oracle, row: Row) -> torch.Tensor:
    """dot(k, mean[i] k): about half of them negative."""
    return row.keys @ row.keys[row.positions()].mean(0)


def covering_together(oracle, layer, head, piece):
    """cover(50%) by the heads' mean: one choice for all of them."""
    rows = oracle.rows[layer]
    scores = torch.stack([attention(oracle, row, 4) for row in rows]).mean(0)
    scored = [(scores[p].item(), p, 0) for p in rows[head].positions()]
    return {p for p, _ in covered(oracle, scored, Fraction(1, 2))}


def covering_across(oracle, layer, head, piece):
    """cover(60%) over the entries of all heads at once, beside recent(2)."""
    scored, taken = [], {}
    for h, row in enumerate(oracle.rows[layer]):
        taken[h] = region(row, piece, recent=2)
        scores = attention(oracle, row, 4)
        scored += [(scores[p].item(), p, h) for p in rest(row, taken[h])]
    return taken[head] | {p for p, h in covered(oracle, scored, Fraction(3, 5)) if h == head}


def covering_in_lots(oracle, layer, head, piece):
    """Of each lot of 5 that is full, what holds 60 % of its key lengths; lots that are not full stay."""
    row = oracle.rows[layer][head]
    kept = set()
    for lot in range(piece.now // 5 + 1):
        mine = [p for p in row.positions() if p // 5 == lot]
        if (lot + 1) * 5 - 1 > piece.now:
            kept |= set(mine)
        else:
            scored = [(s, p, 0) for s, p in zip(lengths(row.keys, mine), mine, strict=True)]
            kept |= {p for p, _ in covered(oracle, scored, Fraction(3, 5))}
    return kept


def of_each_query_head(oracle, layer, head, piece):
    """recent(2), and each query head's own 4 by pooled attention."""
    row = oracle.rows[layer][head]
    taken = region(row, piece, recent=2)
    places, kept = rest(row, taken), set(taken)
    for g in range(oracle.group):
        reads = oracle.last_reads(row, 4)[g].sum(0)
        kept |= top(oracle, rules.pooled([reads[p].item() for p in places], 3, "max"), places, 4)
    return kept


def a_quarter_of_each_query_head(oracle, layer, head, piece):
    row = oracle.rows[layer][head]
    places, kept = row.positions(), set()
    for g in range(oracle.group):
        reads = oracle.last_reads(row, 3)[g].sum(0)
        kept |= top(oracle, [reads[p].item() for p in places], places, len(places) // 4)
    return kept


def cover_of_each_query_head(oracle, layer, head, piece):
    row = oracle.rows[layer][head]
    taken, kept = region(row, piece, sink=2), set()
    for g in range(oracle.group):
        reads = oracle.last_reads(row, 3)[g].sum(0)
        kept |= {p for p, _ in covered(oracle, [(reads[p].item(), p, 0) for p in rest(row, taken)], Fraction(1, 2))}
    return taken | kept


def of_sampled_queries(oracle, layer, head, piece):
    """Queries of this piece at positions t with floor(t * 2 / 5) > floor((t - 1) * 2 / 5)."""
    row = oracle.rows[layer][head]
    reads = oracle.last_reads(row, piece.tokens).mean(0)
    picked = [j for j in range(piece.tokens) if (piece.start + j) * 2 // 5 > (piece.start + j - 1) * 2 // 5]
    taken = region(row, piece, recent=3)
    scores = reads[picked].sum(0)
    return taken | top(oracle, [scores[p].item() for p in rest(row, taken)], rest(row, taken), 8)


def with_noise(oracle, layer, head, piece):
    """Each query head's newest logits and noise of seed 5, summed over its last two queries, mean over the group."""
    row = oracle.rows[layer][head]
    logits = last_logits(oracle, row, 2)
    places = rest(row, region(row, piece, recent=2))
    scores = []
    for p in places:
        noisy = 0.0
        for g in range(oracle.group):
            for j in range(2):
                query = piece.now - 1 + j
                noisy += logits[g, j, p].item() + gumbel(5, layer, head * oracle.group + g, query, p)
        scores.append(noisy / oracle.group)
    return region(row, piece, recent=2) | top(oracle, scores, places, 7)


def best_of_last_reads(n: int, sink: int = 0, recent: int = 0):
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        taken = region(row, piece, sink, recent)
        scores = attention(oracle, row, 4)
        return taken | top(oracle, [scores[p].item() for p in rest(row, taken)], rest(row, taken), n)

    return keeps


def by_length(n: int, recent: int, sign: int):
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        taken = region(row, piece, recent=recent)
        return taken | top(oracle, [sign * x for x in lengths(row.keys, rest(row, taken))], rest(row, taken), n)

    return keeps


def shortest_keys(n: int, recent: int):
    return by_length(n, recent, -1)


def longest_keys(n: int, recent: int):
    return by_length(n, recent, +1)


# -- counts of what is there ------------------------------------------------------------------------------------------


def a_third_of_the_row(oracle, layer, head, piece):
    """recent(len / 4) and the longest third of len, less 2."""
    row = oracle.rows[layer][head]
    here = len(row.positions())
    taken = region(row, piece, recent=here // 4)
    n = math.floor(Fraction(here, 3)) - 2
    return taken | top(oracle, lengths(row.keys, rest(row, taken)), rest(row, taken), n)


# -- conditions -------------------------------------------------------------------------------------------------------


def turned(oracle: Oracle, row: Row, piece: Piece) -> bool:
    """The newest query points elsewhere than the one before: cosine, mean over the group."""
    new, old = row.queries[:, -1], row.queries[:, -2]
    cosine = torch.cosine_similarity(new, old, dim=1).mean().item()
    oracle.near(cosine, 0.5)
    return cosine < 0.5


# -- states -----------------------------------------------------------------------------------------------------------


def best_by(name: str, n: int, sink: int = 0, recent: int = 0, sign: int = 1):
    def keeps(oracle, layer, head, piece):
        row = oracle.rows[layer][head]
        taken = region(row, piece, sink, recent)
        places = rest(row, taken)
        return taken | top(oracle, (sign * row.states[name][places]).tolist(), places, n)

    return keeps


def reads_of(oracle: Oracle, layer: int, head: int, place: int) -> tuple[Row, list[int], torch.Tensor]:
    """The row, what the query at `place` reads of it, and with what probabilities [G, of them]."""
    row = oracle.rows[layer][head]
    columns, logits = oracle.logits(row, place)
    return row, columns, torch.softmax(logits, 1)


def peaks(oracle, layer, head, place):
    row, columns, reads = reads_of(oracle, layer, head, place)
    row.states["peak"][columns] = torch.maximum(row.states["peak"][columns], reads.amax(0))


def fading(oracle, layer, head, place):
    row, columns, reads = reads_of(oracle, layer, head, place)
    row.states["heat"][columns] = 0.75 * row.states["heat"][columns] + reads.mean(0)


def counted_when_old(oracle, layer, head, place):
    """hits of entries older than 2 at the query: more than a tenth, and then also its square in `much`."""
    row, columns, reads = reads_of(oracle, layer, head, place)
    for p, read in zip(columns, reads.mean(0).tolist(), strict=True):
        if place - p > 2:
            row.states["hits"][p] += read
            row.states["much"][p] += row.states["hits"][p] * read


def used_before_it_grows(oracle, layer, head, place):
    """much grows by what hits was before this query, hits by what the query reads; then, in another
    clause, much by a quarter of what hits is now."""
    row, columns, reads = reads_of(oracle, layer, head, place)
    row.states["much"][columns] += row.states["hits"][columns] * reads.mean(0)
    row.states["hits"][columns] += reads.mean(0)
    row.states["much"][columns] += row.states["hits"][columns] / 4


def hit(oracle, layer, head, place):
    row, columns, reads = reads_of(oracle, layer, head, place)
    for p, read in zip(columns, reads.amax(0).tolist(), strict=True):
        oracle.near(read, 0.15)
        row.states["hits"][p] += read > 0.15


def hit_twice(oracle, layer, head, piece):
    row = oracle.rows[layer][head]
    return region(row, piece, recent=4) | {p for p in row.positions() if row.states["hits"][p] >= 2}


def born(oracle, layer, head, place):
    """The product of an early entry's own query (mean over the group) and its key; later ones keep the first value."""
    row = oracle.rows[layer][head]
    if place < 12:
        row.states["born"][place] = (row.queries[:, place] @ row.keys[place]).mean()


def lives(oracle, layer, head, place):
    """In a step everything resident gains its key's length, those beyond position 9 twice; prompts change nothing."""
    if oracle.piece.kind == "step":
        row = oracle.rows[layer][head]
        for p in row.positions():
            row.states["life"][p] += row.keys[p].norm() * (2 if p > 9 else 1)


def read_then_aged(oracle, layer, head, place):
    """What was read by the largest head is added; after the reads of a step, everything loses a third."""
    row, columns, reads = reads_of(oracle, layer, head, place)
    row.states["warm"][columns] += reads.amax(0)
    if oracle.piece.kind == "step":
        row.states["warm"] *= 2 / 3


def weighed(oracle, layer, head, place):
    """A sum over queries that reads no state: exp(logit / 8) times the value's length."""
    row = oracle.rows[layer][head]
    columns, logits = oracle.logits(row, place)
    row.states["mass"][columns] += (torch.exp(logits / 8) * row.values[columns].norm(dim=1)).mean(0)
