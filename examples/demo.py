"""The demo: one trained model, one long prompt, six cache policies at the same budget, and the kernels they got.

Loads the shipped model as any Hugging Face model and asks it for facts planted far back, each twice: at the end
of the text, and in a second turn, when the policy has already dropped what it wants to drop. Prints per policy
its answers, how often it was right, what it held and cost, then the files of its kernels. `make demo`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import kvcompile
from kvcompile.evaluation import tales as data

FOLDER = Path(__file__).parent / "recall_model"
KEPT = 30  # per cent of the text's entries that every policy but keep_all may keep
PIECE = 128  # tokens per piece where a policy cuts the prompt
OBSERVE = 16  # newest queries that a policy may ask
BATCH = 16  # prompts answered at once

# The library's streaming reads a prompt whole, then drops; in pieces it never holds the whole, as on a real stream.
STREAMING = f"""
policy streaming_in_pieces() extends streaming:
    at chunk({PIECE}), step
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A policy, by name or as text, with the options that bring it to the common budget."""

    name: str
    policy: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy did. `at_once` and `later`: its answers, prompt by prompt, to the question asked at the end of
    the text and in a second turn; `report`: of one prompt and 32 new tokens; `kernels`: name -> file."""

    case: Case
    at_once: list[str]
    later: list[str]
    report: dict[str, Any]
    kernels: dict[str, Path]


def cases(model: PreTrainedModel, length: int) -> tuple[Case, ...]:
    """The policies, each keeping `KEPT` per cent of a prompt of `length` tokens, as a mean over the KV heads."""
    budget = length * KEPT // 100
    heads: dict[str, Any] = {"tables": {"retrieval": FOLDER / "heads.tsv"}}
    found = kvcompile.explain("prulong", model, prompt=length, **heads).to_dict()["classes"]
    whole, local = (found[name]["heads"] for name in ("retrieval", "local"))
    # The whole heads keep everything; what the budget leaves is the local heads' window.
    window = (budget * (whole + local) - length * whole) // local - 4
    return (
        Case("keep_all", "keep_all"),
        Case("streaming", STREAMING, {"n_sink": 4, "window": budget - 4}),
        Case("h2o", "h2o", {"heavy": budget // 2, "local": budget - budget // 2}),
        Case("snapkv", "snapkv", {"budget": budget, "observe": OBSERVE}),
        Case("snapkv_chunked", "snapkv_chunked", {"ratio": f"{KEPT}%", "observe": OBSERVE, "c": PIECE}),
        Case("prulong", "prulong", {"n_sink": 4, "window": window, "c": PIECE, **heads}),
    )


def answers(model: PreTrainedModel, ids: torch.Tensor, two_turns: bool) -> torch.Tensor:
    """The next token [batch] after each prompt [batch, n], whose last three tokens are the question."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    cache = None
    if two_turns:
        text = ids[:, : -data.QUESTION_WORDS]
        cache = model.generate(text, attention_mask=torch.ones_like(text), **options).past_key_values
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    return out.sequences[:, -1]


def run(case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], tick: Any) -> Outcome:
    """Asks all of `texts` under one policy, twice, then the first again for longer, which the report is about."""
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    with kvcompile.use(model, case.policy, **case.options):
        found: dict[bool, list[str]] = {False: [], True: []}
        for part in ids.split(BATCH):
            for two_turns, words in found.items():
                words += [tokenizer.decode(token) for token in answers(model, part, two_turns)]
            tick(len(part))
        model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=32, do_sample=False)
        kernels = {name: Path(kernel.path) for name, kernel in kvcompile.inspect(model).kernels.items()}
        return Outcome(case, found[False], found[True], kvcompile.report(model).to_dict(), kernels)


def show_answers(console: Console, first: data.Prompt, outcomes: list[Outcome]) -> None:
    console.rule("one long prompt")
    text = f"{data.BOS} {first.text}".split()
    console.print(f"{len(text)} tokens: [dim]{' '.join(text[:24])} ...[/dim]")
    console.print(f"planted {first.distance} tokens back: [bold]{first.answer} suits {first.name}[/bold]")
    console.print(f"the question: [bold]... colour of {first.name}[/bold] -> ?")
    table = Table(box=None, pad_edge=False)
    for head in ("policy", "asked at the end of the text", "asked in a second turn"):
        table.add_column(head)
    for outcome in outcomes:
        words = (outcome.at_once[0], outcome.later[0])
        table.add_row(outcome.case.name, *(f"[{'green' if w == first.answer else 'red'}]{w}[/]" for w in words))
    console.print(table)


def show_table(console: Console, asked: list[data.Prompt], outcomes: list[Outcome]) -> None:
    right = [prompt.answer for prompt in asked]
    console.rule(f"{len(asked)} prompts, budget {KEPT} % of the text")
    table = Table(box=None, pad_edge=False)
    for head in ("policy", "at once", "later", "footprint", "peak", "KiB held", "KiB peak", "tokens/s"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for outcome in outcomes:
        rep = outcome.report
        table.add_row(
            outcome.case.name,
            *(f"{sum(map(str.__eq__, words, right)) / len(right):.0%}" for words in (outcome.at_once, outcome.later)),
            f"{rep['footprint']:.3f}",
            f"{rep['peak']:.3f}",
            f"{rep['bytes_resident'] / 1024:.0f}",
            f"{rep['bytes_peak'] / 1024:.0f}",
            f"{rep['decode_tokens_per_second']:.0f}",
        )
    console.print(table)
    full = outcomes[0].report["bytes_full"] / 1024
    console.print(
        "at once: right when asked at the end of the text; later: right when asked in a second turn. h2o and snapkv "
        f"read the whole prompt before they drop anything; streaming, snapkv_chunked and prulong drop every {PIECE} "
        "tokens. footprint: entries that all queries had before them, as a share of dense attention; peak: the most "
        f"entries in memory at once, as a share of the text. The untouched cache holds {full:.0f} KiB.",
        highlight=False,
    )


def show_kernels(console: Console, outcomes: list[Outcome]) -> None:
    console.rule("the kernels that were generated")
    files = {name: path for outcome in outcomes for name, path in outcome.kernels.items()}
    console.print("for GPUs (.py, Triton) and for this processor (.cpp, built when first used):")
    for name, path in sorted(files.items()):
        console.print(f"  {name}\n    {path}", highlight=False, soft_wrap=True)
    triton = [item for item in files.items() if item[1].suffix == ".py"]
    name, path = min(triton, key=lambda item: (not item[0].startswith("decode"), item[0]))
    policy = next(outcome.case.name for outcome in outcomes if name in outcome.kernels)
    console.print("each is a file that stands alone; to look at one, check one, and see what it compiles to:")
    console.print(f"  less {path}", highlight=False, soft_wrap=True)
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    console.print(f"  {python} {path} --check --bench", highlight=False, soft_wrap=True)
    look = f"{python} -m kvcompile inspect {policy} --model {FOLDER} --kernel {name} --arch sm_90"
    console.print(f"  {look}", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=640, help="tokens of a prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is small: more threads only wait for each other
    start = time.perf_counter()
    console = Console()
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    asked = data.prompts(options.prompts, options.length)
    texts = [prompt.text for prompt in asked]
    outcomes = []
    columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for case in cases(model, options.length):
            bar = progress.add_task(case.name, total=len(asked))
            outcomes.append(run(case, model, tokenizer, texts, lambda n: progress.advance(bar, n)))  # noqa: B023
    show_answers(console, asked[0], outcomes)
    show_table(console, asked, outcomes)
    show_kernels(console, outcomes)
    console.print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
