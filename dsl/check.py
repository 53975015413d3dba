from kvcompile.dsl.resolve import Resolved
from kvcompile.dsl.diagnostics import Diagnostic

def check(resolved: Resolved) -> tuple[Diagnostic, ...]:
    return resolved.findings
