"""Head scores as files: what a training, a probe or a quick look says of each KV head, and the masks made of it.

Takes numbers by layer and KV head; gives files in the published layout (tab-separated text) or safetensors with where
they come from, and reads both back. Guarantees: a mask has exactly `int(keep * heads)` heads, computed in whole
numbers, ties to the lower layer, then the lower head; a file is replaced in one step or left as it was.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.checkpoints import replace_file
from kvcompile.passes.masks import PROVENANCE, Table, read_masks
from kvcompile.passes.tables import best, read_bytes, read_table

if TYPE_CHECKING:
    from kvcompile.passes.learning import DistilPlan, LearnPlan

FORMAT, VERSION = "kvcompile head scores", 1

_PART = re.compile(r"([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})(e-[0-9]{1,2}|/[0-9]{1,20})?(%?)", re.ASCII)

Head = tuple[int, int]  # layer, KV head


@dataclass(frozen=True)
class HeadScores:
    """One number per layer and KV head; a higher one is kept first.

    values: [layer][KV head], finite. provenance: JSON values by name, see `provenance`; empty where nobody knows.
    """

    values: Table
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.values}
        if len(lengths) != 1 or 0 in lengths:
            raise KvCompileError(
                f"head scores need layers with the same number of KV heads, not {sorted(lengths) or 'no layer'}"
            )
        odd = [(i, j) for i, row in enumerate(self.values) for j, value in enumerate(row) if not math.isfinite(value)]
        if odd:
            layer, head = odd[0]
            raise KvCompileError(f"the score of layer {layer}, KV head {head} is {self.values[layer][head]}: no number")

    @property
    def heads(self) -> int:
        """KV heads of all layers together."""
        return len(self.values) * len(self.values[0])

    def chosen(self, keep: Fraction | float | str) -> frozenset[Head]:
        """The (layer, KV head) pairs that stay whole: exactly `int(keep * heads)` of them."""
        return best(self.values, part_of(keep))

    def mask(self, keep: Fraction | float | str) -> Table:
        """1.0 for the chosen heads, 0.0 for the others."""
        chosen = self.chosen(keep)
        return tuple(
            tuple(float((layer, head) in chosen) for head in range(len(row))) for layer, row in enumerate(self.values)
        )

    def save(self, path: str | os.PathLike[str], keep: Fraction | float | str | None = None) -> Path:
        """Write a file, by the end of its name.

        `.tsv`: a line per layer, tab-separated: 0.0 and 1.0 where `keep` is given, as the published masks, else the
        scores to their last digit. `.safetensors`: tensors `scores`, float32, and, with `keep`, `mask`, uint8 0 and 1,
        both [layers, KV heads], and the provenance. Returns the path; KvCompileError where it cannot be written.
        """
        target = Path(path)
        part = None if keep is None else part_of(keep)
        if target.suffix == ".tsv":
            data = _text(self.values if part is None else self.mask(part)).encode()
        elif target.suffix == ".safetensors":
            data = self._tensors(part)
        else:
            raise KvCompileError(f"cannot save head scores as {target.name!r}: name a file that ends in .tsv, the "
                                 "published layout, or in .safetensors")  # fmt: skip
        write(target, data)
        return target

    def _tensors(self, part: Fraction | None) -> bytes:
        import torch
        from safetensors.torch import save

        scores = torch.tensor(self.values, dtype=torch.float32)
        if not bool(scores.isfinite().all()):
            raise KvCompileError("these scores are too large for float32: save them as .tsv")
        tensors = {"scores": scores}
        told = {"format": FORMAT, "version": VERSION, **self.provenance}
        if part is not None:
            tensors["mask"] = torch.tensor(self.mask(part), dtype=torch.uint8)
            told["keep"] = str(part)
        # One entry only: several would be written in an order of chance, and equal scores in unequal bytes.
        return save(tensors, {PROVENANCE: json.dumps(told, sort_keys=True)})


def load_scores(path: str | os.PathLike[str], shape: tuple[int, int] | None = None) -> HeadScores:
    """Head scores of either layout; text has no provenance. PolicyError for what is wrong.

    shape: layers and KV heads of the model that they must fit; None: any.
    """
    source, (layers, heads) = Path(path), shape or (None, None)
    if source.suffix == ".safetensors":
        found = read_masks(source, read_bytes(source), layers, heads)
        return HeadScores(found.scores, dict(found.provenance))
    return HeadScores(read_table(source, layers, heads))


def part_of(keep: Fraction | float | str) -> Fraction:
    """A part of the heads, exactly: a float as it is written (0.3 is 3/10), text such as `30%`, `0.3` or `3/10`.

    KvCompileError for what is no part between 0 and 1.
    """
    part = keep if isinstance(keep, Fraction) else _parsed(str(keep).strip())
    if part is None or not 0 <= part <= 1:
        raise KvCompileError(f"{str(keep)[:40]!r} is no part of the heads: give one from 0 to 1, such as 0.3 or 30%")
    return part


def _parsed(text: str) -> Fraction | None:
    found = _PART.fullmatch(text)
    if found is None:
        return None
    try:
        return Fraction(text.removesuffix("%")) / (100 if found[4] else 1)
    except (ValueError, ZeroDivisionError):
        return None


def provenance(
    model: Any,
    plan: LearnPlan | DistilPlan | None = None,
    *,
    method: str,
    data: str,
    steps: int = 0,
    seed: int = 0,
    metrics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Where scores come from, as JSON values: what safetensors files say of themselves.

    method: `learn`, `quick` or the probe; data: what the model was shown; plan: whose sets were compared, if any;
    metrics: how it ended.
    """
    from importlib.metadata import version

    import kvcompile

    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model_name(model),
        "method": method,
        "data": data,
        "policy": plan.policy if plan else "",
        "heads": plan.heads if plan else "",
        "digest": plan.digest if plan else "",
        "gate": plan.kind if plan else "",
        "steps": steps,
        "seed": seed,
        "keep": str(plan.keep) if plan and plan.keep is not None else None,
        "metrics": metrics or {},
        "versions": {"kvcompile": kvcompile.__version__} | {name: version(name) for name in ("torch", "transformers")},
    }


def model_name(model: Any) -> str:
    """What a model is called, without the folders of this machine."""
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) or name.startswith(".") else name


def _text(table: Table) -> str:
    return "".join("\t".join(repr(float(value)) for value in row) + "\n" for row in table)


def write(target: Path, data: bytes) -> None:
    parent = target.parent
    if not parent.is_dir():
        raise KvCompileError(f"cannot write {target}: {parent} is no folder; make it first, or name another")
    try:
        replace_file(target, data)
    except OSError as error:
        why = error.strerror or str(error)
        raise KvCompileError(f"cannot write {target}: {why}; check the name and its rights") from None
