"""The policy language: text to checked policy to kv IR. Knows neither torch nor any model.

`load` finds and parses a policy, `resolve` applies parents and parameters, `check` gives findings.
Importing this package is cheap: lark builds its grammar on the first parse, and xDSL belongs to `lower`.
"""

from kvcompile.dsl import library
from kvcompile.dsl.check import check
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError
from kvcompile.dsl.load import Loaded, load
from kvcompile.dsl.parser import parse
from kvcompile.dsl.resolve import Resolved, resolve

__all__ = ["Diagnostic", "Loaded", "PolicyError", "Resolved", "check", "library", "load", "parse", "resolve"]
