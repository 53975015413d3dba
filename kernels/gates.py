"""Trained block gates: which units a query should read, by two small linear maps and a RoPE of their own.

Takes weights by name, rows as one query each reads them, and landmarks of their units; gives float32 logits per unit.
Sources: SeerAttention (arXiv:2410.13276), whose gates see the mean of the queries of a unit and give each query head a
logit; SeerAttention-R (arXiv:2506.08889), whose gates see the query heads of one query together and give each KV head
one. A policy adds softmax, threshold or count. Nothing here trains them: see `learning.distil`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.kernels.plan import Expr, QuerySource, UnitPlan, words_of
from kvcompile.kernels.rotary import rotate
from kvcompile.kernels.rows import Queries, Rows

OWN, FORWARD = QuerySource("own"), QuerySource("forward")
PARTS = ("q", "k", "q_norm", "k_norm")  # of a layer; k alone must be there
EPS = 1e-6  # of the norms in gate space, as published


class Gate(NamedTuple):
    """One layer's weights, float32; None where a gate has none of them.

    q     [q_heads, head_dim, width]: each query head has its own logits, or
          [kv_heads, group * head_dim, width]: the query heads of a KV head give one together; None: q is taken as it is
    k     [kv_heads or q_heads, landmarks * head_dim, width]
    q_norm, k_norm [width]: RMS norm after the maps     rope [width / 2]: angle of each pair of channels per position
    """

    q: Tensor | None
    k: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    rope: Tensor | None = None

    def joins(self, group: int, head_dim: int) -> bool:
        """Whether the query heads of a KV head give one logit together."""
        return self.q is not None and self.q.shape[1] == group * head_dim

    def asked(self, q: Tensor, heads: slice, place: Tensor) -> Tensor:
        """Queries in gate space: q [kv_heads, group, n, head_dim] of the KV heads `heads`, place [n];
        [kv_heads, group or 1, n, width]."""
        _, group, _, head_dim = q.shape
        if self.q is None:
            found = q
        elif self.joins(group, head_dim):
            found = q.transpose(1, 2).flatten(2) @ self.q[heads]
            found = found[:, None]
        else:
            found = q @ self.q.unflatten(0, (-1, group))[heads]
        return _turned(_normed(found, self.q_norm), place, self.rope)

    def held(self, marks: Tensor, heads: slice, place: Tensor, group: int, kv_heads: int) -> Tensor:
        """Units in gate space: marks [heads, ..., units, landmarks * head_dim], place [units];
        [heads, group or 1, ..., units, width]. kv_heads: of the model, to tell maps per query head from those per KV
        head."""
        weight = self.k.unflatten(0, (kv_heads, -1))[heads]  # [heads, group or 1, in, width]
        between = marks.dim() - 3
        weight = weight.reshape(*weight.shape[:2], *(1,) * between, *weight.shape[2:])
        return _turned(_normed(marks[:, None] @ weight, self.k_norm), place, self.rope)


def gate_of(weights: Mapping[str, Tensor], key: str, layer: int) -> Gate:
    """A layer's gate, by the names that files use, behind the key of the score."""
    q, k, q_norm, k_norm = (weights.get(f"{key}:layers.{layer}.{part}") for part in PARTS)
    assert k is not None
    return Gate(q, k, q_norm, k_norm, weights.get(f"{key}:rope"))


def logits(asked: Tensor, held: Tensor) -> Tensor:
    """Scaled products: asked [heads, group or 1, n, width], held [heads, group or 1, units, width];
    [heads, group or 1, n, units]."""
    return asked @ held.transpose(-1, -2) * asked.shape[-1] ** -0.5


def gated(weights: Mapping[str, Tensor], key: str, rows: Rows, unit: UnitPlan, marks: Sequence[Tensor]) -> Tensor:
    """A logit for each unit, float32 [rows, group or 1, units]; meaningless for units that are not full.

    rows: each as one query reads it, `QuerySource("own")`; its `forward` too, where the gate sees the mean of the
    forward's queries in the query's own unit. It then depends on how a prompt was cut inside of a unit. marks: the
    landmarks in the order of the file, each [rows, units, head_dim]. A gate of keys without rotation sees queries
    without rotation, too.
    """
    assert rows.heads is not None
    gate, joined = gate_of(weights, key, rows.layer), torch.cat([mark.float() for mark in marks], -1)
    q, place = _query(rows, unit, f"{key}:pooled" in weights, f"{key}:raw" in weights)
    starts = unit.offset + unit.stride * torch.arange(joined.shape[1], device=joined.device)
    heads, kv_heads = rows.heads + rows.first, _kv_heads(gate, q.shape[1], q.shape[2])
    out = joined.new_empty(len(q), 1 if gate.joins(*q.shape[1:]) else q.shape[1], joined.shape[1])
    for head in heads.unique().tolist():
        here, one = heads == head, slice(head, head + 1)
        asked = gate.asked(q[here].transpose(0, 1)[None], one, place[here])[0]  # [group or 1, rows, width]
        held = gate.held(joined[here][None], one, starts, q.shape[1], kv_heads)[0]  # [group or 1, rows, units, width]
        found = (held @ asked[..., None])[..., 0] * asked.shape[-1] ** -0.5
        out[here] = found.transpose(0, 1).expand(-1, out.shape[1], -1)
    return out


def _query(rows: Rows, unit: UnitPlan, pooled: bool, raw: bool) -> tuple[Tensor, Tensor]:
    """What stands for each row's query, [rows, group, head_dim], and its position for the gate's RoPE, int64 [rows]."""
    assert rows.queries is not None
    own = rows.queries[OWN]
    if not pooled:
        return _vectors(rows, own, raw)[:, :, 0], own.pos[:, 0]
    asked = rows.queries[FORWARD]
    which = _unit(own.pos, unit)
    same = ((asked.pos >= 0) & (_unit(asked.pos, unit) == which)).float()
    total = torch.einsum("rgqd,rq->rgd", _vectors(rows, asked, raw), same)
    return total / same.sum(1)[:, None, None].clamp(min=1), unit.offset + unit.stride * which[:, 0]


def _vectors(rows: Rows, queries: Queries, raw: bool) -> Tensor:
    if not raw:
        return queries.q.float()
    assert rows.rope is not None
    return rotate(queries.q.float(), queries.pos.clamp(min=0)[:, None], rows.rope, back=True)


def _unit(pos: Tensor, unit: UnitPlan) -> Tensor:
    return (pos - unit.offset).div(unit.stride, rounding_mode="floor")


def _kv_heads(gate: Gate, group: int, head_dim: int) -> int:
    """KV heads of the whole model."""
    if gate.q is None:
        return gate.k.shape[0] // group
    return gate.q.shape[0] // (1 if gate.joins(group, head_dim) else group)


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _turned(x: Tensor, place: Tensor, rope: Tensor | None) -> Tensor:
    """x [..., n, width] turned by place [n], channel c with c + width / 2."""
    if rope is None:
        return x
    angle = place[:, None].float() * rope
    left, right = x.chunk(2, -1)
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)


def inputs_of(score: Expr, unit: UnitPlan) -> tuple[tuple[str, ...], bool]:
    """What a gate's score in a plan reads of a unit: how keys are pooled, in order, and whether without rotation.

    ValueError with the reason for landmarks that no gate is trained on.
    """
    named = [words_of(arg)[1] for arg in score.args if arg.op == "landmark"]
    formulas, found = dict(unit.landmarks), []
    for name in named:
        formula = formulas[name]
        fn = words_of(formula) if formula.op == "reduce" else ("", "")
        field = formula.args[0].value if formula.op == "reduce" and formula.args[0].op == "field" else None
        if fn[0] not in POOLED or fn[1] != "i" or field not in ("k", "raw.k"):
            raise ValueError(f"landmark `{name}` is no min, max or mean of k or raw.k over the tokens of a unit")
        found.append((fn[0], field))
    if len({field for _, field in found}) != 1:
        raise ValueError("its landmarks are of k and of raw.k" if found else "it reads no landmark of a unit")
    return tuple(fn for fn, _ in found), found[0][1] == "raw.k"


POOLED = ("min", "max", "mean")  # how the keys of a unit may be pooled for a gate
