"""Formulas printed for torch mean what the reference says they mean; what cannot be printed says why.

The Triton text of the same formulas runs in triton_interpreted/.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from kvcompile.kernels.evaluate import score
from kvcompile.kernels.holes import print_hole, region_text, spell, step_hole
from kvcompile.kernels.plan import Expr, Region
from kvcompile.kernels.printers import TORCH, Axis
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.stages import Unprintable, cut, open_axes
from tests.kernels.triton_interpreted.plans import ACC, attn, binary, const, named, plan, reduce

ATTN = reduce("sum", "q", attn())
POS, NOW = named("field", "pos"), named("scalar", "now")
LOG = Expr("unary", (binary("-", ACC, const(Fraction(1, 2))),), "log")  # NaN where acc is less than a half

FORMULAS = {
    "mean over heads": reduce("mean", "g", ATTN),
    "deviation over heads": reduce("std", "g", ATTN),
    "largest share": binary("/", reduce("max", "g", ATTN), reduce("sum", "g", ATTN)),
    "division by zero": binary("/", ACC, binary("-", POS, POS)),
    "weighted by age": binary("*", reduce("mean", "g", ATTN), Expr("unary", (binary("/", POS, NOW),), "exp")),
    "truths count": binary("+", binary(">", ACC, const(Fraction(1, 2))), binary("<=", POS, const(3))),
    "both": binary("and", binary(">", ACC, const(Fraction(1, 4))), binary("!=", POS, const(2))),
    "either": binary("or", binary("<", ACC, const(Fraction(1, 4))), POS),
    "clamped": binary("min", binary("max", ACC, const(Fraction(1, 4))), binary("/", POS, const(8))),
    "negative": Expr("unary", (binary("*", const(-2), ACC),), "neg"),
    "log of age": Expr("unary", (binary("+", named("field", "age"), const(1)),), "log"),
    "root": Expr("unary", (Expr("unary", (binary("-", ACC, const(1)),), "abs"),), "sqrt"),
    "squashed": Expr("unary", (ACC,), "sigmoid"),
    "unequal to NaN": binary("!=", LOG, const(0)),
    "NaN and": binary("and", LOG, const(1)),
    "NaN or": binary("or", LOG, binary(">", ACC, const(Fraction(9, 10)))),
    "or nothing": binary("or", ACC, const(0)),
    "largest with NaN": reduce("max", "g", Expr("unary", (binary("-", ATTN, const(Fraction(1, 8))),), "sqrt")),
    "length": binary("*", ACC, named("scalar", "len")),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_torch_text_means_what_the_reference_means(name: str) -> None:
    noise = torch.Generator().manual_seed(1)
    p = torch.rand(1, 3, 1, 9, generator=noise)
    acc = torch.rand(1, 9, generator=noise)
    pos = torch.arange(9)[None]
    yes = torch.ones(1, 9, dtype=torch.bool)
    rows = Rows(pos, yes, yes, ~yes, torch.tensor([11]), torch.tensor([5]), {"acc": acc}, attn=p)
    want = score(FORMULAS[name], rows, yes)[0]

    hole = step_hole("t", FORMULAS[name], dialect=TORCH)
    names = {"torch": torch, "GROUP": 3, "p": p[0, :, 0].T, "state_acc": acc[0], "pos_i": pos[0].float()}
    names |= {"age": 11 - pos[0].float(), "now_b_value": torch.tensor(11.0), "n_len": torch.tensor(9.0)}
    exec("\n".join([*hole.lines, f"answer = {hole.result}"]), names)
    assert torch.allclose(names["answer"].expand(9), want, rtol=1e-5, atol=1e-6, equal_nan=True)  # type: ignore[attr-defined]


def test_equal_parts_are_printed_once() -> None:
    hole = step_hole("t", FORMULAS["largest share"])
    assert len(hole.lines) == 3
    assert "tl.where(g_real[None, :], p" in hole.lines[0]
    assert hole.uses == {"p"}


def test_formulas_are_spelled_as_the_language_spells_them() -> None:
    assert spell(FORMULAS["mean over heads"]) == "mean[g] sum[q] attn"
    assert spell(FORMULAS["clamped"]) == "min(max(acc, 0.25), pos / 8)"
    assert spell(Expr("pool", (reduce("mean", "g", reduce("sum", "q", attn("last", 64))),), ("max", 7))) == (
        "maxpool(mean[g] sum[q] attn of q in last(64), 7)"
    )


def test_a_score_is_cut_by_its_axes() -> None:
    tile = reduce("mean", "g", reduce("sum", "q", attn("last", 8)))
    parts = cut(Expr("binary", (Expr("pool", (tile,), ("max", 7)), ACC), "+"))
    assert [t.formula for t in parts.tiles] == [tile] and parts.tiles[0].kind == "attn"
    assert spell(parts.row) == "maxpool(0, 7) + acc"
    shared = cut(reduce("mean", "h", ATTN))
    assert shared.heads == "mean" and shared.is_tile
    assert shared.tiles[0].formula == reduce("mean", "g", ATTN), "a group is averaged as the heads are"
    assert open_axes(ATTN) == {"g", "i"}


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (reduce("softmax", "i", reduce("mean", "g", ATTN)), "softmax\\[i\\] over the entries"),
        (reduce("mean", "u", ACC), "over units"),
        (binary("+", reduce("mean", "h", ATTN), ACC), "over heads inside"),
        (reduce("sum", "d", named("field", "v")), "values"),
        (binary("*", reduce("mean", "g", ATTN), Expr("unary", (named("field", "k"),), "norm")), "attention and k"),
        (named("field", "raw.k"), "raw.k"),
        (Expr("landmark", (), ("page", "lo")), "landmarks"),
        (attn(), "leaves axes"),
    ],
)
def test_what_has_no_form_says_why(formula: Expr, reason: str) -> None:
    with pytest.raises(Unprintable, match=reason):
        cut(formula)


def test_a_leaf_out_of_reach_is_named() -> None:
    with pytest.raises(Unprintable, match="scalar step is not within reach"):
        step_hole("t", named("scalar", "step"))
    with pytest.raises(Unprintable, match="no place in this kernel"):
        print_hole("t", reduce("sum", "i", ACC), {("state", "*"): "x"}, layout="i", axes={"g": Axis("G")})
    with pytest.raises(Unprintable, match="region random"):
        region_text(plan(()), Region("random", 0))
