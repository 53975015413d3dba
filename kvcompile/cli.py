"""The command line: one command per question a user has about a policy.

Takes arguments; gives an exit code: 0 fine, 1 errors (findings, a failed comparison), 2 wrong usage.
Guarantees: results on stdout, everything else on stderr; a user's mistake never shows a traceback;
`check` and `fmt` import neither torch nor transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kvcompile import __version__
from kvcompile.cli_bench import bench
from kvcompile.cli_check import check
from kvcompile.cli_eval import evaluate
from kvcompile.cli_export import export
from kvcompile.cli_fmt import fmt
from kvcompile.cli_inspect import inspect, kernels
from kvcompile.cli_learn import learn
from kvcompile.cli_model import explain, run, verify
from kvcompile.cli_tune import tune

# Helps are plain text: they are read in pipes and logs too.
app = typer.Typer(
    name="kvcompile",
    help="Compile KV-cache policies. POLICY is a .kvp file, or the name of a policy of the library.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvcompile {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Compile KV-cache policies."""


for command in (check, fmt, explain, run, inspect, verify, kernels, learn, tune, bench, export):
    app.command()(command)
app.command("eval")(evaluate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` default to the process's own."""
    command = typer.main.get_command(app)
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="kvcompile")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        message = mistake(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 1
    return 0


def mistake(error: Exception) -> str | None:
    """What to tell the user, or None where the error is not a mistake of theirs but of this program."""
    from kvcompile.dsl.diagnostics import PolicyError
    from kvcompile.kernels.errors import KvCompileError

    if isinstance(error, PolicyError):
        return str(error)
    if isinstance(error, KvCompileError):
        return f"error: {error}"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"error: {error.filename}: {reason}" if error.filename else f"error: {reason}"
    return None
