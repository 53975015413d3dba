"""What the commands share: options, parameters from `--set` and `--table`, model folders, prompts.

Takes the words of the command line; gives what the Python API takes.
Guarantees: wrong usage is a usage error (exit code 2); a bad folder or file is a `KvCompileError`
or an `OSError` with its place; nothing is fetched from a network.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

Policy = Annotated[str, typer.Argument(metavar="POLICY", help="A .kvp file, or a name of the library.")]
ModelFolder = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="A model folder as save_pretrained writes it.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the policy; may be repeated."),
]
Tables = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="NAME=FILE", help="File of a head class, share or trained score; may be repeated."),
]
PolicyName = Annotated[
    str | None, typer.Option("--name", metavar="POLICY", help="Which policy of a file that holds several.")
]
Backend = Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, reference, cpu or triton.")]
COMPILE = ("auto", "inductor", "eager", "off", "cudagraph", "cudagraph+inductor")
Compile = Annotated[str, typer.Option("--compile", metavar="HOW", help="auto, inductor, eager, off or cudagraph.")]


def _size(text: str | None) -> int | None:
    from kvcompile.kernels.errors import KvCompileError
    from kvcompile.kernels.sizes import parse_bytes

    try:
        return None if text is None else parse_bytes(int(text) if text.isdecimal() else text)
    except KvCompileError as error:
        raise typer.BadParameter(str(error).partition(": ")[2]) from None


MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", callback=_size, help="Most bytes of cache, such as 2GiB or 512MB."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", metavar="FILE", help="A file that holds the prompt; - reads stdin.")
]

# Tokens of the prompt that is made up where none is given: enough for small budgets to bind.
MADE_UP_LENGTH = 256

# The names that optimize, use and explain take for themselves.
RESERVED = frozenset(
    {"model", "model_or_config", "policy", "backend", "compile", "name", "tables", "max_bytes", "positions"}
    | {"prompt", "generate", "batch", "gpu", "steps", "input_ids"}
)


def pairs(words: list[str] | None, option: str, form: str) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dict; anything else is wrong usage."""
    found: dict[str, str] = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        key, value = key.strip(), value.strip()
        if not (equals and key and value):
            raise typer.BadParameter(f"{word!r} is not of the form {form}", param_hint=option)
        if key in found:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint=option)
        found[key] = value
    return found


def parameters(words: list[str] | None) -> dict[str, str]:
    """The policy's parameters, as text of the language."""
    found = pairs(words, "--set", "NAME=VALUE")
    for key in found:
        if key in RESERVED:
            raise typer.BadParameter(f"{key!r} is an option, not a parameter of a policy", param_hint="--set")
        if not key.isidentifier():
            raise typer.BadParameter(f"{key!r} is not a name", param_hint="--set")
    return found


def table_files(words: list[str] | None) -> dict[str, str] | None:
    """The files of head classes, shares and trained scores."""
    return pairs(words, "--table", "NAME=FILE") or None


def choice(value: str, allowed: tuple[str, ...], option: str) -> str:
    """One of a few words."""
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}", param_hint=option)
    return value


def load_config(folder: Path) -> Any:
    """The configuration of a model folder; reads no weights."""
    from transformers import AutoConfig

    return _from_folder(AutoConfig, folder)


def load_model(folder: Path, *, anywhere: bool = True) -> Any:
    """The causal language model of a folder, in evaluation mode, on a GPU where there is one; else on the CPU, as
    where processes share the GPUs (`anywhere=False`)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = _from_folder(AutoModelForCausalLM, folder).eval()
    return model.to("cuda") if anywhere and torch.cuda.is_available() else model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    from kvcompile.kernels.errors import KvCompileError

    if (folder / "config.json").is_file() and not has_tokenizer(folder):
        raise KvCompileError(f"--model {folder}: has no tokenizer; save the model's own into it (save_pretrained)")
    return _from_folder(AutoTokenizer, folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder says anything of a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names)


def check_folder(folder: Path, where: str) -> None:
    """Find out before hours of work whether files can be written to a folder. `where` begins the message."""
    from kvcompile.kernels.errors import KvCompileError

    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise KvCompileError(
            f"{where}: cannot write there ({reason}); name another place, or mend its rights"
        ) from None


def read_prompt(text: str | None, file: Path | None) -> str | None:
    """The prompt from either option; None where neither is given."""
    if text is not None and file is not None:
        raise typer.BadParameter("give --prompt or --prompt-file, not both", param_hint="--prompt")
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else _read(file)
    if text is not None and not text.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="--prompt" if file is None else "--prompt-file")
    return text


def encode(tokenizer: Any, text: str, device: Any) -> Any:
    """Token ids int64 [1, n] of a prompt, on a device."""
    from kvcompile.kernels.errors import KvCompileError

    ids = tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise KvCompileError("the tokenizer makes no token of this prompt; give a longer one")
    return ids.to(device)


def made_up_prompt(model: Any, length: int) -> Any:
    """Token ids int64 [1, n] drawn with a fixed seed: for looking at a policy where no text is at hand."""
    import torch

    config = model.config.get_text_config()
    bound = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = torch.randint(0, config.vocab_size, (1, bound), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, figures: bool = False) -> None:
    """A table as wide as the terminal; in a pipe as wide as it needs to be, so that no word is cut.

    figures: all columns but the first hold numbers, and stand to the right.
    """
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right" if figures else "left"
    for row in rows:
        table.add_row(*row)
    shown = sys.stdout.isatty()
    console = Console(file=io.StringIO(), width=Console().width if shown else 1000, markup=False, highlight=False)
    console.print(table)
    for line in console.file.getvalue().splitlines():  # type: ignore[attr-defined]
        typer.echo(line.rstrip())


def use_options(
    name: str | None, settings: list[str] | None, tables: list[str] | None, backend: str, compile_how: str
) -> dict[str, Any]:
    """The keyword arguments of `use`."""
    return {
        "name": name,
        "tables": table_files(tables),
        "backend": choice(backend, ("auto", "reference", "cpu", "triton"), "--backend"),
        "compile": choice(compile_how, COMPILE, "--compile"),
        **parameters(settings),
    }


def policy_parameters(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `use`'s keyword arguments that go to the policy."""
    return {key: value for key, value in options.items() if key not in RESERVED}


def check_first(policy: str, options: dict[str, Any]) -> None:
    """Find mistakes in the policy before a model is loaded."""
    from kvcompile.dsl import load, resolve

    resolve(load(policy, options["name"]), policy_parameters(options))


def progress(what: str) -> AbstractContextManager[Any]:
    """A spinner on stderr; nothing where stderr is no terminal."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def print_result(value: Any, as_json: bool) -> None:
    if as_json:
        print_json(value.to_dict())
    else:
        typer.echo(str(value))


def _read(file: Path) -> str:
    from kvcompile.kernels.errors import KvCompileError

    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KvCompileError(f"{file}: not UTF-8 text (byte {error.start}); save the prompt as UTF-8") from error


def _from_folder(loader: Any, folder: Path) -> Any:
    """`loader.from_pretrained` on a local folder, its many ways to fail made one."""
    from transformers.utils import logging

    from kvcompile.kernels.errors import KvCompileError

    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise KvCompileError(f"--model {folder}: {there}; give a folder that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise KvCompileError(f"--model {folder}: has no config.json; give a folder that save_pretrained wrote")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # every kind there is: JSON, safetensors, unknown architectures, missing files
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        what = {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer"}.get(loader.__name__, "model")
        raise KvCompileError(f"--model {folder}: cannot load the {what}: {reason}") from error
