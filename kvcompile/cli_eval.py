"""`kvcompile eval`: how well does a model do its tasks under policies, and what does its cache cost meanwhile?

Takes policies, a model folder, suites, lengths, budgets; gives tables or JSON on stdout, files where asked for,
progress on stderr. Guarantees: wrong usage is found before the model is loaded; an interrupted run with `--out` goes
on where it was; torch and transformers are imported by the command, not by this module.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompile import cli_options as shared

_LIST = r"[\s,]+"


def evaluate(
    policies: Annotated[
        list[str], typer.Argument(metavar="POLICY...", help="Policies: .kvp files, or names of the library.")
    ],
    model: shared.ModelFolder,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", metavar="NAME[,NAME]", help="Suites by name, or a folder of data; may be repeated."),
    ] = None,
    length: Annotated[str, typer.Option("--length", metavar="N[,N]", help="Tokens of a prompt.")] = "4096",
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Samples per cell.")] = 32,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N[,N]", help="Seeds of the samples.")] = "0",
    budgets: Annotated[
        str | None, typer.Option("--budgets", metavar="P[,P]", help="Parts of the prompt to keep, such as 10%,30%.")
    ] = None,
    chunks: Annotated[
        str | None, typer.Option("--chunks", metavar="N[,N]", help="Tokens per piece of the prompt.")
    ] = None,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    threshold: Annotated[
        str, typer.Option("--threshold", metavar="P", help="Part of full attention's score that is good enough.")
    ] = "90%",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for results; finished cells are not run again.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw figures into --out; needs matplotlib.")] = False,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Prompts answered at once.")] = 16,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Processes, for models on the CPU.")] = 1,
    backend: shared.Backend = "auto",
    compile_how: shared.Compile = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Score a model under policies on suites, with footprints and critical footprints."""
    lengths, of_seeds = _numbers(length, "--length", 1), _numbers(seeds, "--seeds", 0)
    pieces = None if chunks is None else _numbers(chunks, "--chunks", 1)
    parts = None if budgets is None else [_part(word, "--budgets") for word in _words(budgets, "--budgets")]
    good = float(_part(threshold, "--threshold", "part of full attention's score"))
    if plot and out is None:
        raise typer.BadParameter("--plot needs --out DIR, the folder that the figures go to", param_hint="--plot")
    names = [part for word in suite or () for part in suite_names(word)]
    if not names:
        raise typer.BadParameter(_suites_there_are(), param_hint="--suite")
    params, files = shared.parameters(settings), shared.table_files(tables)
    backend = shared.choice(backend, ("auto", "reference", "cpu", "triton"), "--backend")
    compile_how = shared.choice(compile_how, shared.COMPILE, "--compile")

    from kvcompile.evaluation.evaluate import cases_of
    from kvcompile.evaluation.evaluate import evaluate as evaluated
    from kvcompile.evaluation.samples import suite as suite_of

    cases_of(policies, parts, pieces, name=name, params=params, tables=files)
    suites = [suite_of(word) for word in names]
    if out is not None:
        _writable(out)
    if plot:
        _check_matplotlib()
    with shared.progress("loading the model"):
        decoder = shared.load_model(model)
        tokenizer = shared.load_tokenizer(model)
    try:
        found = evaluated(
            decoder, policies, suites, tokenizer=tokenizer, length=lengths, count=count, seeds=of_seeds,
            budgets=parts, chunks=pieces, out=out, batch=batch, threshold=good, progress=sys.stderr.isatty(),
            backend=backend, compile=compile_how, jobs=jobs, name=name, params=params, tables=files,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"; finished cells are in {out / 'cells'}, the same command goes on from there" if out else ""
        print(f"interrupted{kept}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        shared.print_json(found.to_dict())
    else:
        typer.echo(str(found))
    if out is not None:
        written = [*found.save(out), *(found.plot(out) if plot else ())]
        print("\n".join(f"written: {path}" for path in written), file=sys.stderr)
    if not any(cell.done and cell.label != found.full for cell in found.cells) and _more_than_full(found):
        raise typer.Exit(1)


def suite_names(text: str) -> list[str]:
    """The suites of one `--suite`: names between commas, each perhaps with options (`recall:facts=4,depths=5`);
    a path that exists is one, commas or not."""
    if Path(text).expanduser().exists():
        return [text]
    found: list[str] = []
    for word in (part.strip() for part in text.split(",")):
        if found and ":" in found[-1] and re.match(r"\w+=", word):
            found[-1] += f",{word}"
        elif word:
            found.append(word)
    return found


def _more_than_full(found: Any) -> bool:
    return any(cell.label != found.full for cell in found.cells)


def _suites_there_are() -> str:
    from kvcompile.evaluation.samples import SUITES

    return f"name at least one suite, or a folder of data; suites: {', '.join(SUITES)}"


def _words(text: str, option: str) -> list[str]:
    words = [word for word in re.split(_LIST, text.strip()) if word]
    if not words:
        raise typer.BadParameter("is empty", param_hint=option)
    if len(set(words)) < len(words):
        raise typer.BadParameter(f"{text!r} names one twice", param_hint=option)
    return words


def _numbers(text: str, option: str, least: int) -> list[int]:
    """Whole numbers between commas; `4k` is 4096."""
    found = []
    for word in _words(text, option):
        number = re.fullmatch(r"([0-9]{1,12})(k?)", word)
        value = int(number[1]) * (1024 if number[2] else 1) if number else -1
        if value < least:
            raise typer.BadParameter(f"{word!r} is no whole number from {least}", param_hint=option)
        found.append(value)
    return found


def _part(word: str, option: str, what: str = "budget") -> Any:
    """A part in (0, 1]; `what` it is, for the message."""
    from kvcompile.evaluation.budgets import part
    from kvcompile.kernels.errors import KvCompileError

    try:
        return part(word)
    except KvCompileError as error:
        raise typer.BadParameter(str(error).replace("budget", what, 1), param_hint=option) from None


def _writable(out: Path) -> None:
    """Find out before hours of work whether results can be written; OSError where not."""
    from kvcompile.kernels.errors import KvCompileError

    if out.exists() and not out.is_dir():
        raise KvCompileError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    shared.check_folder(out, f"--out {out}")


def _check_matplotlib() -> None:
    from kvcompile.evaluation.plots import canvas

    canvas(1, 1)
