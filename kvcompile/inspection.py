"""`inspect`: everything that was made on the way from a policy to a running model, to be read.

Takes an optimised model; gives the policy, the IR after each pass, the plan, the rewritten graphs and the
kernels as files. Nothing here runs the model; kernels are rendered, not compiled.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from torch import nn

from kvcompile.api import Optimized, optimized
from kvcompile.dsl.printer import text
from kvcompile.kernels.choose import unprintable
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.offline import Resources, compile_apart
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.triton_backend.library import write_kernels


@dataclass(frozen=True)
class Kernel:
    """One generated Triton file. `config`: the facts that it is specialised on."""

    name: str
    path: Path
    source: str
    config: dict[str, object]

    def resources(self, arch: str) -> tuple[Resources, ...]:
        """What the offline compiler makes of it for sm_80, sm_90 or sm_100; no GPU is needed."""
        return compile_apart([self.path], [arch])[self.path.stem]

    def ptx(self, arch: str) -> str:
        """The PTX of its functions, one after the other."""
        return "\n".join(found.ptx for found in self.resources(arch))


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
        """The policy's Triton kernels by name; rendered into the cache folder at the first look."""
        files = write_kernels(self.plan)
        return {
            name: Kernel(name, file.path, file.source, dict(file.spec.facts)) for name, file in sorted(files.items())
        }

    @property
    def unprintable(self) -> tuple[str, ...]:
        """What of the policy has no Triton form, and so runs as the reference on every backend."""
        return unprintable(self.plan)


def inspect(model: nn.Module) -> Artifacts:
    """Everything that `optimize` made of the model's policy. Raises KvCompileError where it did not run."""
    return Artifacts(optimized(model))
