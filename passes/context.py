"""What passes know beside the module: the model, places, files, measurements; and the findings that they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvcompile.dsl.diagnostics import Diagnostic
from kvcompile.dsl.module import Places
from kvcompile.kernels.plan import ModelFacts


@dataclass(frozen=True, slots=True)
class Context:
    """`tables`: name -> file given by the caller, the name being a head class, a share, or a state that starts from a
    trained score. `bases`: the same names -> folder that paths in the policy count from, None where only the caller
    can say (library policies). `probes`: what a probe measured, [layer][kv head], by its key (`tables.probe_key`).
    `learned`: filled by `bind`, the files of trained scores by name. `learning`: a head class that is being learned,
    and the one mixed with it: the first takes every head, no source of heads is read, and both stay in the module.
    """

    facts: ModelFacts
    places: Places = field(default_factory=Places)
    tables: Mapping[str, Path] = field(default_factory=dict)
    bases: Mapping[str, Path | None] = field(default_factory=dict)
    probes: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    findings: list[Diagnostic] = field(default_factory=list)
    learned: dict[str, Path] = field(default_factory=dict)
    learning: tuple[str, str] | None = None
