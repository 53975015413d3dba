"""A model's own rotary embedding as a table of places, found and tried out before a policy relies on it.

Takes a Hugging Face decoder and its attention sites, gives `RopeTable`: float32 [2, places, head_dim] for
`kernels.rotary`. Guarantees that every attention of the model turns queries and keys exactly as the table does;
a model of which that is not so is refused with PolicyError K706 and the reason. `angles_upto`: pieces of a prompt under
angles that follow from its length.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvcompile.dsl.diagnostics import PolicyError, fail, outside
from kvcompile.kernels.rotary import rotate
from kvcompile.passes.sites import AttentionSite

LEAST = 256  # places that a table starts with
TRIED = (0, 1, 2, 5, 17, 100, LEAST - 1)  # places at which each attention is tried


class RopeTable:
    """Cosine and sine of every place, as the model computes them but for its attention scaling.

    That factor, cosine at place 0, stays in the queries and keys which the model makes at position 0.
    """

    def __init__(self, model: nn.Module, sites: tuple[AttentionSite, ...]) -> None:
        self.rotary = _rotary_of(model)
        self.table = torch.zeros(2, 0, 0)
        # One angle for each pair of channels: the second half of the channels has those of the first.
        self.paired = 2 * self._width() == getattr(sites[0].attention, "head_dim", 0)
        with torch.no_grad():
            width = self.upto(LEAST).shape[2]
            for site in sites:
                self._try(site, width)

    def upto(self, places: int) -> Tensor:
        """The table, float32 [2, at least `places`, head_dim], where the model is; grows by doubling."""
        device = self.rotary.inv_freq.device
        if self.table.shape[1] < places or self.table.device != device:
            size = max(LEAST, 1 << (places - 1).bit_length())
            with torch.no_grad():
                cos, sin = _angles(self.rotary, torch.arange(size, device=device), torch.float32)
            if bool((sin[0, 0] != 0).any()) or bool((cos[0, 0] != cos[0, 0, 0]).any()) or not float(cos[0, 0, 0]):
                raise _refusal("its rotary embedding turns position 0, too")
            table = torch.stack([cos[0], sin[0]]) / cos[0, 0, 0]
            self.table = torch.cat([table, table], -1) if self.paired else table
        return self.table

    def _width(self) -> int:
        with torch.no_grad():
            place = torch.zeros(1, dtype=torch.int64, device=self.rotary.inv_freq.device)
            return _angles(self.rotary, place, torch.float32)[0].shape[2]

    def _try(self, site: AttentionSite, width: int) -> None:
        """Random tokens through one attention, at position 0 and at others: the table must make up the difference."""
        weight = next(site.attention.parameters())
        generator = torch.Generator().manual_seed(0)
        size = int(site.attention.config.hidden_size)  # type: ignore[union-attr, arg-type]
        hidden = torch.randn(1, len(TRIED), size, generator=generator).to(weight.device, weight.dtype)
        place = torch.tensor(TRIED, device=weight.device)
        still, turned = (self._asked(site, hidden, at) for at in (torch.zeros_like(place), place))
        for name, a, b in zip(("queries", "keys"), still, turned, strict=True):
            if a.shape[-1] != width:
                raise _refusal(f"{site.name} turns {width} of {a.shape[-1]} channels")
            off = (rotate(a.float(), place, self.table) - b.float()).abs().max()
            if not float(off) <= max(8 * torch.finfo(weight.dtype).eps, 1e-5) * float(b.abs().max()):
                if self.paired:
                    raise _refusal(f"{site.name} turns {width // 2} of {width} channels")
                raise _refusal(f"{site.name} does not turn its {name} as Llama does, channel c with c + {width // 2}")

    def _asked(self, site: AttentionSite, hidden: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [1, heads, n, head_dim] that an attention makes of hidden states at these positions."""
        attention: Any = site.attention
        caught: list[tuple[Tensor, Tensor]] = []
        before = attention.config
        attention.config = copy.deepcopy(before)
        attention.config._attn_implementation = _CATCH
        try:
            angles = _angles(self.rotary, place, hidden.dtype)
            attention(hidden_states=hidden, position_embeddings=angles, attention_mask=None, kvc_caught=caught)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise _refusal(f"{site.name} could not be tried out: {error}") from error
        finally:
            attention.config = before
        if len(caught) != 1:
            raise _refusal(f"{site.name} does not hand its queries and keys on as transformers' own models do")
        return caught[0]


def _angles(rotary: Any, place: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [1, n, channels] of positions int64 [n], computed by the model."""
    found = rotary(torch.zeros(1, dtype=dtype, device=place.device), place[None])
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(t, Tensor) and t.ndim == 3 for t in found)):
        raise _refusal("its rotary embedding does not give a cosine and a sine per channel")
    return found


def _rotary_of(model: nn.Module) -> Any:
    """The one rotary embedding of a model; PolicyError where there is none, more, or one that depends on lengths."""
    if any(isinstance(getattr(m, "rope_type", None), dict) for m in model.modules()):
        raise _refusal(f"{type(model).__name__} has another rotary embedding by kind of layer")
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if not found:
        raise _refusal(f"{type(model).__name__} has no rotary embedding")
    kind = getattr(found[0], "rope_type", "default")
    if len(found) > 1:
        raise _refusal(f"{type(model).__name__} has several rotary embeddings")
    if _by_length(kind):
        raise _refusal(f"the angles of its rotary embedding change with the length of the prompt (rope_type {kind!r})")
    return found[0]


def _by_length(kind: object) -> bool:
    """Whether the angles of a `rope_type`, or of one of several by kind of layer, follow from the largest position."""
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds)


@contextlib.contextmanager
def angles_upto(model: nn.Module, last: int) -> Iterator[None]:
    """A block in which angles that follow from the largest position of a forward follow from `last` where that is
    larger: the pieces of a prompt are then turned as the whole prompt would be."""
    rotaries: list[Any] = [m for m in model.modules() if _by_length(getattr(m, "rope_type", None))]
    before = [vars(rotary).get("forward") for rotary in rotaries]
    try:
        for rotary in rotaries:
            rotary.forward = functools.partial(_with_last, rotary.forward, last)
        yield
    finally:
        for rotary, own in zip(rotaries, before, strict=True):
            vars(rotary).pop("forward", None)
            if own is not None:
                rotary.forward = own


def _with_last(plain: Any, last: int, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    cos, sin = plain(x, torch.nn.functional.pad(position_ids, (0, 1), value=last), *args, **kwargs)
    return cos[:, :-1], sin[:, :-1]


def _refusal(reason: str) -> PolicyError:
    return fail(
        "K706", f"`positions compact` and `raw.k` need keys that can be turned back and forth; {reason}",
        outside("<policy>"), "keep original positions, and score by `k`",
    )  # fmt: skip


def _catch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention that notes what it is given; its output has the right shape and no meaning."""
    caught = kwargs.get("kvc_caught")
    if caught is not None:
        caught.append((query, key))
    return torch.zeros_like(query).transpose(1, 2), None


_CATCH = "kvcompile_rotary_trial"
AttentionInterface.register(_CATCH, _catch)
