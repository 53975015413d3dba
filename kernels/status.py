"""The state of a policy's kernels: which there are, for which target, built or not, and what runs where there is none.

Takes a plan, gives plain rows and sentences. Guarantees: files are written, nothing is run; C++ is compiled only
where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvcompile.kernels.choose import unprintable
from kvcompile.kernels.choose_listed import without_triton
from kvcompile.kernels.choose_reads import slow_reads
from kvcompile.kernels.cpp_backend.build import is_sound, library_path, says_why_not
from kvcompile.kernels.cpp_backend.library import CppFile, built, cpp_library, without_cpp, write_cpp
from kvcompile.kernels.gpus import Gpu
from kvcompile.kernels.offline import has_triton
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.render import PURPOSE
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton_backend.library import write_kernels
from kvcompile.kernels.tuning import Chosen, config_for
from kvcompile.kernels.tuning_rank import rows_of
from kvcompile.kernels.tuning_store import Bucket

TARGETS = ("triton", "c++")


@dataclass(frozen=True, slots=True)
class Row:
    """One generated kernel.

    status      rendered (Triton: compiled at its first launch), built or not built (C++)
    reason      Triton: where its launch constants are from, or why it cannot run here; C++: why it is not built
    constants   of Triton: user, shipped (timed or analytic) or default; empty for C++
    """

    name: str
    target: Literal["triton", "c++"]
    purpose: str
    status: Literal["rendered", "built", "not built"]
    reason: str
    constants: str
    path: Path


@dataclass(frozen=True, slots=True)
class Missing:
    """What has no kernel in a target, and what runs in its place."""

    what: str
    target: Literal["triton", "c++"]
    instead: str

    def line(self) -> str:
        """For a reader."""
        return f"no {self.target.capitalize()} kernel: {self.what}; {self.instead} runs instead"


def rows(plan: PolicyPlan, gpu: Gpu, batch: int = 1, tokens: int = 4096, build: bool = False) -> tuple[Row, ...]:
    """Every kernel of a plan, Triton first. gpu, batch, tokens: a launch for which constants are looked up.

    build: compile the C++ kernels that are not built yet.
    """
    return (*_triton(plan, gpu, batch, tokens), *_cpp(plan, build))


def missing(plan: PolicyPlan) -> tuple[Missing, ...]:
    """What has no kernel, with the reason."""
    # Without a spec there is no C++ either.
    nowhere = tuple(what.replace("no Triton form", "no form") for what in unprintable(plan))
    on_gpu = (Missing(what, "triton", "the reference, in torch") for what in without_triton(plan))
    reads = (Missing(what, "c++", "the definition, in torch") for what in slow_reads(plan))
    on_cpu = (*(Missing(what, "c++", _in_place_of(what)) for what in (*nowhere, *without_cpp(plan))), *reads)
    return (*on_gpu, *on_cpu)


def runs_on(plan: PolicyPlan, backend: str) -> str:
    """What carries out a plan on a backend, in one line for a report; builds nothing."""
    if backend == "reference":
        return "reference: torch"
    if backend == "triton":
        left = len(without_triton(plan))
        return "triton: generated kernels" + (f", the reference for {left} of their places" if left else "")
    if (reason := says_why_not()) is not None:
        return f"cpu: packed SDPA and torch ({reason})"
    library = cpp_library(plan)
    names = sorted(set(library.files) - set(library.refused))
    parts = [f"{len(names)} generated C++ kernel{'' if len(names) == 1 else 's'}"] if names else []
    if library.refused or without_cpp(plan) or slow_reads(plan) or not names:
        parts.append("packed SDPA and torch")
    said = next(iter(library.refused.values()), "").splitlines()
    return f"cpu: {', '.join(parts)}" + (f" ({said[0]})" if said else "")


def _triton(plan: PolicyPlan, gpu: Gpu, batch: int, tokens: int) -> Iterator[Row]:
    absent = "" if has_triton() else "; Triton is not installed here"
    for name, file in write_kernels(plan).items():
        chosen = config_for(file.spec, gpu, Bucket.of(rows_of(plan, file.spec, batch), tokens))
        origin = chosen.source if chosen.source == "default" else f"{chosen.source}, {chosen.how}"
        yield Row(
            name, "triton", _purpose(file.spec), "rendered", _told(chosen, gpu) + absent, origin, file.path
        )  # fmt: skip


def _told(chosen: Chosen, gpu: Gpu) -> str:
    """Where launch constants are from, for a reader."""
    if chosen.source == "default":
        return f"default constants, none tuned for {gpu.name}"
    how = f"tuned by timing on {gpu.name}" if chosen.how == "timed" else f"analytic ranking for {gpu.name}"
    return f"{how} ({chosen.source} file{', ' + chosen.note if chosen.note else ''})"


def _cpp(plan: PolicyPlan, build: bool) -> Iterator[Row]:
    nothing = says_why_not()
    library = cpp_library(plan)
    if build and nothing is None:
        library.try_all()
    for name, file in write_cpp(plan).items():
        found, reason = _state(file, nothing, library.refused.get(name))
        yield Row(name, "c++", _purpose(file.spec), found, reason, "", file.path)


def _state(file: CppFile, nothing: str | None, refused: str | None) -> tuple[Literal["built", "not built"], str]:
    if nothing is not None or refused is not None:
        why = str(nothing or refused).splitlines()[0]
        return "not built", f"{why}; {_in_place_of(file.spec.template)} runs instead"
    if is_sound(library_path(file.source, built())):
        return "built", ""
    return "not built", "compiled when a model is optimised, or by --build"


def _in_place_of(what: str) -> str:
    read = what.startswith(("marks", "units", "spans", "blocks"))
    return "packed SDPA" if what.startswith(("decode", "prefill")) else "the definition, in torch" if read else "torch"


def _purpose(spec: KernelSpec) -> str:
    return PURPOSE[spec.template]
