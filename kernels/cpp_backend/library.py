"""A policy's C++ kernels: as files beside the Triton ones, and as functions once one is to be called.

Takes a plan, gives source files and loaded libraries. What has no C++ form, or cannot be built here, has no function:
its caller takes packed SDPA. Guarantees: a kernel that cannot be built is named once, with the compiler's words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from kvcompile.kernels import cache_folder
from kvcompile.kernels.choose import project_spec, specs_for
from kvcompile.kernels.choose_reads import read_specs
from kvcompile.kernels.contexts_cpp import context
from kvcompile.kernels.cpp_backend.build import NoUsableCompiler, build_all, load, tell
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.headers import Sizes, header_for
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.render import folder, render, write
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.stages import Unprintable

Make = Callable[..., KernelSpec | tuple[KernelSpec, ...] | None]


@dataclass(frozen=True, slots=True)
class CppFile:
    """One generated kernel for the CPU: what it is, where it lies, what it says."""

    spec: KernelSpec
    path: Path
    source: str


def write_cpp(plan: PolicyPlan, place: Path | None = None, sizes: Sizes | None = None) -> dict[str, CppFile]:
    """Render every kernel of a policy that has a C++ form into `place` (default: its cache folder): name -> file."""
    place = place or folder(plan.name, plan.digest)
    files = {}
    for spec in _specs(plan):
        try:
            source = render(spec, header_for(plan, spec, sizes or Sizes(), "cpp"), "cpp")
        except Unprintable:
            continue
        files[spec.cpp_name] = CppFile(spec, write(source, place / f"{spec.cpp_name}.cpp"), source)
    return files


def _specs(plan: PolicyPlan) -> tuple[KernelSpec, ...]:
    return tuple(dict.fromkeys([*specs_for(plan), *read_specs(plan), project_spec(plan)]))


def built() -> Path:
    """Where libraries lie, for all policies: kernels of the same text are one."""
    return cache_folder.root() / "built"


def cpp_names(plan: PolicyPlan) -> tuple[str, ...]:
    """The names of a plan's C++ kernels, in the order of `specs_for`; nothing is written."""
    return tuple(spec.cpp_name for spec in _specs(plan) if _why_not(spec) is None)


def without_cpp(plan: PolicyPlan) -> tuple[str, ...]:
    """The kernels of a plan that have no C++ form, each with the reason."""
    return tuple(f"{spec.name}: {why}" for spec in _specs(plan) if (why := _why_not(spec)) is not None)


def _why_not(spec: KernelSpec) -> str | None:
    try:
        context(spec)
    except Unprintable as error:
        return str(error)
    return None


@dataclass
class CppLibrary:
    """The functions of a plan's kernels, found by what they are for; None stands for packed SDPA.

    refused: name -> reason, of the kernels that were asked for and could not be built or loaded.
    """

    plan: PolicyPlan
    files: dict[str, CppFile]
    refused: dict[str, str] = field(default_factory=dict)
    _loaded: dict[KernelSpec, ctypes.CDLL | None] = field(default_factory=dict)
    _found: dict[tuple[Hashable, ...], tuple[tuple[KernelSpec, ctypes.CDLL | None], ...] | None] = field(
        default_factory=dict
    )

    def find(self, make: Make, *of: Hashable) -> ctypes.CDLL | None:
        """The library of the kernel that `make(plan, *of)` of `choose` specifies; None where it has no C++ form or was
        not built. Looked up in every layer, so each question is answered once."""
        found = self.stages(make, *of)
        return found[0][1] if found else None

    def stages(self, make: Make, *of: Hashable) -> tuple[tuple[KernelSpec, ctypes.CDLL | None], ...] | None:
        """The same where `make` specifies several kernels, each with its spec; None where one cannot be specified."""
        key = (make, *of)
        if key not in self._found:
            self._found[key] = self._specified(make, of)
        return self._found[key]

    def _specified(
        self, make: Make, of: tuple[Hashable, ...]
    ) -> tuple[tuple[KernelSpec, ctypes.CDLL | None], ...] | None:
        try:
            made = make(self.plan, *of)
        except Unprintable:
            return None
        specs = (made,) if isinstance(made, KernelSpec) else made or ()
        return tuple((spec, self._library(spec)) for spec in specs)

    def _library(self, spec: KernelSpec) -> ctypes.CDLL | None:
        if spec not in self._loaded:
            file = next((file for file in self.files.values() if file.spec.digest() == spec.digest()), None)
            self._loaded[spec] = None if file is None else self._load(file)
        return self._loaded[spec]

    def build(self) -> None:
        """Build all kernels side by side; one that cannot be built is named when it is first asked for."""
        try:
            build_all([file.source for file in self.files.values()], built())
        except (KvCompileError, OSError):
            return

    def try_all(self) -> None:
        """Build and load every kernel now, so that `refused` is complete."""
        self.build()
        for file in self.files.values():
            self._library(file.spec)

    def _load(self, file: CppFile) -> ctypes.CDLL | None:
        name = file.spec.cpp_name
        try:
            return load(file.source, built())
        except NoUsableCompiler as error:  # one message for all kernels
            self.refused[name] = str(error)
            tell(f"the cpu backend runs packed SDPA and torch, which is slower: {error}")
        except (KvCompileError, OSError) as error:
            self.refused[name] = str(error)
            tell(f"{name} is not used, packed SDPA and torch run instead, which is slower: {error}")
        return None


@cache
def cpp_library(plan: PolicyPlan) -> CppLibrary:
    """The plan's library, its files written once in a process."""
    try:
        return CppLibrary(plan, write_cpp(plan))
    except (KvCompileError, OSError) as error:
        tell(f"the cpu backend runs packed SDPA and torch, which is slower: {error}")
        return CppLibrary(plan, {})
