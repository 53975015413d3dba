"""The demo: one trained model, one long prompt, six cache policies at the same budget, and the kernels they got.

Loads the shipped model as any Hugging Face model, asks it for a fact planted far back, then asks 64 such
questions, and prints per policy: its answer, how often it was right, what it kept, held and cost. `make demo`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recall_data as data
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import kvcompile

FOLDER = Path(__file__).parent / "recall_model"
KEPT = 30  # per cent of the prompt's entries that every policy but keep_all may keep
PIECE = 128  # tokens per piece where a policy cuts the prompt
OBSERVE = 16  # newest queries that a policy may ask


@dataclass(frozen=True, slots=True)
class Case:
    """A policy of the library with the options that bring it to the common budget."""

    policy: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy did: its words after the shown prompt, right answers, the run's report, its kernels' files."""

    case: Case
    words: str
    right: int
    report: dict[str, Any]
    kernels: dict[str, Path]


def cases(model: PreTrainedModel, length: int) -> tuple[Case, ...]:
    """The policies, each keeping `KEPT` per cent of a prompt of `length` tokens, as a mean over the KV heads."""
    budget = length * KEPT // 100
    heads = {"tables": {"retrieval": FOLDER / "heads.tsv"}}
    found = kvcompile.explain("prulong", model, prompt=length, **heads).to_dict()["classes"]
    whole, local = (found[name]["heads"] for name in ("retrieval", "local"))
    # The whole heads keep everything; what the budget leaves is the local heads' window.
    window = (budget * (whole + local) - length * whole) // local - 4
    return (
        Case("keep_all"),
        Case("streaming", {"n_sink": 4, "window": budget - 4}),
        Case("h2o", {"heavy": budget // 2, "local": budget - budget // 2}),
        Case("snapkv", {"budget": budget, "observe": OBSERVE}),
        Case("snapkv_chunked", {"ratio": f"{KEPT}%", "observe": OBSERVE, "c": PIECE}),
        Case("prulong", {"n_sink": 4, "window": window, "c": PIECE, **heads}),
    )


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[str]:
    """The `tokens` words that the model puts after `text`."""
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).split()


def run(case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list, tick: Any) -> Outcome:
    """Asks all of `asked` under one policy, then the first again for longer, which the report is about."""
    with kvcompile.use(model, case.policy, **case.options):
        right = 0
        for prompt in asked:
            right += generate(model, tokenizer, prompt.text, 2)[0] == prompt.answer
            tick()
        words = generate(model, tokenizer, asked[0].text, 32)
        kernels = {name: Path(kernel.path) for name, kernel in kvcompile.inspect(model).kernels.items()}
        return Outcome(case, " ".join(words[:2]), right, kvcompile.report(model).to_dict(), kernels)


def show_answers(console: Console, first: data.Prompt, outcomes: list[Outcome]) -> None:
    console.rule("one long prompt")
    text = f"{data.BOS} {first.text}".split()
    console.print(f"{len(text)} tokens: [dim]{' '.join(text[:24])} ...[/dim]")
    console.print(f"planted {first.distance} tokens back: [bold]{first.answer} suits {first.name}[/bold]")
    console.print(f"the question: [bold]... colour of {first.name}[/bold] -> ?")
    for outcome in outcomes:
        good = outcome.words.split()[0] == first.answer
        console.print(f"  {outcome.case.policy:<15} {outcome.words:<12} {'right' if good else 'wrong'}", highlight=False)


def show_table(console: Console, count: int, outcomes: list[Outcome]) -> None:
    table = Table(title=f"{count} prompts, budget {KEPT} % of the prompt", title_justify="left")
    for head in ("policy", "right", "footprint", "peak", "kept", "KiB held", "KiB peak", "tokens/s"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for outcome in outcomes:
        rep = outcome.report
        table.add_row(
            outcome.case.policy,
            f"{outcome.right / count:.0%}",
            f"{rep['footprint']:.3f}",
            f"{rep['peak']:.3f}",
            f"{rep['kept']:.0%}",
            f"{rep['bytes_resident'] / 1024:.0f}",
            f"{rep['bytes_peak'] / 1024:.0f}",
            f"{rep['decode_tokens_per_second']:.0f}",
        )
    console.print(table)
    full = outcomes[0].report["bytes_full"] / 1024
    console.print(
        f"the untouched cache would hold {full:.0f} KiB; footprint: entries seen by all queries, as a share of dense;\n"
        "peak: most entries in memory at once, as a share of the text; held and peak count positions and states too"
    )


def show_kernels(console: Console, outcomes: list[Outcome]) -> None:
    console.rule("the kernels that were generated")
    files = {name: path for outcome in outcomes for name, path in outcome.kernels.items()}
    for name, path in sorted(files.items()):
        console.print(f"  {name}\n    {path}", highlight=False, soft_wrap=True)
    if not files:
        return
    name, path = min(files.items())
    policy = next(outcome.case.policy for outcome in outcomes if name in outcome.kernels)
    console.print("each is a file that stands alone; to look at one, check it, and see what it compiles to:")
    console.print(f"  less {path}", highlight=False, soft_wrap=True)
    console.print(f"  python {path} --check --bench", highlight=False, soft_wrap=True)
    console.print(
        f"  kvcompile inspect {policy} --model {FOLDER} --kernel {name} --arch sm_90", highlight=False, soft_wrap=True
    )


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
    outcomes = []
    columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for case in cases(model, options.length):
            bar = progress.add_task(case.policy, total=len(asked))
            outcomes.append(run(case, model, tokenizer, asked, lambda: progress.advance(bar)))  # noqa: B023
    show_answers(console, asked[0], outcomes)
    show_table(console, len(asked), outcomes)
    show_kernels(console, outcomes)
    console.print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
