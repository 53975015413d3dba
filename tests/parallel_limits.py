"""Two processes under a limit that only the first of them meets: its heads keep all, those of the other a window.

`limited` runs in each process and gives what it saw, as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import kvcompile
from kvcompile import CacheFull
from tests.models import tokens
from tests.parallel import divided

HALVES = ((1, 1, 0, 0),) * 3
PROMPT, NEW = 40, 36


def limited(rank: int, folder: str, table: str) -> dict[str, Any]:
    """By layout, extents and pages."""
    model = divided(Path(folder))
    return {name: _met(model, table, name == "pages") for name in ("extents", "pages")}


def _met(model: Any, table: str, paged: bool) -> dict[str, Any]:
    def limit(most: int | None) -> None:
        options = {"n_sink": 2, "window": 8, "c": 512, "tables": {"retrieval": table}}
        kvcompile.optimize(model, "prulong", backend="reference", compile="off", max_bytes=most, **options)
        model._kvcompile.forward.engine.paged = paged

    ids = torch.tensor([tokens(PROMPT)])
    limit(None)
    whole = _generated(model, ids, NEW).sequences
    _generated(model, ids, 2)
    most = _largest(kvcompile.report(model).to_dict()["bytes_peak"])
    limit(most)
    step = _refused(lambda: _generated(model, ids, NEW))
    cache, sofar = step.pop("cache"), step.pop("sequences")
    step["seen"], step["rows"] = cache.get_seq_length(), _rows(cache)
    limit(10 * most)
    rest = _generated(model, sofar, PROMPT + NEW - sofar.shape[1], past_key_values=cache).sequences
    step["made"], step["goes on"] = sofar.shape[1], torch.equal(rest, whole)
    del cache
    limit(most)
    prefill = _refused(lambda: model(torch.tensor([tokens(120)])))
    prefill["seen"] = prefill.pop("cache").get_seq_length()
    cache = model(ids).past_key_values
    return {"step": step, "prefill": prefill, "select": _selected(model, cache, whole[:, PROMPT : PROMPT + 1])}


def _selected(model: Any, cache: Any, token: torch.Tensor) -> dict[str, Any]:
    """A sequence is repeated, and copied, without room in the first process; then with room."""
    limit = model._kvcompile.forward.engine.limit
    before = _rows(cache)
    limit.most = _largest(cache.store.bytes_allocated()) + 16384
    found = {"select": _refused(lambda: cache.select([0, 0])), "clone": _refused(cache.clone)}
    told = {name: error["said"] for name, error in found.items()}
    unchanged = cache.batch == 1 and _rows(cache) == before
    limit.most = None
    cache.select([0, 0])
    logits = model(token.expand(2, -1), past_key_values=cache).logits
    return {"told": told, "unchanged": unchanged, "top": logits[:, -1].argmax(-1).tolist()}


def _generated(model: Any, ids: torch.Tensor, new: int, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, return_dict_in_generate=True,
        **options,
    )  # fmt: skip


def _refused(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except CacheFull as error:
        return {"said": str(error), "cache": error.cache, "sequences": error.sequences}
    return {"said": "ran", "cache": None, "sequences": None}


def _rows(cache: Any) -> list[list[list[int]]]:
    return [[head.tolist() for head in cache.positions(layer)] for layer in range(3)]


def _largest(number: int) -> int:
    """The largest of all processes."""
    found = torch.tensor([number])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
