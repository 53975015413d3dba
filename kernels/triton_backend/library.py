"""A policy's kernels as files, and as modules once one is to be launched.

Takes a plan, gives `KernelFile`s under the policy's cache folder. Rendering needs neither torch nor
Triton; `module()` imports the file, which needs both. On a GPU a launch's size chooses its constants
(`kernels/tuning.py`): a file with other constants stands beside the plain one, under a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kvcompile.kernels.choose import (
    decode_spec,
    evict_spec,
    pack_spec,
    prefill_spec,
    score_specs,
    select_spec,
    specs_for,
    state_spec,
)
from kvcompile.kernels.choose_listed import (
    listed_blocks,
    listed_decode,
    listed_marks,
    listed_piece,
    listed_specs,
    listed_units,
)
from kvcompile.kernels.gpus import Gpu, of_device
from kvcompile.kernels.headers import Sizes, header_for
from kvcompile.kernels.plan import PolicyPlan, Selection, StatePlan
from kvcompile.kernels.render import folder, load, render, write
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning import Chosen, config_for
from kvcompile.kernels.tuning_space import with_config
from kvcompile.kernels.tuning_store import Bucket


@dataclass(frozen=True, slots=True)
class KernelFile:
    """One generated kernel: what it is, where it lies, what it says."""

    spec: KernelSpec
    path: Path
    source: str

    def module(self) -> ModuleType:
        """The file, imported."""
        return load(self.path)


def write_kernels(plan: PolicyPlan, place: Path | None = None, sizes: Sizes | None = None) -> dict[str, KernelFile]:
    """Render every kernel of a policy into `place` (default: its cache folder): name -> file."""
    place = place or folder(plan.name, plan.digest)
    files = {}
    for spec in (*specs_for(plan), *listed_specs(plan)):
        source = render(spec, header_for(plan, spec, sizes or Sizes()))
        files[spec.name] = KernelFile(spec, write(source, place / f"{spec.name}.py"), source)
    return files


@dataclass(frozen=True, slots=True)
class At:
    """Where a kernel is launched (a torch device), the rows that it serves and the most entries of one."""

    device: Any
    rows: int
    tokens: int

    @property
    def gpu(self) -> Gpu | None:
        """None on the CPU, where the interpreter runs the plain files."""
        return _gpu(self.device) if self.device.type == "cuda" else None

    @property
    def bucket(self) -> Bucket:
        return Bucket.of(self.rows, self.tokens)


@cache
def _gpu(device: Any) -> Gpu:
    return of_device(device)


@dataclass(frozen=True, slots=True)
class Library:
    """The modules of a plan's kernels, found by what they are for.

    Raises `stages.Unprintable` where a formula has no Triton form: the caller takes the reference there.
    """

    plan: PolicyPlan
    files: tuple[tuple[KernelSpec, KernelFile], ...]

    def _file(self, spec: KernelSpec) -> KernelFile:
        return next(file for known, file in self.files if known.digest() == spec.digest())

    def _module(self, spec: KernelSpec, at: At | None) -> ModuleType:
        file, gpu = self._file(spec), at.gpu if at is not None else None
        if at is not None and gpu is not None:
            file, _ = _tuned(self.plan, file, gpu, at.bucket)
        return file.module()

    def decode(self, at: At | None = None) -> ModuleType:
        """Attention of a step. at: as in all of these, None for the plain file."""
        return self._module(decode_spec(self.plan), at)

    def prefill(self, at: At | None = None) -> ModuleType:
        """Attention of a piece."""
        return self._module(prefill_spec(self.plan), at)

    def listed_marks(self, at: At | None = None) -> ModuleType:
        """Landmarks of the units that reads ask for."""
        return self._module(listed_marks(self.plan), at)

    def listed_units(self, read: int, at: At | None = None) -> ModuleType:
        """What the queries of a step choose by a read, as spans."""
        return self._module(listed_units(self.plan, read), at)

    def listed_decode(self, at: At | None = None) -> ModuleType:
        """Attention of a step whose heads read spans, or all."""
        return self._module(listed_decode(self.plan), at)

    def listed_piece(self, read: int, at: At | None = None) -> ModuleType:
        """What the queries of a piece choose by a read, as lists of tiles and bits."""
        return self._module(listed_piece(self.plan, read), at)

    def listed_blocks(self, at: At | None = None) -> ModuleType:
        """Attention of a piece whose heads read lists of tiles, or all."""
        return self._module(listed_blocks(self.plan), at)

    def target(self, at: At, listed: bool = False) -> int | None:
        """Work units that a launch of `decode`, or of `listed_decode`, aims at; None leaves it to the file."""
        gpu = at.gpu
        if gpu is None:
            return None
        spec = listed_decode(self.plan) if listed else decode_spec(self.plan)
        _, chosen = _tuned(self.plan, self._file(spec), gpu, at.bucket)
        return None if chosen.source == "default" else dict(chosen.config)["units"] * gpu.multiprocessors

    def evict(self, cls: int, at: At | None = None) -> ModuleType:
        """What class `cls` drops after a step."""
        return self._module(evict_spec(self.plan, cls), at)

    def pack(self, at: At | None = None) -> ModuleType:
        """Survivors of a prefill into pages."""
        return self._module(pack_spec(self.plan), at)

    def select(self, cls: int, term: Selection, at: At | None = None) -> ModuleType:
        """Winners of a selection at a prefill."""
        return self._module(select_spec(self.plan, cls, term), at)

    def scores(self, term: Selection, at: At | None = None) -> tuple[tuple[str, ModuleType], ...]:
        """(template, module) of each stage of a prefill's score, in order; empty where it is a state."""
        return tuple((spec.template, self._module(spec, at)) for spec in score_specs(self.plan, term))

    def state(self, state: StatePlan, at: At | None = None) -> ModuleType | None:
        """What a prefill adds to a state."""
        spec = state_spec(self.plan, state)
        return None if spec is None else self._module(spec, at)


@cache
def _tuned(plan: PolicyPlan, file: KernelFile, gpu: Gpu, bucket: Bucket) -> tuple[KernelFile, Chosen]:
    """A file with the constants of a GPU and a size, looked up once in a process; itself where they are its own."""
    chosen = config_for(file.spec, gpu, bucket)
    made = with_config(file.spec, chosen.config)
    if made is file.spec:
        return file, chosen
    source = render(made, header_for(plan, made, Sizes(gpu=gpu)))
    return KernelFile(made, write(source, file.path.parent / f"{made.name}.py"), source), chosen


@cache
def library(plan: PolicyPlan) -> Library:
    """The plan's library, its files written once in a process."""
    return Library(plan, tuple((file.spec, file) for file in write_kernels(plan).values()))
