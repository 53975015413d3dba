"""Head scores without data or training: what each KV head loses by reading a smaller set, from a few forwards.

Takes a Hugging Face decoder and a learn plan, or the name of a probe; gives `HeadScores`. Guarantees: equal arguments
give equal scores, memory for a block of queries only, and a model that is left as it was.
The idea of scoring heads on the fly: kvpress' DuoAttentionPress(on_the_fly_scoring=True); the measure here is another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan
from kvcompile.kernels.readable import by_place, check_readable, last_readers
from kvcompile.learning.data import check_ids
from kvcompile.learning.masks import HeadScores, provenance
from kvcompile.passes.facts import model_facts
from kvcompile.passes.learning import LearnPlan
from kvcompile.passes.sites import AttentionSite, find_sites
from kvcompile.probe import KINDS, WIDE, observe, positions_of, random_tokens, run_probes

TOKENS, FORWARDS = 4096, 4


def quick_scores(
    model: Any,
    learn_plan: LearnPlan,
    ids: Tensor | None = None,
    *,
    tokens: int | None = None,
    forwards: int = FORWARDS,
    seed: int = 0,
) -> HeadScores:
    """How much the model's hidden states change where one KV head alone reads the class that is mixed in.

    For query t and KV head h, c(t, h) = W_o (full - local) over the query heads of h: their attention output over what
    the learned class keeps, less that over what the other class keeps (each with a softmax of its own), through their
    columns of the layer's output projection. The score is the root of the mean of |c(t, h)|^2 over the queries whose
    two sets differ; |c| is in units of the residual stream, to which every layer adds, so layers compare.

    ids: texts without padding, int64 [batch, tokens], read one by one. Without them `forwards` texts of `tokens`
    tokens (4096; no more than the model has positions for): random ones, none twice while the vocabulary lasts, then
    the same again, so that heads that look for an equal token far back have one to find.
    KvCompileError where the text is too short for the sets to differ, or the model's attention cannot be measured.
    """
    sites, facts = find_sites(model), learn_plan.plan.facts
    own = model_facts(model)
    if (own.layers, own.kv_heads) != (facts.layers, facts.kv_heads):
        raise KvCompileError(
            f"this model has {own.layers} layers of {own.kv_heads} KV heads, the policy was bound to {facts.layers} of "
            f"{facts.kv_heads}: compile it for this model"
        )
    for cls in (learn_plan.full, learn_plan.local):
        check_readable(learn_plan.plan, cls)
    texts = _drawn(model, tokens, forwards, seed) if ids is None else _given(model, ids)
    record = _Record(learn_plan, {site.index: _projection(site) for site in sites})
    observe(model, texts, record)
    missing = [site.name for site in sites if site.index not in record.squares]
    if missing:
        raise KvCompileError(f"{missing[0]} could not be measured: its attention does not go through transformers' own")
    queries = torch.stack([record.queries[site.index] for site in sites])
    if not bool(queries.any()):
        raise KvCompileError(
            f"in a text of {texts.shape[1]} tokens a head of `{learn_plan.others}` reads the same as one of "
            f"`{learn_plan.heads}`: give longer texts, or smaller sets"
        )
    mean = torch.stack([record.squares[site.index] for site in sites]) / queries.clamp(min=1)
    what = f"{len(texts)} given texts" if ids is not None else f"{len(texts)} texts of random tokens, each told twice"
    told = provenance(model, learn_plan, method="quick", data=f"{what}, {texts.shape[1]} tokens", seed=seed)
    return HeadScores(tuple(map(tuple, mean.sqrt().float().tolist())), told)


def probe_scores(model: Any, kind: str, tokens: int | None = None) -> HeadScores:
    """The scores of RazorAttention's probe `kind`, "induction" or "echo", as a table like any other.

    tokens: how many are repeated, as in `probe("induction", tokens=...)`; by default 2500, or what the model has room
    for. KvCompileError for another kind or a model that cannot be probed.
    """
    if kind not in KINDS:
        raise KvCompileError(f"unknown probe {kind!r}: one of {', '.join(KINDS)}")
    found = run_probes(model, find_sites(model), {kind: (kind, tokens)})[kind]
    told = provenance(model, method=f"probe {kind}", data="random tokens that repeat")
    return HeadScores(tuple(map(tuple, found)), told)


# ---------------------------------------------------------------- texts


def _drawn(model: Any, tokens: int | None, forwards: int, seed: int) -> Tensor:
    """Random texts, int64 [forwards, length], the second half of each equal to its first."""
    most = positions_of(model)
    asked = TOKENS if tokens is None else tokens
    length = asked if most is None else min(asked, most)
    if forwards < 1 or length < 2:
        raise KvCompileError(
            f"{forwards} texts of {length} tokens say nothing: give one text or more, of two tokens or more"
        )
    halves = [
        random_tokens(model, length - length // 2, seed=(seed * forwards + n) % (1 << 63)) for n in range(forwards)
    ]
    return torch.stack([torch.cat([half, half])[:length] for half in halves])


def _given(model: Any, ids: Tensor) -> Tensor:
    most = positions_of(model)
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise KvCompileError(f"ids of shape {list(ids.shape)}: give token ids, int64 [batch, tokens]")
    if most is not None and ids.shape[1] > most:
        raise KvCompileError(f"texts of {ids.shape[1]} tokens for a model with {most} positions: cut them")
    check_ids(ids.flatten(), "ids", model.get_input_embeddings().num_embeddings)
    return ids


# ---------------------------------------------------------------- measuring


def _projection(site: AttentionSite) -> nn.Module:
    found = getattr(site.attention, "o_proj", None)
    if not isinstance(found, nn.Module):
        raise KvCompileError(
            f"{site.name}: this attention has no output projection `o_proj`, so what a head adds is unknown"
        )
    return found


@dataclass
class _Record:
    """What the forwards find, by layer and for each KV head: the sum of |c|^2, float64 [kv_heads], and the number of
    queries that it is of, int64 [kv_heads]."""

    plan: LearnPlan
    project: dict[int, nn.Module]
    squares: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    _last: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def note(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """As of `probe.Observer`."""
        kv_heads, n = k.shape[1:3]
        asked = q[0].unflatten(0, (kv_heads, -1))
        full, local = (self._readers(cls, layer, n).to(q.device) for cls in (self.plan.full, self.plan.local))
        squares = torch.zeros(kv_heads, dtype=torch.float64, device=q.device)
        number = torch.zeros(kv_heads, dtype=torch.int64, device=q.device)
        size = max(1, WIDE // (q.shape[1] * n))
        for at in range(0, n, size):
            queries = torch.arange(at, min(at + size, n), device=q.device)
            far, near = (_reads(last, queries) for last in (full, local))
            logits = torch.einsum("hgqd,hnd->hgqn", asked[:, :, queries].float(), k[0].float()) * scale
            change = _attended(logits, far, v[0]) - _attended(logits, near, v[0])
            squares += _added(self.project[layer], change.to(q.dtype)).double().square().sum((1, 2))
            number += (far != near).any(-1).sum(-1)
        self.squares[layer] = self.squares.get(layer, 0) + squares.cpu()
        self.queries[layer] = self.queries.get(layer, 0) + number.cpu()

    def _readers(self, cls: ClassPlan, layer: int, total: int) -> Tensor:
        """The last query that reads each key, int64 [rows, total]; one row where all KV heads read alike."""
        place = (layer, range(self.plan.plan.facts.kv_heads)) if by_place(cls) else (0, range(1))
        key = (cls.name, place[0], total)
        if key not in self._last:
            rows = [last_readers(self.plan.plan, cls, place[0], head, total) for head in place[1]]
            self._last[key] = torch.stack(rows)
        return self._last[key]


def _reads(last: Tensor, queries: Tensor) -> Tensor:
    """Which keys each query reads, bool [rows, queries, keys]."""
    keys = torch.arange(last.shape[1], device=last.device)
    return (keys <= queries[:, None]) & (queries[:, None] <= last[:, None])


def _attended(logits: Tensor, reads: Tensor, v: Tensor) -> Tensor:
    """Attention over what is read: logits [kv_heads, group, q, n], v [kv_heads, n, D]; [kv_heads, group, q, D]."""
    attn = torch.softmax(logits.masked_fill(~reads[:, None], float("-inf")), -1)
    return torch.einsum("hgqn,hnd->hgqd", attn, v.float())


def _added(project: nn.Module, heads: Tensor) -> Tensor:
    """What each KV head's output [kv_heads, group, q, D] adds to the hidden states, float32 [kv_heads, q, hidden]."""
    kv_heads, group, queries, channels = heads.shape
    alone = heads.new_zeros(kv_heads, queries, kv_heads, group, channels)
    each = torch.arange(kv_heads, device=heads.device)
    alone[each, :, each] = heads.transpose(1, 2)
    nothing = heads.new_zeros(1, 1, kv_heads * group * channels)  # a bias is no head's
    return (project(alone.flatten(2)) - project(nothing)).float()
