"""The commands that put a policy to work on a model: explain, run, verify.

Takes a policy and a local model folder; gives text or JSON on stdout, progress on stderr.
Guarantees: torch and transformers are imported by a command that needs them, not by this module.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

import typer

from kvcompile import cli_options as shared


def explain(
    policy: shared.Policy,
    model: shared.ModelFolder,
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", min=1, help="Tokens of the prompt.")] = 131072,
    generate: Annotated[int, typer.Option("--generate", metavar="N", min=0, help="Decode forwards.")] = 0,
    batch: Annotated[int, typer.Option("--batch", metavar="B", min=1, help="Sequences.")] = 1,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU to predict for.")] = None,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    max_bytes: shared.MaxBytes = None,
    as_json: shared.AsJson = False,
) -> None:
    """Say what a policy holds and costs on a model, before anything runs."""
    params, paths = shared.parameters(settings), shared.table_files(tables)
    shared.check_first(policy, {"name": name, **params})
    from kvcompile.passes.explain import explain as explained

    config = shared.load_config(model)
    asked: dict[str, Any] = {"gpu": gpu, "name": name, "tables": paths, "max_bytes": max_bytes, **params}
    facts: Any = explained(policy, config, prompt=prompt, generate=generate, batch=batch, **asked)
    shared.print_result(facts, as_json)


def run(
    policy: shared.Policy,
    model: shared.ModelFolder,
    prompt: shared.Prompt = None,
    prompt_file: shared.PromptFile = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1)] = 64,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    backend: shared.Backend = "auto",
    compile_how: shared.Compile = "auto",
    max_bytes: shared.MaxBytes = None,
    as_json: shared.AsJson = False,
) -> None:
    """Generate text under a policy, and report what was measured."""
    text = shared.read_prompt(prompt, prompt_file)
    if text is None:
        raise typer.BadParameter("give --prompt TEXT or --prompt-file FILE", param_hint="--prompt")
    options = shared.use_options(name, settings, tables, backend, compile_how)
    shared.check_first(policy, options)
    with shared.progress("loading the model"):
        decoder = shared.load_model(model)
        tokenizer = shared.load_tokenizer(model)
        ids = shared.encode(tokenizer, text, decoder.device)

    from kvcompile.api import use
    from kvcompile.limits import CacheFull
    from kvcompile.reporting import report

    asked = {"attention_mask": ids.new_ones(ids.shape), "max_new_tokens": max_new_tokens, "do_sample": False}
    with ExitStack() as stack:
        with shared.progress("compiling the policy and its kernels"):
            stack.enter_context(use(decoder, policy, max_bytes=max_bytes, **options))
        with shared.progress(f"{ids.shape[1]} prompt tokens, up to {max_new_tokens} new ones"):
            try:
                new = decoder.generate(ids, **asked)[0, ids.shape[1] :]
            except CacheFull as error:  # what there is of the answer comes before the reason
                if error.sequences is not None:
                    typer.echo(tokenizer.decode(error.sequences[0, ids.shape[1] :], skip_special_tokens=True))
                raise
        measured = report(decoder)
    answer = tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        shared.print_json({"text": answer, "tokens": new.tolist(), "report": measured.to_dict()})
    else:
        typer.echo(answer)
        typer.echo()
        typer.echo(str(measured))


def verify(
    policy: shared.Policy,
    model: shared.ModelFolder,
    prompt: shared.Prompt = None,
    prompt_file: shared.PromptFile = None,
    length: Annotated[
        int, typer.Option("--length", metavar="N", min=1, help="Without a prompt: this many made-up tokens.")
    ] = shared.MADE_UP_LENGTH,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=0, help="Decode forwards.")] = 16,
    name: shared.PolicyName = None,
    settings: shared.Settings = None,
    tables: shared.Tables = None,
    backend: shared.Backend = "auto",
    compile_how: shared.Compile = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Compare a backend with the reference, and a policy with the full cache."""
    text = shared.read_prompt(prompt, prompt_file)
    options = shared.use_options(name, settings, tables, backend, compile_how)
    shared.check_first(policy, options)
    with shared.progress("loading the model"):
        decoder = shared.load_model(model)
        if text is None:
            ids = shared.made_up_prompt(decoder, length)
        else:
            ids = shared.encode(shared.load_tokenizer(model), text, decoder.device)

    from kvcompile.verify import verify as verified

    with shared.progress(f"{ids.shape[1]} prompt tokens and {steps} steps, three times"):
        outcome = verified(decoder, policy, ids, steps=steps, **options)
    shared.print_result(outcome, as_json)
    if not outcome.ok:
        raise typer.Exit(1)
