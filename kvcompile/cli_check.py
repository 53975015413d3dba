"""`kvcompile check`: is a policy right, and can this version carry it out?

Takes files or library names; resolves, checks and lowers every policy in them.
Gives findings on stderr (with `--json` on stdout, as data) and an exit code that counts errors.
Guarantees: needs no model, imports neither torch nor transformers.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompile import cli_options as shared

if TYPE_CHECKING:
    from kvcompile.dsl.ast import File, Node
    from kvcompile.dsl.diagnostics import Diagnostic
    from kvcompile.dsl.load import Loaded


@dataclass(slots=True)
class Outcome:
    """What one FILE argument gave: its policies' names and digests, and all findings."""

    file: str
    policies: dict[str, str] = field(default_factory=dict)
    findings: list[Diagnostic] = field(default_factory=list)
    tree: File | None = None

    def count(self, *severities: str) -> int:
        return sum(d.severity in severities for d in self.findings)

    def to_dict(self) -> dict[str, Any]:
        found = [finding.to_dict() for finding in self.findings]
        policies = [{"name": name, "digest": digest} for name, digest in self.policies.items()]
        return {"file": self.file, "policies": policies, "findings": found}


def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Policy files, or names of the library.")],
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    ast: Annotated[bool, typer.Option("--ast", help="Print the syntax tree.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as errors.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Say whether policies are right, without a model."""
    params = shared.parameters(settings)
    with _uncollected():
        outcomes = [examine(file, name, params) for file in files]
    if as_json:
        trees = [{"ast": _tree_data(o.tree)} if ast and o.tree else {} for o in outcomes]
        shared.print_json([o.to_dict() | tree for o, tree in zip(outcomes, trees, strict=True)])
    else:
        for outcome in outcomes:
            _show(outcome, ast, strict)
    bad = ("error", "warning") if strict else ("error",)
    if any(outcome.count(*bad) for outcome in outcomes):
        raise typer.Exit(1)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: most of the time goes into imports and the grammar, which leave none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def examine(file: str, name: str | None, params: dict[str, str]) -> Outcome:
    """Resolve, check and lower the policies of one file, or only the one called `name`."""
    from kvcompile.dsl import PolicyError
    from kvcompile.dsl import check as check_policy
    from kvcompile.dsl.lower import lower
    from kvcompile.dsl.resolve import resolve

    outcome = Outcome(file)
    try:
        chosen = _policies(file, name)
    except PolicyError as error:
        outcome.findings += error.diagnostics
        return outcome
    outcome.tree = chosen[0].file
    for loaded in chosen:
        before = outcome.count("error")
        try:
            resolved = resolve(loaded, params)
            outcome.policies[resolved.name] = resolved.digest
            found = resolved.findings
            outcome.findings += [*found, *(finding for finding in check_policy(resolved) if finding not in found)]
            if outcome.count("error") == before:
                lower(resolved)
        except PolicyError as error:
            outcome.findings += error.diagnostics
    return outcome


def _policies(file: str, name: str | None) -> list[Loaded]:
    """The policy that `file` and `name` choose; without a name, all that the file holds."""
    from kvcompile.dsl import PolicyError, load, parse

    try:
        return [load(file, name)]
    except PolicyError as error:
        source = error.diagnostics[0].span.source
        if error.diagnostics[0].code != "K012" or name is not None:
            raise
        tree = parse(source.text, source.name)
        if not tree.policies:
            raise
        return [load(tree, policy.name, base=Path(file).parent) for policy in tree.policies]


def _show(outcome: Outcome, ast: bool, strict: bool) -> None:
    if ast and outcome.tree is not None:
        for line in _tree_lines(outcome.tree, 0):
            typer.echo(line)
    ranks = ("error", "warning", "note")
    for finding in sorted(outcome.findings, key=lambda found: ranks.index(found.severity)):
        print(finding, file=sys.stderr)
    errors, warnings = outcome.count("error"), outcome.count("warning")
    if errors or (strict and warnings):
        print(f"{outcome.file}: {_plural(errors, 'error')}, {_plural(warnings, 'warning')}", file=sys.stderr)
    else:
        names = ", ".join(outcome.policies)
        typer.echo(f"{outcome.file}: fine ({names})" + (f", {_plural(warnings, 'warning')}" if warnings else ""))


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _tree_lines(node: Node, depth: int) -> Iterator[str]:
    """One node a line: kind, place, and its plain fields."""
    plain = " ".join(f"{key}={value}" for key, value in _plain(node).items())
    yield f"{'  ' * depth}{type(node).__name__} {node.span.line}:{node.span.column} {plain}".rstrip()
    for child in node.children():
        yield from _tree_lines(child, depth + 1)


def _tree_data(node: Node) -> dict[str, Any]:
    place = {"node": type(node).__name__, "line": node.span.line, "column": node.span.column}
    children = [_tree_data(child) for child in node.children()]
    return place | _plain(node) | ({"children": children} if children else {})


def _plain(node: Node) -> dict[str, str | bool]:
    """The fields of a node that are neither nodes nor places."""
    from kvcompile.dsl.ast import Node as AnyNode
    from kvcompile.dsl.source import Source, Span

    found: dict[str, str | bool] = {}
    for spec in fields(node):
        value = getattr(node, spec.name)
        if value is None or isinstance(value, (AnyNode, Span, Source)):
            continue
        if isinstance(value, tuple):
            words = [item for item in value if isinstance(item, str)]
            if words:
                found[spec.name] = " ".join(words)
        else:
            found[spec.name] = value if isinstance(value, bool) else str(value)
    return found
