"""Regions that follow from stretches of the text, which are handed in with a prompt: `span("self")` and its like.

Takes the two tables of a site; gives which entries such a region names for a query. Guarantees: causality is by
original position, as for every region; a query of no stretch finds everything in `self` and `sources`.
Sources: Graph-KV (arXiv 2506.07334), parallel context encoding (2412.16545), set-based prompting (2406.06581).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.kernels.plan import PolicyPlan, ReadRule, Region

if TYPE_CHECKING:
    from kvcompile.kernels.compete import Place

SELF, SOURCES = "self", "sources"  # of the query; every other name means the stretches that bear it


def span_names(plan: PolicyPlan) -> tuple[str, ...]:
    """The names that regions of a plan's reads ask for, in the order in which `Site.links` has them."""
    terms = (term for read in plan.reads for rule in read.rules for term in rule.terms)
    return tuple(sorted({term.name for term in terms if isinstance(term, Region) and term.kind == "span"}))


def all_without(rule: ReadRule) -> bool:
    """Whether a query that is in no stretch reads all under a rule."""
    return any(isinstance(t, Region) and t.kind == "span" and t.name in (SELF, SOURCES) for t in rule.terms)


def span_mask(plan: PolicyPlan, region: Region, pos: Tensor, query: Tensor, place: Place) -> Tensor:
    """Which entries a region of kind `span` names for one query of each row: bool [rows, n].

    pos int64 [rows, n]; query int64 [rows], the queries' positions.
    """
    assert place.segment is not None and place.links is not None
    name, of = span_names(plan).index(region.name), list(place.sequence)
    segment = place.segment[of]
    own = _stretch(segment, query[:, None])
    links = place.links[of, name]
    rows = torch.arange(len(of), device=pos.device)[:, None]
    return links[rows, own, _stretch(segment, pos)] != 0


def _stretch(segment: Tensor, pos: Tensor) -> Tensor:
    """The stretch of each position, int64 [rows, n]; 0, none, beyond the table and where there is no position."""
    inside = (pos >= 0) & (pos < segment.shape[1])
    return segment.gather(1, torch.where(inside, pos, 0)).long().masked_fill(~inside, 0)
