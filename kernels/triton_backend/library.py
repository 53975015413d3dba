"""A policy's kernels as files, and as modules once one is to be launched.

Takes a plan, gives `KernelFile`s under the policy's cache folder. Rendering needs neither torch nor
Triton; `module()` imports the file, which needs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from kvcompile.kernels.choose import decode_spec, evict_spec, pack_spec, score_specs, select_spec, specs_for, state_spec
from kvcompile.kernels.headers import Sizes, header_for
from kvcompile.kernels.plan import PolicyPlan, Selection, StatePlan
from kvcompile.kernels.render import folder, load, render, write
from kvcompile.kernels.spec import KernelSpec


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
    for spec in specs_for(plan):
        source = render(spec, header_for(plan, spec, sizes or Sizes()))
        files[spec.name] = KernelFile(spec, write(source, place / f"{spec.name}.py"), source)
    return files


@dataclass(frozen=True, slots=True)
class Library:
    """The modules of a plan's kernels, found by what they are for.

    Raises `stages.Unprintable` where a formula has no Triton form: the caller takes the reference there.
    """

    plan: PolicyPlan
    files: tuple[tuple[KernelSpec, KernelFile], ...]

    def _module(self, spec: KernelSpec) -> ModuleType:
        same = (file for known, file in self.files if known.digest() == spec.digest())
        return next(same).module()

    def decode(self) -> ModuleType:
        """Attention of a step."""
        return self._module(decode_spec(self.plan))

    def evict(self, cls: int) -> ModuleType:
        """What class `cls` drops after a step."""
        return self._module(evict_spec(self.plan, cls))

    def pack(self) -> ModuleType:
        """Survivors of a prefill into pages."""
        return self._module(pack_spec(self.plan))

    def select(self, cls: int, term: Selection) -> ModuleType:
        """Winners of a selection at a prefill."""
        return self._module(select_spec(self.plan, cls, term))

    def scores(self, term: Selection) -> tuple[tuple[str, ModuleType], ...]:
        """(template, module) of each stage of a prefill's score, in order; empty where it is a state."""
        return tuple((spec.template, self._module(spec)) for spec in score_specs(self.plan, term))

    def state(self, state: StatePlan) -> ModuleType | None:
        """What a prefill adds to a state."""
        spec = state_spec(self.plan, state)
        return None if spec is None else self._module(spec)


@cache
def library(plan: PolicyPlan) -> Library:
    """The plan's library, its files written once in a process."""
    return Library(plan, tuple((file.spec, file) for file in write_kernels(plan).values()))
