"""A compiler for KV-cache policies: the public names, loaded when they are first used.

Importing this package imports neither torch nor transformers, so that `kvcompile check` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompile.api import optimize, restore, use
    from kvcompile.cache import KvCache
    from kvcompile.dsl.diagnostics import PolicyError, PolicyWarning
    from kvcompile.evaluation.evaluate import evaluate
    from kvcompile.exporting import export
    from kvcompile.inspection import inspect
    from kvcompile.kernels.errors import KvCompileError
    from kvcompile.learning.learn import learn
    from kvcompile.limits import CacheFull
    from kvcompile.passes.explain import explain
    from kvcompile.plain import session
    from kvcompile.reporting import report
    from kvcompile.saving import load_cache, save_cache
    from kvcompile.spans import Spans

__version__ = "0.1.0"

__all__ = [
    "CacheFull",
    "KvCache",
    "KvCompileError",
    "PolicyError",
    "PolicyWarning",
    "Spans",
    "__version__",
    "evaluate",
    "explain",
    "export",
    "inspect",
    "learn",
    "load_cache",
    "optimize",
    "report",
    "restore",
    "save_cache",
    "session",
    "use",
]

_HOMES = {
    "CacheFull": "kvcompile.limits",
    "KvCache": "kvcompile.cache",
    "KvCompileError": "kvcompile.kernels.errors",
    "PolicyError": "kvcompile.dsl.diagnostics",
    "PolicyWarning": "kvcompile.dsl.diagnostics",
    "Spans": "kvcompile.spans",
    "evaluate": "kvcompile.evaluation.evaluate",
    "explain": "kvcompile.passes.explain",
    "export": "kvcompile.exporting",
    "inspect": "kvcompile.inspection",
    "learn": "kvcompile.learning.learn",
    "load_cache": "kvcompile.saving",
    "optimize": "kvcompile.api",
    "report": "kvcompile.reporting",
    "restore": "kvcompile.api",
    "session": "kvcompile.plain",
    "save_cache": "kvcompile.saving",
    "use": "kvcompile.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
