"""What passes know beside the module: the model, places, head tables; and the findings that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvcompile.dsl.diagnostics import Diagnostic
from kvcompile.dsl.module import Places
from kvcompile.kernels.plan import ModelFacts


@dataclass(frozen=True, slots=True)
class Context:
    """`tables`: head class -> table given by the caller. `bases`: head class -> folder that paths in the policy
    count from, None where only the caller can say (library policies)."""

    facts: ModelFacts
    places: Places = field(default_factory=Places)
    tables: Mapping[str, Path] = field(default_factory=dict)
    bases: Mapping[str, Path | None] = field(default_factory=dict)
    findings: list[Diagnostic] = field(default_factory=list)
