"""`kvcompile fmt`: one layout for policy files.

Takes files, or `-` for standard input; writes each file that changes, or with `--check` and `--diff` none.
Guarantees: a file with errors stays as it is; a file is replaced whole or not at all, its rights and links kept;
neither torch nor transformers is imported.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompile import cli_options as shared

if TYPE_CHECKING:
    from kvcompile.dsl.diagnostics import Diagnostic

_STDIN = "-"


@dataclass(slots=True)
class Outcome:
    """What one FILE argument gave: its text before and after, or why there is no text after."""

    file: str
    before: str = ""
    after: str | None = None
    findings: tuple[Diagnostic, ...] = ()
    unwritten: str = ""

    @property
    def changed(self) -> bool:
        return self.after is not None and self.after != self.before

    @property
    def failed(self) -> bool:
        return self.after is None or bool(self.unwritten)

    def to_dict(self) -> dict[str, Any]:
        data = {"file": self.file, "changed": self.changed, "findings": [found.to_dict() for found in self.findings]}
        if self.unwritten:
            data["unwritten"] = self.unwritten
        return data | ({"text": self.after} if self.file == _STDIN else {})


def fmt(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Policy files; - reads stdin, writes stdout.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a file would change.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Write nothing; print what would change.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Lay out policy files: same words, same comments, one style."""
    if files.count(_STDIN) > 1:
        raise typer.BadParameter("`-` stands once", param_hint="FILE")
    outcomes = [_laid_out(file) for file in files]
    for outcome in outcomes:
        if outcome.changed and outcome.file != _STDIN and not (check or diff):
            outcome.unwritten = _write(outcome)
    if as_json:
        shared.print_json([outcome.to_dict() for outcome in outcomes])
    else:
        for outcome in outcomes:
            _show(outcome, check, diff)
    if any(outcome.failed or (check and outcome.changed) for outcome in outcomes):
        raise typer.Exit(1)


def _laid_out(file: str) -> Outcome:
    from kvcompile.dsl.diagnostics import PolicyError
    from kvcompile.dsl.format import format_text
    from kvcompile.dsl.load import decode, read_text

    name = "<stdin>" if file == _STDIN else file
    try:
        before = decode(sys.stdin.buffer.read(), name) if file == _STDIN else read_text(file)
        return Outcome(file, before, format_text(before, name))
    except PolicyError as error:
        return Outcome(file, findings=error.diagnostics)


def _write(outcome: Outcome) -> str:
    """Put the new text in place by a rename, so that no moment sees half a file. What went wrong, or nothing."""
    target = Path(outcome.file).resolve()  # of a link, the file that it names
    try:
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(number, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(outcome.after or "")
                stream.flush()
                os.fsync(stream.fileno())
            shutil.copymode(target, name)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _show(outcome: Outcome, check: bool, diff: bool) -> None:
    name = "<stdin>" if outcome.file == _STDIN else outcome.file
    for finding in outcome.findings:
        print(finding, file=sys.stderr)
    if outcome.failed:
        reason = f": cannot write it: {outcome.unwritten}" if outcome.unwritten else ""
        print(f"{name}: left as it is{reason}", file=sys.stderr)
    elif diff:
        typer.echo(_difference(outcome, name), nl=False)
    elif outcome.file == _STDIN and not check:
        typer.echo(outcome.after, nl=False)
    elif outcome.changed:
        typer.echo(f"{name}: {'would change' if check else 'laid out anew'}")


def _difference(outcome: Outcome, name: str) -> str:
    lines = difflib.unified_diff(_lines(outcome.before), _lines(outcome.after or ""), name, name)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _lines(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", text)
