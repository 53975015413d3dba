"""Head probes: how much each KV head attends to what came before, measured on random tokens that repeat.

Takes a Hugging Face decoder and its attention sites, gives one score per layer and KV head. Guarantees: the same
scores for the same model, memory for no more than a block of queries, and a model that is left as it was.
Source: RazorAttention (arXiv:2407.15891), section 3.2.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.sites import AttentionSite
from kvcompile.placement import attends_on

TOKENS, REPEATS = 2500, 4
KINDS = ("echo", "induction")  # attention to the previous same token, and to the token after that one
WIDE = 1 << 24  # logits that are held at a time
_ATTENTION = "kvcompile_observe"

Scores = list[list[float]]  # [layer][KV head]


def run_probes(
    model: Any, sites: tuple[AttentionSite, ...], wanted: Mapping[str, tuple[str, int | None]]
) -> dict[str, Scores]:
    """Scores by the names of `pipeline.probes_of`: of a kind, and of how many tokens, None for the usual number.

    Probes of equally many tokens share one forward. A KV head's score is the largest of its query heads', each the
    mean over the queries of all repeats but the first.
    """
    lengths = {tokens: _length(model, tokens) for _, tokens in wanted.values()}
    measured = {length: _measure(model, sites, length) for length in sorted(set(lengths.values()))}
    return {key: measured[lengths[tokens]][kind] for key, (kind, tokens) in wanted.items()}


def _length(model: Any, tokens: int | None) -> int:
    """Tokens that are repeated: as asked, but no more than the model has positions for."""
    most = positions_of(model)
    length = min(tokens or TOKENS, TOKENS if most is None else most // REPEATS)
    if length < 2:
        raise KvCompileError(f"a probe repeats 2 tokens or more {REPEATS} times, which needs {2 * REPEATS} positions")
    return length


def _measure(model: Any, sites: tuple[AttentionSite, ...], length: int) -> dict[str, Scores]:
    record = _Record(length, {site.index: site.group for site in sites})
    observe(model, [random_tokens(model, length).repeat(REPEATS)], record)
    missing = [site.name for site in sites if site.index not in record.scores]
    if missing:
        raise KvCompileError(f"{missing[0]} could not be probed: its attention does not go through transformers' own")
    return {kind: [record.scores[site.index][kind] for site in sites] for kind in KINDS}


def random_tokens(model: Any, length: int, seed: int = 0) -> Tensor:
    """Random tokens, int64 [length]: none twice while the vocabulary lasts, none that the model treats specially."""
    config = _text_config(model.config)
    named = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    special = {int(i) for one in named if one is not None for i in (one if isinstance(one, list) else [one])}
    usable = torch.tensor([i for i in range(int(config.vocab_size)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    rounds = [usable[torch.randperm(len(usable), generator=generator)] for _ in range(-(-length // len(usable)))]
    return torch.cat(rounds)[:length]


def positions_of(model: Any) -> int | None:
    """How many positions a model has; None where its configuration does not say."""
    most = getattr(_text_config(model.config), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


class Observer(Protocol):
    """What attention is told to in passing."""

    def note(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """q [1, q_heads, n, D], k, v [1, kv_heads, n, D] of one layer, after rotation."""


def observe(model: Any, texts: Iterable[Tensor], observer: Observer) -> None:
    """Run texts, int64 [n] each, one by one and tell the observer of every attention; an optimised model runs without
    its policy."""
    optimized = vars(model).get("_kvcompile")
    forward = model.forward if optimized is None else optimized.forward.original
    device = attends_on(model.get_input_embeddings())
    with attending_by(model, _ATTENTION), torch.no_grad():
        for ids in texts:
            forward(input_ids=ids[None].to(device), use_cache=False, logits_to_keep=1, kvc_observer=observer)


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextlib.contextmanager
def attending_by(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another attention; configurations are copied, because other models may share them."""
    before = [(module, module.config) for module in model.modules() if hasattr(module, "config")]
    copies = {id(config): copy.deepcopy(config) for _, config in before}
    try:
        for module, config in before:
            module.config = copies[id(config)]
            copies[id(config)]._attn_implementation = name  # type: ignore[union-attr]
        yield
    finally:
        for module, config in before:
            module.config = config


@dataclass
class _Record:
    """What one forward finds: `length` tokens repeated, `group` query heads per KV head of each layer."""

    length: int
    group: dict[int, int]
    scores: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def note(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """As of `Observer`, n = REPEATS * length."""
        group, (kv_heads, n) = self.group[layer], k.shape[1:3]
        asked = q[0].unflatten(0, (kv_heads, group))
        total = {kind: torch.zeros(kv_heads, group, device=q.device) for kind in KINDS}
        size = max(1, WIDE // (q.shape[1] * n))
        for at in range(self.length, n, size):
            queries = torch.arange(at, min(at + size, n), device=q.device)
            logits = torch.einsum("hgqd,hnd->hgqn", asked[:, :, queries].float(), k[0].float()) * scale
            later = torch.arange(n, device=q.device) > queries[:, None]
            attn = torch.softmax(logits.masked_fill(later, float("-inf")), -1)
            for kind, column in zip(KINDS, (queries - self.length, queries - self.length + 1), strict=True):
                total[kind] += attn.gather(3, column.expand(*attn.shape[:2], -1)[..., None]).sum((2, 3))
        self.scores[layer] = {kind: (found.amax(1) / (n - self.length)).tolist() for kind, found in total.items()}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    kvc_observer: Observer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention over one sequence without padding, noted in passing. Returns [1, n, q_heads, head_dim]."""
    if kvc_observer is None:
        raise KvCompileError("this attention stands in a model only while its heads are measured")
    refuse_variants(module, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kvc_observer.note(int(module.layer_idx), query, key, value, scale)  # type: ignore[arg-type]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


def refuse_variants(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """KvCompileError where a layer asks its attention for what neither probes nor learning carry out yet."""
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise KvCompileError(f"{type(module).__name__} asks for {name}, under which heads cannot be measured yet")
    if attention_mask is not None:
        raise KvCompileError(f"{type(module).__name__} makes an attention mask of its own, which is not supported yet")
