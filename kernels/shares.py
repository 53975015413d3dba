"""Shares that follow from the entries: how a total is divided over the layers by scores of the prompt's entries.

Takes one number or one score per entry of each layer, gives whole parts. Guarantees: no part is negative, and their
sum is the total times the layers as long as there are as many entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from kvcompile.kernels.counts import weighted


def by_softmax(total: int, values: Sequence[float]) -> tuple[int, ...]:
    """`total` per layer, divided by the softmax over the layers of a number each (D2O, arXiv:2406.13035).

    NaN and -inf take nothing; where no layer has a number above that, all get the same.
    """
    usable = [value for value in values if not math.isnan(value)]
    highest = max(usable, default=-math.inf)
    if math.isinf(highest):
        weights = [Fraction(int(value == math.inf)) for value in values]
    else:
        weights = [Fraction(0 if math.isnan(value) else math.exp(value - highest)) for value in values]
    return weighted(total * len(values), tuple(weights))


def by_cover(total: int, masses: Sequence[Tensor]) -> tuple[int, ...]:
    """`total` per layer, so that each layer's best entries hold the same part of its mass (PrefixKV, arXiv:2412.03409).

    masses: per layer float [entries], older first; negative ones and NaN count as 0, in a layer of zeros all the same.
    An entry needs the mass of those before it, best first. The entries of all layers that need least are taken, lower
    layers first on ties; a layer's part is how many of its own are.
    """
    needs, layers = [], []
    for layer, mass in enumerate(masses):
        x = torch.where(mass > 0, mass, 0).double()
        everything = x.sum()
        x = x / everything if float(everything) else torch.full_like(x, 1 / max(1, len(x)))
        upto = x.sort(descending=True, stable=True).values.cumsum(0)
        needs.append(torch.cat([torch.zeros_like(upto[:1]), upto[:-1]]))
        layers.append(torch.full((len(x),), layer, device=x.device))
    order = torch.cat(needs).argsort(stable=True)[: total * len(masses)]
    return tuple(torch.cat(layers)[order].bincount(minlength=len(masses)).tolist())
