"""What reading less costs in answers: selective reads beside eviction, on the shipped recall model, in one table.

    python benchmarks/reads_recall.py [--count 32] [--length 512] [--out benchmarks/results]

A prompt of facts is read whole, then three questions follow, token by token as decode steps, so that every method has
to find what it was not told to look for. Reads keep all and read a part in each step; evictions choose that part at the
end of the prompt, before any question. Runs on the `reference` backend, whose read masks are counted; what a KV head
reads is what any of its query heads reads. Writes reads_recall.json and reads_recall.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import machine, versions
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.evaluation.answering import stop_tokens
from kvcompile.evaluation.samples import Sample, suite
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.reads import Reads

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "recall_model"
SHARES = (0.05, 0.10, 0.20)
SUITES = ("recall_later:facts=12", "recall_later:facts=24")
PAGE, BLOCK = 8, 8  # tokens: smaller than published, as the texts are, where 5 % are 25 tokens
RATE = 0.01  # of distilling: ten times the published one, for thousands of times fewer tokens

QUEST = f"""
policy quest_everywhere(budget=64):
    unit page({PAGE}) with lo = min[i] k, hi = max[i] k
    score s = sum[d] max(q * lo, q * hi)
    attend newest page | top(budget / {PAGE}) pages by s per query_head
    at step
"""
TIDAL = """
policy tidal_3(n=64):
    layers 0: attend all
    layers 1:
        pick t = top(n) by logit per query_head
        attend all
    attend t
    at step
"""
MOBA = f"""
policy moba_steps(budget=64):
    unit block({BLOCK}) with c = mean[i] k
    attend own block | top(budget / {BLOCK}) blocks by dot(q, c) per query_head
    at step
"""
WINDOW = """
policy window_read(budget=64):
    attend sink(4) | recent(budget - 4)
    at step
"""
RANDOM = """
policy random_read(budget=64):
    attend recent(4) | random(budget - 4, 0)
    at step
"""


@dataclass(frozen=True, slots=True)
class Method:
    """A policy at one part of the prompt: read in each step, or kept. kind: `reads`, `evicts`, or `all`."""

    label: str
    kind: str
    policy: str
    params: dict[str, Any]
    tables: dict[str, Path]
    share: float


@dataclass(frozen=True, slots=True)
class Row:
    """read, bytes: what a step reads, as parts of what it would read of the whole cache; bytes with landmarks."""

    label: str
    kind: str
    share: float
    accuracy: tuple[float, ...]
    read: float
    bytes: float
    footprint: float
    kept: float


class Watch:
    """What the narrowed rows of a step read: entries and bytes of landmarks, by layer and sequence."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], int] = {}
        self.marks: dict[tuple[int, int], int] = {}

    def saw(self, reads: Reads, rows: Any, mask: torch.Tensor) -> None:
        which = rows.index.tolist()
        key = rows.layer, reads.place.sequence[which[0]]
        self.entries[key] = int(mask.any(1).sum())
        layout = layout_of(reads.plan)
        now = int(rows.now[0])
        heads = [reads.place.head[row] for row in which if reads.reading[row] >= 0]
        of_head = sum(kind.unit.full(now) * kind.channels for kind in layout.kinds) * layout.itemsize
        self.marks[key] = of_head * sum(layout.readers[rows.layer][head] >= 0 for head in heads)


@contextmanager
def watched() -> Iterator[Watch]:
    """Counts what the reference reads in steps."""
    watch, plain = Watch(), Reads.__call__

    def call(self: Reads, rows: Any, queries: Any) -> torch.Tensor:
        mask = plain(self, rows, queries)
        if queries.pos.shape[1] == 1:
            watch.saw(self, rows, mask)
        return mask

    Reads.__call__ = call  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        Reads.__call__ = plain  # type: ignore[method-assign]


def methods(length: int, gates: Path) -> list[Method]:
    heads = {"retrieval": MODEL / "heads.tsv"}
    out = [Method("untouched", "all", "keep_all", {}, {}, 1.0)]
    for share in SHARES:
        n = int(share * length)
        reads = {"quest": QUEST, "moba": MOBA, "sink and window": WINDOW, "random": RANDOM}
        out += [Method(name, "reads", text, {"budget": n}, {}, share) for name, text in reads.items()]
        out.append(Method("tidal", "reads", TIDAL, {"n": n}, {}, share))
        small = {"budget": n, "size": BLOCK}
        out.append(Method("seer-r, identity gate", "reads", "seerattention_r", small, {}, share))
        out.append(Method("seer-r, distilled gate", "reads", "seerattention_r_gated", small, {"live": gates}, share))
        observed = {"budget": n, "observe": 8, "pool": 3}
        out.append(Method("snapkv", "evicts", "snapkv", observed, {}, share))
        half = f"{share * 50:g}% of prompt"
        out.append(Method("h2o", "evicts", "h2o", {"heavy": half, "local": half}, {}, share))
        out.append(Method("keydiff", "evicts", "keydiff", {"budget": n}, {}, share))
        out.append(Method("streaming", "evicts", "streaming", {"n_sink": 4, "window": n - 4}, {}, share))
    window = {"n_sink": 4, "window": 28, "c": length}
    out.append(Method("prulong, shipped heads", "evicts", "prulong", window, heads, 0.0))
    return out


def distilled(model: Any, tokenizer: Any, folder: Path, steps: int, length: int) -> Path:
    """A gate of the model's own, from the maps of its attention on texts as long as those asked, of another seed."""
    found = kvcompile.learn(
        model, "seerattention_r_gated", f"suite:{SUITES[0]}", tokenizer=tokenizer, steps=steps, length=length, lr=RATE,
        seed=1, size=BLOCK, budget=8 * BLOCK,
    )  # fmt: skip
    path = folder / "gates.safetensors"
    found.save(path)
    return path


def asked(model: Any, tokenizer: Any, name: str, samples: list[Sample], watch: Watch) -> tuple[float, int, int, int]:
    """Accuracy over all turns; entries read, bytes read and entries of whole caches, summed over steps."""
    scorer, stops = suite(name), stop_tokens(model, tokenizer)
    facts = kvcompile.inspect(model).plan.facts
    right, turns, read, size, whole = 0.0, 0, 0, 0, 0
    for sample in samples:
        out = model(input_ids=torch.tensor([tokenizer(sample.prompt)["input_ids"]]), use_cache=True)
        for turn in sample.turns:
            pending = list(tokenizer(turn.ask, add_special_tokens=False)["input_ids"])
            said: list[int] = []
            while pending:
                watch.entries.clear()
                watch.marks.clear()
                cache = out.past_key_values
                out = model(input_ids=torch.tensor([[pending.pop(0)]]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                lengths = cache.store.lengths()
                for layer in range(facts.layers):
                    entries = watch.entries.get((layer, 0), int(lengths[layer].sum()))
                    read += entries
                    size += entries * facts.entry_bytes + watch.marks.get((layer, 0), 0)
                whole += cache.get_seq_length() * facts.layers * facts.kv_heads
                if not pending and len(said) < turn.tokens and not (said and said[-1] in stops):
                    said.append(int(out.logits[0, -1].argmax()))
                    pending.append(said[-1])
            right += float(scorer.score(turn, tokenizer.decode(said, skip_special_tokens=True)))
            turns += 1
    return right / turns, read, size, whole


def measured(method: Method, model: Any, tokenizer: Any, sets: dict[str, list[Sample]]) -> Row:
    accuracy, read, size, whole = [], 0, 0, 0
    with kvcompile.use(
        model, method.policy, backend="reference", compile="off", tables=method.tables, **method.params
    ), watched() as watch:  # fmt: skip
        for name, samples in sets.items():
            score, *sums = asked(model, tokenizer, name, samples, watch)
            accuracy.append(score)
            read, size, whole = (a + b for a, b in zip((read, size, whole), sums, strict=True))
        report = kvcompile.report(model).to_dict()
        entry = kvcompile.inspect(model).plan.facts.entry_bytes
    return Row(
        method.label, method.kind, method.share, tuple(accuracy), read / whole, size / (whole * entry),
        report["footprint"], report["kept"],
    )  # fmt: skip


def page(rows: list[Row], about: dict[str, Any]) -> str:
    head = [
        "# Reading less, and keeping less: what it costs in answers",
        "",
        f"The shipped recall model (3 layers, 8/4 heads of 32), {about['count']} prompts of at most {about['length']} "
        f"tokens for each of {', '.join(f'`{name}`' for name in SUITES)}, three questions each, fed token by token "
        "after the prompt. Greedy; accuracy is the part of right answers. *Entries read* and *bytes read* are parts of "
        "what a step over the whole cache reads, over all layers and KV heads; a KV head reads what any of its query "
        "heads reads, and bytes count landmarks. *Footprint* and *kept* are of the last run's prompt and steps: reads "
        "free nothing, so theirs stays 1.",
        "",
        "| method | share asked | " + " | ".join(f"`{name}`" for name in SUITES) + " | entries read | bytes read | "
        "footprint | kept |",
        "|---|---|" + "---|" * (len(SUITES) + 4),
    ]
    body = [
        f"| {row.label} ({row.kind}) | {f'{row.share:.0%}' if row.share else '-'} | "
        + " | ".join(f"{score:.3f}" for score in row.accuracy)
        + f" | {row.read:.3f} | {row.bytes:.3f} | {row.footprint:.3f} | {row.kept:.3f} |"
        for row in rows
    ]
    tail = [
        "",
        "`tidal` reads two of three layers whole, and in the last one what the second has picked; the head that finds "
        f"the facts is in the last one. Pages of {PAGE} and blocks of {BLOCK} tokens; the distilled gate was learned "
        f"in {about['steps']} steps at a rate of {RATE:g} on one text each, as long as those asked, of another seed.",
        "",
        f"{about['machine']['cpu']}, {about['machine']['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f". `python benchmarks/reads_recall.py --count {about['count']} --length {about['length']} --steps "
        f"{about['steps']}`",
        "",
    ]
    return "\n".join(head + body + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="prompts of each suite")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt at most")
    parser.add_argument("--steps", type=int, default=200, help="of distilling the gate")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    sets = {name: suite(name).samples(options.count, options.length, 0, tokenizer) for name in SUITES}
    about = {
        "machine": machine(), "versions": versions("kvcompile", "torch", "transformers"), "count": options.count,
        "length": options.length, "steps": options.steps,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        gates = distilled(model, tokenizer, Path(folder), options.steps, options.length)
        every = methods(options.length, gates)
        rows = [measured(method, model, tokenizer, sets) for method in track(every, description="methods")]
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    (options.out / "reads_recall.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "reads_recall.md").write_text(page(rows, about), encoding="utf-8")
    print(page(rows, about))


if __name__ == "__main__":
    main()
