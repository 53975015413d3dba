"""Mixed attention: inside `mixed`, a model's layers add up two attentions, weighed by a gate for each KV head.

Takes a Hugging Face decoder, its sites and a learn plan; gives a `Mix` to call with tokens and gates. Guarantees:
memory linear in the text's length, gates reach a layer as data (one compiled layer serves all), the model is left as it
was: configuration, forwards, modes, which weights want gradients. An optimised model runs without its policy.
Sources: PruLong (arXiv 2506.17121), DuoAttention (2410.10819): out = z * full + (1 - z) * local, before o_proj.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from kvcompile.compiled import LayerForward, mark_lengths, shared_callable
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan
from kvcompile.kernels.readable import Reads, by_place, check_readable, last_readers, reads
from kvcompile.passes.sites import AttentionSite
from kvcompile.probe import attending_by, refuse_variants

if TYPE_CHECKING:
    from kvcompile.passes.learning import LearnPlan

_ATTENTION = "kvcompile_mix"

Backend = Callable[..., Any]  # of torch.compile


class LayerMix(NamedTuple):
    """What one layer's attention is handed: z float32 [batch or 1, kv_heads]; what the two sets read, None for all.

    taught: the teacher's attention to the full set, [batch, q_heads, n, D], which stands for the student's own. lesson:
    where the teacher leaves it, while it runs; its own attention reads all.
    """

    z: Tensor
    local: Reads | None
    full: Reads | None
    taught: Tensor | None = None
    lesson: list[Tensor] | None = None


class Hidden(NamedTuple):
    """Hidden states after the final norm, [batch, tokens, hidden], in the model's dtype; teacher: None without one."""

    student: Tensor
    teacher: Tensor | None


class Mix:
    """Runs the model with mixed attention; made by `mixed`, and of use only inside it."""

    def __init__(self, model: Any, plan: LearnPlan) -> None:
        self.model, self.plan = model, plan
        self.open = True
        self._reads: dict[tuple[str, int], list[Reads | None]] = {}

    def __call__(self, input_ids: Tensor, z: Tensor, padding: Tensor | None = None) -> Hidden:
        """input_ids int64 [batch, tokens]; z float32 [layers, kv_heads], or [batch, layers, kv_heads] for gates of each
        sequence's own.

        padding: bool [batch, tokens], False where there is no token. Rows are filled up on their right: then causal
        attention never reads what fills them, and what comes of it is void. KvCompileError for anything else.
        """
        facts = self.plan.plan.facts
        if not self.open:
            raise KvCompileError("mixed attention has ended with its `with` block: call it inside")
        own = z[None] if z.dim() == 2 else z
        if own.shape[0] not in (1, len(input_ids)) or tuple(own.shape[1:]) != (facts.layers, facts.kv_heads):
            raise KvCompileError(
                f"gates of shape {list(z.shape)} for {len(input_ids)} sequences, {facts.layers} layers with "
                f"{facts.kv_heads} KV heads each"
            )
        if padding is not None and bool((padding[:, 1:].bool() & ~padding[:, :-1].bool()).any()):
            raise KvCompileError("mixed attention takes rows that are padded on the right; these are padded elsewhere")
        total = input_ids.shape[1]
        local, full = (self._of(cls, total, input_ids.device) for cls in (self.plan.local, self.plan.full))
        parts = zip(own.unbind(1), local, full, strict=True)
        layers = [LayerMix(gate, near, far) for gate, near, far in parts]
        if not self.plan.two_way:
            return Hidden(self._run(input_ids, layers), None)
        # Two forwards, where the published code has one of both: nothing of a teacher is kept for the backward pass.
        lessons: list[list[Tensor]] = [[] for _ in layers]
        with torch.no_grad():
            heard = [part._replace(lesson=lesson) for part, lesson in zip(layers, lessons, strict=True)]
            teacher = self._run(input_ids, heard)
        taught = [part._replace(taught=far) for part, (far,) in zip(layers, lessons, strict=True)]
        return Hidden(self._run(input_ids, taught), teacher)

    def _run(self, input_ids: Tensor, layers: list[LayerMix]) -> Tensor:
        hidden: Tensor = self.model.base_model(input_ids=input_ids, use_cache=False, kvc_mix=layers).last_hidden_state
        return hidden

    def _of(self, cls: ClassPlan, total: int, device: torch.device) -> list[Reads | None]:
        """What a class reads in each layer, worked out once per length."""
        key = (cls.name, total)
        if key not in self._reads:
            if len(self._reads) >= 4:  # texts of many lengths: the latest two of each class
                del self._reads[next(iter(self._reads))]
            self._reads[key] = reads_of(self.plan, cls, total, device)
        return self._reads[key]


def reads_of(plan: LearnPlan, cls: ClassPlan, total: int, device: torch.device) -> list[Reads | None]:
    """What each layer reads under a class's set in a text of `total` tokens; None where that is all of it."""
    facts = plan.plan.facts
    if not by_place(cls):
        last = last_readers(plan.plan, cls, 0, 0, total)[None].to(device)
        everything = bool((last == total - 1).all())
        return [None if everything else reads(last)] * facts.layers
    each = [
        last_readers(plan.plan, cls, layer, h, total) for layer in range(facts.layers) for h in range(facts.kv_heads)
    ]
    every = reads(torch.stack(each).to(device))
    parts = zip(*(part.split(facts.kv_heads) for part in every), strict=True)
    return [Reads(columns, mask) for columns, mask in parts]


@contextlib.contextmanager
def mixed(
    model: Any, sites: tuple[AttentionSite, ...], learn_plan: LearnPlan, *, compile: str | Backend = "off"
) -> Iterator[Mix]:
    """The model with mixed attention, its weights frozen, in eval mode, until the block ends.

    compile: "off", or a backend of torch.compile, by which each kind of decoder layer is compiled once, and once more
    for a teacher. Gradient checkpointing is on where the model has it on, layer by layer. KvCompileError for policies
    and models that it cannot be: renumbered positions, sets that follow from the text, sliding windows, soft caps,
    attention sinks.
    """
    plan = learn_plan.plan
    for cls in (learn_plan.full, learn_plan.local):
        check_readable(plan, cls)
    if plan.compact:
        raise KvCompileError(
            f"policy {plan.name!r} renumbers positions, so keys differ between the two sets: learn its heads with "
            "`positions original`"
        )
    if plan.off:
        raise KvCompileError(f"policy {plan.name} has layers that are off, under which heads cannot be learned yet")
    has = {
        "sliding windows": any(plan.facts.windows),
        "soft-capped logits": plan.facts.softcap,
        "sinks": plan.facts.sinks,
    }
    for what in (name for name, there in has.items() if there):
        raise KvCompileError(f"the model's attention has {what}, under which heads cannot be learned yet")
    if len(sites) != plan.facts.layers:
        raise KvCompileError(f"{len(sites)} attention layers for a policy that was bound to {plan.facts.layers}")
    if any(isinstance(site.layer.forward, _MixedForward) for site in sites):
        raise KvCompileError("this model's heads are being learned already: end that `with` block first")
    mix = Mix(model, learn_plan)
    before = {site.layer: vars(site.layer).get("forward") for site in sites}
    modes = {module: module.training for module in model.modules()}
    wanted = {weight: weight.requires_grad for weight in model.parameters()}
    shared: dict[type[nn.Module], Callable[..., Any]] = {}
    try:
        with attending_by(model, _ATTENTION):
            model.eval()
            for weight in wanted:
                weight.requires_grad_(False)
            for site in sites:
                site.layer.forward = _MixedForward(site, compile, shared)
            yield mix
    finally:
        mix.open = False
        for layer, own in before.items():
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own
        for module, mode in modes.items():
            module.training = mode
        for weight, wants in wanted.items():
            weight.requires_grad_(wants)


class _MixedForward:
    """Stands in a decoder layer's `forward`; picks the layer's own part out of what the model was handed."""

    def __init__(
        self, site: AttentionSite, compile: str | Backend, shared: dict[type[nn.Module], Callable[..., Any]]
    ) -> None:
        layer, self.index = site.layer, site.index
        plain = layer.forward.plain if isinstance(layer.forward, LayerForward) else layer.forward
        self.run: Callable[..., Any] = plain
        # A forward that someone else has put there does more than the class's own, so it runs as it is.
        if compile != "off" and getattr(plain, "__func__", None) is type(layer).forward:
            self.run = self._compiled(layer, compile, shared)
        # Ours instead of transformers': theirs asks for training mode, may be one that loses the gates' gradient, and
        # would stand inside of what is compiled.
        self.again = bool(getattr(layer, "gradient_checkpointing", False))

    @staticmethod
    def _compiled(
        layer: nn.Module, backend: str | Backend, shared: dict[type[nn.Module], Callable[..., Any]]
    ) -> Callable[..., Any]:
        run = shared.setdefault(type(layer), shared_callable("mix", type(layer), backend))

        def compiled(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden.requires_grad != torch.is_grad_enabled():
                # The first layer's input has no gradient to give, or one that nobody asks for; a graph of its own
                # would cost more.
                hidden = hidden.detach().requires_grad_(torch.is_grad_enabled())
            mark_lengths(hidden, kwargs)
            part: LayerMix = kwargs["kvc_mix"]
            if part.taught is not None:
                torch._dynamo.maybe_mark_dynamic(part.taught, 2)
            for where in (part.local, part.full):
                if where is not None:
                    for tensor, sizes in ((where.columns, (1, 2)), (where.mask, (1, 2, 3))):
                        for size in sizes:
                            torch._dynamo.maybe_mark_dynamic(tensor, size)
            return run(layer, hidden, *args, **kwargs)

        return compiled

    def __call__(self, *args: Any, kvc_mix: list[LayerMix] | None = None, **kwargs: Any) -> Any:
        part = None if kvc_mix is None else kvc_mix[self.index]
        if self.again and torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, kvc_mix=part, **kwargs)
        return self.run(*args, kvc_mix=part, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    kvc_mix: LayerMix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Returns [batch, n, q_heads, head_dim]."""
    if kvc_mix is None:
        raise KvCompileError("this attention stands in a model only while its head classes are learned")
    refuse_variants(module, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kvc_mix.lesson is not None:
        out = attend(query, key, value, None, scale)
        kvc_mix.lesson.append(out if kvc_mix.full is None else attend(query, key, value, kvc_mix.full, scale))
        return out.transpose(1, 2), None
    far = attend(query, key, value, kvc_mix.full, scale) if kvc_mix.taught is None else kvc_mix.taught
    near = attend(query, key, value, kvc_mix.local, scale)
    return _added(kvc_mix.z, far, near).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


def _added(z: Tensor, full: Tensor, local: Tensor) -> Tensor:
    """z * full + (1 - z) * local, [B, q_heads, n, D], for z [B or 1, kv_heads]: in float32, so that a bf16 model does
    not round the gates."""
    weight = z.float().repeat_interleave(full.shape[1] // z.shape[1], 1)[:, :, None, None]
    return (weight * full + (1 - weight) * local).to(full.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, where: Reads | None, scale: float) -> Tensor:
    """Causal attention to what `where` says, None for all: q [B, q_heads, n, D], k, v [B, kv_heads, n, D]; as q.

    Memory for what blocks of queries read, about twice the set's size for each query's place.
    """
    if where is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    (batch, heads, n, _), kv_heads = q.shape, k.shape[1]
    rows, blocks, size, width = where.mask.shape
    # Blocks stand where batches do, sequences and heads together, so that one mask serves all that share it.
    asked = F.pad(q, (0, 0, 0, blocks * size - n)).unflatten(2, (blocks, size)).permute(2, 0, 1, 3, 4).flatten(1, 2)

    def near(x: Tensor) -> Tensor:
        if rows == 1:
            found = x.index_select(2, where.columns.flatten())
        else:
            found = x.gather(2, where.columns.flatten(1)[None, :, :, None].expand(batch, kv_heads, -1, x.shape[-1]))
        found = found.unflatten(2, (blocks, width)).repeat_interleave(heads // kv_heads, 1)
        return found.permute(2, 0, 1, 3, 4).flatten(1, 2)

    mask = where.mask.transpose(0, 1)
    if rows > 1:
        mask = mask.repeat_interleave(heads // kv_heads, 1).repeat(1, batch, 1, 1)
    out = F.scaled_dot_product_attention(asked, near(k), near(v), attn_mask=mask, scale=scale)
    return out.unflatten(1, (batch, heads)).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :n]
