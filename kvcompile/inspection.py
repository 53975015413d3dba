"""`inspect`: everything that was made on the way from a policy to a running model, to be read.

Takes an optimised model; gives the policy, the IR after each pass, the plan, the rewritten graphs and the
kernels as files. Nothing here runs the model; kernels are rendered, not compiled.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from torch import nn

from kvcompile.api import Optimized, optimized
from kvcompile.dsl.printer import text
from kvcompile.kernels.account import Account, CppAccount, gpu_of
from kvcompile.kernels.choose_listed import without_triton
from kvcompile.kernels.cpp_backend.assembly import assembly, machine
from kvcompile.kernels.cpp_backend.library import write_cpp
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import gpu as gpu_facts
from kvcompile.kernels.headers import Sizes, header_for
from kvcompile.kernels.offline import ARCHES, compile_apart
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.spec import LAUNCH, KernelSpec
from kvcompile.kernels.status import runs_on
from kvcompile.kernels.triton_backend.library import write_kernels


@dataclass(frozen=True)
class Kernel:
    """One generated file. `config`: the facts that it is specialised on; `target`: triton or c++."""

    name: str
    path: Path
    source: str
    config: dict[str, object]
    target: str
    plan: PolicyPlan = field(repr=False)
    spec: KernelSpec = field(repr=False)

    def resources(self, arch: str, gpu: str | None = None) -> Account | CppAccount:
        """What a processor gives for it: registers, spills, shared memory, occupancy, bytes, predicted time.

        arch: sm_80, sm_90 or another that Triton compiles for, no GPU is needed; `native` for C++, this machine.
        gpu: whose figures to predict with, by default a typical one of the architecture.

        Raises:
            KvCompileError: an unknown or unfit architecture or GPU; no Triton, no C++ compiler.
        """
        if self.target == "c++":
            if arch != "native" or gpu is not None:
                raise KvCompileError(f"{self.name} is C++ for this machine: its arch is native, and it has no GPU")
            return CppAccount(self.name, machine(self.assembly()), header_for(self.plan, self.spec, target="cpp"))
        if arch == "native":
            raise KvCompileError(f"{self.name} is a Triton kernel: its arch is a GPU's, {', '.join(ARCHES)}")
        chosen = gpu_of(arch, None if gpu is None else gpu_facts(gpu))
        functions = compile_apart([self.path], [arch])[self.path.stem]
        sizes = Sizes() if chosen is None else Sizes(gpu=chosen)
        dtype = str(self.config.get("dtype", "float32"))
        return Account(self.name, dtype, arch, functions, header_for(self.plan, self.spec, sizes), chosen)

    def ptx(self, arch: str) -> str:
        """The PTX of a Triton kernel's functions, one after the other."""
        if self.target == "c++":
            raise KvCompileError(f"{self.name} is C++ and has no PTX: see .assembly()")
        return "\n".join(found.ptx for found in compile_apart([self.path], [arch])[self.path.stem])

    def assembly(self) -> str:
        """The assembly of a C++ kernel, as this machine's compiler makes it. NoCompiler where there is none."""
        if self.target == "triton":
            raise KvCompileError(f"{self.name} is a Triton kernel and has no assembly of a CPU: see .ptx(arch)")
        return assembly(self.source)


def kernels_of(plan: PolicyPlan) -> dict[str, Kernel]:
    """A plan's kernels by name, Triton's first, rendered into the cache folder; C++ ones end in `_cpp`."""
    found: dict[str, Kernel] = {}
    for name, file in sorted(write_kernels(plan).items()):
        config: dict[str, object] = dict(file.spec.facts)
        found[name] = Kernel(name, file.path, file.source, config, "triton", plan, file.spec)
    for name, cpp in sorted(write_cpp(plan).items()):
        config = {key: value for key, value in cpp.spec.facts if key not in LAUNCH}
        found[name] = Kernel(name, cpp.path, cpp.source, config, "c++", plan, cpp.spec)
    return found


class Artifacts:
    """What `inspect` gives. All of it is text, plans and files."""

    def __init__(self, state: Optimized) -> None:
        self._state = state

    @property
    def policy(self) -> str:
        """The policy after `extends` and parameters: one clause a line with its prefixes, `at` where it changes."""
        resolved = self._state.compiled.resolved
        lines = [f"policy {resolved.name}():"]
        for placed, following in zip_longest(resolved.clauses, resolved.clauses[1:]):
            prefix = "".join(f"{text(p)}: " for p in placed.prefixes)
            lines.append(prefix + text(placed.clause))
            if placed.triggers and (following is None or following.triggers != placed.triggers):
                lines.append(prefix + "at " + ", ".join(text(t) for t in placed.triggers))
        return "\n    ".join(lines)

    @property
    def plan(self) -> PolicyPlan:
        return self._state.compiled.plan

    def ir(self, after: str | None = None) -> str:
        """The kv module as MLIR text, after the named pass (default: the last)."""
        modules = self._state.compiled.modules
        name = list(modules)[-1] if after is None else after
        if name not in modules:
            raise KvCompileError(f"no pass {name!r}: there are {', '.join(modules)}")
        return modules[name]

    @property
    def graph(self) -> str:
        """What the graph pass changed in each compiled graph, as unified diffs, and the launch after the last layer."""
        layers = self._state.forward.engine.layers
        tail = self._state.forward.engine.tail
        if layers.inner == "off":
            return "no graphs: compile='off' runs each site's whole policy as one operator"
        if not layers.records:
            return "no graphs yet: they are compiled when the model first runs"
        parts = [f"# after the last layer of a step\n{tail.code.strip()}"] if tail is not None else []
        for record in layers.records:
            lines = difflib.unified_diff(
                record.before.splitlines(),
                record.after.splitlines(),
                f"{record.phase} before",
                f"{record.phase} after",
                lineterm="",
            )
            parts.insert(-1 if tail is not None else len(parts), "\n".join(lines))
        return "\n\n".join(parts)

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """The policy's kernels of both targets by name; rendered into the cache folder at the first look."""
        return kernels_of(self.plan)

    @property
    def unprintable(self) -> tuple[str, ...]:
        """What of the policy has no Triton form, and so runs as the reference on a GPU."""
        return without_triton(self.plan)

    @property
    def runs_on(self) -> str:
        """What carries out the policy on the model's backend: generated kernels, packed SDPA, torch."""
        return runs_on(self.plan, self._state.backend)


def inspect(model: nn.Module) -> Artifacts:
    """Everything that `optimize` made of the model's policy. Raises KvCompileError where it did not run."""
    return Artifacts(optimized(model))
