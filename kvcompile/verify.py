"""Does a policy do on this model what its meaning says, and what does it cost in quality?

Takes a model, a policy and a prompt; runs the untouched model, the policy on the chosen backend and the
policy on the reference backend over the same tokens (those the untouched model chooses).
Gives a `Verification`: kept sets and logits against the reference, divergence from the full cache.
Guarantees: the model is left as it was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch

from kvcompile.api import Optimized, optimized, use
from kvcompile.kernels.errors import KvCompileError

# Largest difference of two logits, as a part of the largest logit (at least 1): what the order of sums explains.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Part of the kept entries that may differ: in 16 bits rounding decides between scores that are almost equal.
KEPT_TOLERANCE = {torch.float32: 0.0, torch.float16: 0.02, torch.bfloat16: 0.05}

Kept = tuple[tuple[frozenset[int], ...], ...]  # [layer][kv head] -> resident positions


@dataclass(frozen=True, slots=True)
class Trace:
    """One run: float32 logits [1 + steps, vocabulary], the tokens fed, kept sets after the prompt and at the end."""

    logits: torch.Tensor
    tokens: tuple[int, ...]
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A row whose kept set is not the reference's."""

    when: str
    layer: int
    head: int
    missing: tuple[int, ...]
    extra: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome; `ok` says whether the backend agrees with the reference, not whether the policy is a good one."""

    policy: str
    backend: str
    prompt: int
    steps: int
    kept_entries: int
    kept_differing: int
    differences: tuple[Difference, ...]
    logit_error: float
    logit_bound: float
    kept_fraction: float
    kl_mean: float
    kl_max: float
    token_agreement: float
    first_disagreement: int | None
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verdict = "agrees with the reference" if self.ok else "DIFFERS from the reference"
        lines = [
            f"{self.policy}: backend {self.backend} {verdict} ({self.prompt} prompt tokens, {self.steps} steps)",
            f"  kept sets   {self.kept_entries} entries compared, {self.kept_differing} differ",
            f"  logits      largest difference {self.logit_error:.2e}, allowed {self.logit_bound:.2e}",
            "against the full cache",
            f"  entries     {self.kept_fraction:.1%} held at the end, {1 - self.kept_fraction:.1%} lost",
            f"  KL          mean {self.kl_mean:.3e}, largest {self.kl_max:.3e} nats per token",
            f"  tokens      {self.token_agreement:.1%} the same" + self._first(),
        ]
        return "\n".join(lines + [_line(difference) for difference in self.differences[:8]])

    def _first(self) -> str:
        return (
            "" if self.first_disagreement is None else f", the first that differs is number {self.first_disagreement}"
        )


def verify(
    model: Any,
    policy: Any,
    input_ids: torch.Tensor,
    *,
    steps: int = 16,
    backend: str = "auto",
    **options: Any,
) -> Verification:
    """Compare `backend` with the reference and with the full cache on one prompt.

    `input_ids` is int64 [1, n] on the model's device, n >= 1; `steps` decode forwards follow, fed with the tokens
    that the untouched model finds likeliest. `options` are those of `kvcompile.use`. KL is from the full cache's
    next-token distribution to the policy's, in nats.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise KvCompileError(f"verify takes one prompt, shape [1, n]; this one has shape {list(input_ids.shape)}")
    if "_kvcompile" in vars(model):
        raise KvCompileError("verify compares with the untouched model, and this one is optimised: restore it first")
    dtype = _dtype(model)
    with torch.inference_mode():
        full = _trace(model, input_ids, steps, None)
        with use(model, policy, backend=backend, **options):
            tried = _trace(model, input_ids, steps, full.tokens)
            used = optimized(model)
        with use(model, policy, backend="reference", **_without(options, "compile")):
            truth = _trace(model, input_ids, steps, full.tokens)
    return _judge(used, input_ids.shape[1], full, tried, truth, dtype)


def _trace(model: Any, input_ids: torch.Tensor, steps: int, forced: tuple[int, ...] | None) -> Trace:
    """Run prompt and steps; without `forced` tokens, feed the likeliest."""
    out = model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    rows, tokens = [_last(out)], []
    kept = [_kept(cache, model)]
    for step in range(steps):
        token = forced[step] if forced is not None else int(rows[-1].argmax())
        tokens.append(token)
        out = model(input_ids=input_ids.new_tensor([[token]]), past_key_values=cache, use_cache=True)
        rows.append(_last(out))
    kept.append(_kept(cache, model))
    return Trace(torch.stack(rows), tuple(tokens), tuple(kept))


def _judge(used: Optimized, prompt: int, full: Trace, tried: Trace, truth: Trace, dtype: torch.dtype) -> Verification:
    differences = tuple(
        difference
        for when, ours, theirs in zip(("after the prompt", "at the end"), tried.kept, truth.kept, strict=True)
        for difference in _differences(when, ours, theirs)
    )
    entries = sum(len(row) for kept in truth.kept for row in chain(*kept))
    differing = sum(max(len(d.missing), len(d.extra)) for d in differences)
    error = float((tried.logits - truth.logits).abs().max())
    bound = LOGIT_TOLERANCE[dtype] * max(1.0, float(truth.logits.abs().max()))
    log_full, log_tried = full.logits.log_softmax(-1), tried.logits.log_softmax(-1)
    divergence = (log_full.exp() * (log_full - log_tried)).sum(-1).clamp(min=0)
    same = full.logits.argmax(-1) == tried.logits.argmax(-1)
    rows = list(chain(*tried.kept[-1]))
    return Verification(
        policy=used.compiled.plan.name,
        backend=used.backend,
        prompt=prompt,
        steps=len(full.tokens),
        kept_entries=entries,
        kept_differing=differing,
        differences=differences,
        logit_error=error,
        logit_bound=bound,
        kept_fraction=sum(map(len, rows)) / (len(rows) * (prompt + len(full.tokens))),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        token_agreement=float(same.float().mean()),
        first_disagreement=None if bool(same.all()) else int((~same).nonzero()[0]),
        # A NaN is no agreement.
        ok=differing <= KEPT_TOLERANCE[dtype] * entries and error <= bound,
    )


def _differences(when: str, ours: Kept, theirs: Kept) -> list[Difference]:
    return [
        Difference(when, layer, head, tuple(sorted(want - got)), tuple(sorted(got - want)))
        for layer, (our_heads, their_heads) in enumerate(zip(ours, theirs, strict=True))
        for head, (got, want) in enumerate(zip(our_heads, their_heads, strict=True))
        if got != want
    ]


def _kept(cache: Any, model: Any) -> Kept:
    """The resident positions of every row; empty for the untouched model's own cache."""
    if not hasattr(cache, "positions"):
        return ()
    layers = model.config.get_text_config().num_hidden_layers
    return tuple(tuple(frozenset(head.tolist()) for head in cache.positions(layer)) for layer in range(layers))


def _last(out: Any) -> torch.Tensor:
    return out.logits[0, -1].detach().float().cpu()


def _dtype(model: Any) -> torch.dtype:
    dtype = next(model.parameters()).dtype
    if dtype not in LOGIT_TOLERANCE:
        raise KvCompileError(f"verify knows float32, float16 and bfloat16; this model is in {dtype}")
    return dtype


def _without(options: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != key}


def _line(difference: Difference) -> str:
    missing, extra = list(difference.missing[:6]), list(difference.extra[:6])
    place = f"  layer {difference.layer} head {difference.head} {difference.when}"
    return f"{place}: lacks {missing} ({len(difference.missing)}), has {extra} ({len(difference.extra)}) instead"
