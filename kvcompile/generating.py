"""generate() of an optimised model: what it can do goes on to transformers, what it cannot is refused by name.

Takes what transformers' generate() takes. Guarantees: everything that is refused is refused before anything runs, with
the reason and the way out; docs/generating.md has the table.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NoReturn

from torch import Tensor, nn

from kvcompile.drafting import drafting, why_not
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.telling import saying

_REMOTE = "transformers runs it only as code from a remote repository, which"
_REFUSED = {
    "dola_layers": f"DoLa is not supported: {_REMOTE} reads attention layer by layer",
    "constraints": f"constrained beam search is not supported: {_REMOTE} has not been tried with an evicting cache",
    "force_words_ids": f"constrained beam search is not supported: {_REMOTE} has not been tried with an evicting cache",
    "use_mtp": "assisted decoding with the model's own draft heads (use_mtp) is not supported: they keep a cache that "
    "no policy governs; use assistant_model or prompt_lookup_num_tokens",
    "assistant_early_exit": "assisted decoding with early exit is not supported: the model would run with fewer layers "
    "than its policy was compiled for; use assistant_model or prompt_lookup_num_tokens",
}


CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def refuse_continuous(*args: Any, **kwargs: Any) -> NoReturn:
    """What stands in place of transformers' own continuous batching, whose pages hold all KV heads of a token."""
    raise KvCompileError(
        "transformers' continuous batching is not supported: its pages hold all KV heads of a token, so no head could "
        "keep entries of its own. Put sequences into one cache with KvCache.join and cache.select, or restore the model"
    )


def checked_generate(model: nn.Module, plan: PolicyPlan) -> Any:
    """What stands in the model's `generate`."""
    original = model.generate

    @functools.wraps(original)  # type: ignore[arg-type]
    def generate(*args: Any, spans: Any = None, **kwargs: Any) -> Any:
        if spans is not None:  # transformers would not know the argument
            _refuse_with_spans(plan, args, kwargs, model)
            with saying(model, spans):
                return generate(*args, **kwargs)
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config

        def option(key: str) -> Any:
            return kwargs.get(key) if kwargs.get(key) is not None else getattr(given, key, None)

        _refuse(option)
        if option("prefill_chunk_size"):
            _take_chunks(plan, int(option("prefill_chunk_size")))
            if plan.chunk is not None:  # the policy's own pieces, which are cut inside of one forward
                args, kwargs = _without_chunks(args, kwargs, given)
        if getattr(given, "is_assistant", False):
            _refuse_drafts(plan, "as the assistant of another model")
            with drafting(model, None):
                return original(*args, **kwargs)  # type: ignore[operator]
        if kwargs.get("assistant_model") is not None or option("prompt_lookup_num_tokens"):
            _refuse_drafts(plan, "with assisted decoding")
            past = kwargs.get("past_key_values")
            if past is not None and past.get_seq_length() > 0:
                raise KvCompileError(
                    "assisted decoding cannot go on from a filled cache: transformers feeds the whole prompt in its "
                    "first forward; generate without an assistant, or without past_key_values"
                )
            with drafting(model, _prompt_columns(args, kwargs)):
                return original(*args, **kwargs)  # type: ignore[operator]
        return original(*args, **kwargs)  # type: ignore[operator]

    return generate


def _refuse_with_spans(plan: PolicyPlan, args: tuple[Any, ...], kwargs: dict[str, Any], model: Any) -> None:
    """What stretches of a prompt do not go with, since they are of one prompt that runs in one forward."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    lookup = kwargs.get("prompt_lookup_num_tokens") or getattr(given, "prompt_lookup_num_tokens", None)
    if kwargs.get("assistant_model") is not None or lookup:
        raise KvCompileError("spans= is not supported with assisted decoding: leave the assistant out")
    if (kwargs.get("prefill_chunk_size") or getattr(given, "prefill_chunk_size", None)) and plan.chunk is None:
        raise KvCompileError(
            "spans= is not supported with prefill_chunk_size, which makes a prompt of each piece: write `at chunk(n)` "
            "in the policy, it cuts the prompt"
        )


def _refuse(option: Any) -> None:
    if option("use_cache") is False:
        raise KvCompileError("use_cache=False contradicts a cache policy: restore the model to run without a cache")
    if option("cache_implementation"):
        raise KvCompileError(
            f"cache_implementation={option('cache_implementation')!r} contradicts the policy's own cache"
        )
    if option("penalty_alpha"):
        raise KvCompileError(
            f"contrastive search is not supported: {_REMOTE} runs several futures of one cache side by side"
        )
    if (option("num_beam_groups") or 1) > 1:
        raise KvCompileError(
            f"group beam search is not supported: {_REMOTE} has not been tried with an evicting cache; plain beams are"
        )
    for key, reason in _REFUSED.items():
        if option(key) is not None and option(key) is not False:
            raise KvCompileError(reason)


def _refuse_drafts(plan: PolicyPlan, how: str) -> None:
    reason = why_not(plan)
    if reason:
        raise KvCompileError(
            f"a model under this policy cannot run {how}: rejected tokens would have to be taken back, and {reason}. "
            "Policies that decide only at prefill.end or at chunk(n) can (keep_all, snapkv, pyramidkv, adakv)"
        )


def _take_chunks(plan: PolicyPlan, size: int) -> None:
    """Prompts in pieces of `size` tokens, each a forward of its own: only where the policy means the same by it."""
    if plan.chunk == size or (plan.chunk is None and all(c.keeps_all for c in plan.classes)):
        return
    own = f"cuts prompts into pieces of {plan.chunk}" if plan.chunk else "takes a prompt as one piece"
    raise KvCompileError(
        f"prefill_chunk_size={size} is not supported: {plan.name} {own}, and each piece would be a prompt to it; "
        "write `at chunk(n)` in the policy, it cuts the prompt"
    )


def _without_chunks(
    args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same request without prefill_chunk_size, wherever it was given."""
    kwargs = {key: value for key, value in kwargs.items() if key != "prefill_chunk_size"}
    if getattr(given, "prefill_chunk_size", None) is None:
        return args, kwargs
    config = copy.deepcopy(given)
    config.prefill_chunk_size = None
    if len(args) > 1:
        return (args[0], config, *args[2:]), kwargs
    return args, kwargs | {"generation_config": config}


def _prompt_columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Columns of the prompt, after which an assisted decoding's first forward has candidates."""
    named = [kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds")]
    for tensor in (*named, *args[:1]):
        if isinstance(tensor, Tensor):
            return int(tensor.shape[1])
    return 1  # without a prompt generate() starts from one token
