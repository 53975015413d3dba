"""A whole model on a CPU, side by side: the untouched model, kvcompile, and kvpress where it is installed.

    python benchmarks/decode_cpu.py [--rounds 3] [--only NAME ...] [--prompt N]

Each contestant runs in a process of its own, kvpress under the Python that KVC_PEER_PYTHON names (it needs an older
transformers). The contestants take turns, `--rounds` times, so that a drift of the machine falls on all of them.
Writes benchmarks/results/decode_cpu.json (all that was measured) and decode_cpu.md (the table).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from _common import (
    KV_HEADS,
    LAYERS,
    Setting,
    bare_model,
    build_model,
    cache_bytes,
    machine,
    prompt_ids,
    time_decode,
    versions,
)

RESULTS = Path(__file__).parent / "results"


# -- contestants: each runs in its own process and gives what time_decode gives, with `bytes` --------------------------


def untouched(attention: str = "sdpa") -> Callable[[Setting], dict[str, object]]:
    """The model with the cache that transformers gives it, on one of the attentions that transformers has."""

    def run(setting: Setting) -> dict[str, object]:
        import torch
        from transformers import DynamicCache

        model = build_model(setting, attention)

        def prefill(ids):
            out = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
            return out.logits, out.past_key_values

        if attention != "sdpa":  # what compiles does so here: a prompt of that length, then steps of growing length
            with torch.no_grad():
                _, cache = prefill(prompt_ids(setting))
                for i in range(3):
                    place = torch.tensor([[setting.prompt + i]])
                    model(torch.tensor([[3]]), past_key_values=cache, position_ids=place)
        found = time_decode(model, setting, prefill)
        return {**found, "bytes": cache_bytes(found["cache"])}

    return run


def kvcompile_policy(
    policy: str, table: str = "", *, linear: bool = True, **params: str
) -> Callable[[Setting], dict[str, object]]:
    """A library policy of kvcompile, its parameters by the names of settings; `table` is a head class of random scores.

    Kernels are built when the model is optimised, so before anything is timed. linear: with kvcompile's linear layers,
    which the bare model then has as well; else with torch's.
    """

    def run(setting: Setting) -> dict[str, object]:
        import kvcompile

        model = build_model(setting)
        with tempfile.TemporaryDirectory() as folder:
            tables = {table: head_scores(Path(folder))} if table else None
            values = {name: getattr(setting, field) for name, field in params.items()}
            kvcompile.optimize(model, policy, tables=tables, **values)
        bare = bare_as(model, setting) if linear else with_torchs_linear(model)

        def prefill(ids):
            out = model(ids, use_cache=True, logits_to_keep=1)
            return out.logits, out.past_key_values

        found = time_decode(model, setting, prefill, bare)
        report = kvcompile.report(model).to_dict()
        return {**found, "bytes": report["bytes_resident"], "bytes_peak": report["bytes_peak"]}

    return run


def bare_as(model, setting: Setting):
    """The bare model with the linear layers that an optimised one has."""
    from kvcompile.api import optimized

    bare, projections = bare_model(setting), optimized(model).forward.engine.projections
    if projections is None:
        return bare
    projections.put_into([bare])

    def run(*args, **kwargs):
        with projections.during(True):
            return bare(*args, **kwargs)

    return run


def with_torchs_linear(model) -> None:
    """Gives an optimised model the linear layers back that it came with."""
    from kvcompile.api import optimized

    for replaced in optimized(model).replaced:
        replaced.undo()


def head_scores(folder: Path) -> Path:
    """A table of random scores, a line for each layer, a column for each KV head."""
    import torch

    scores = torch.rand(LAYERS, KV_HEADS, generator=torch.Generator().manual_seed(3)).tolist()
    path = folder / "scores.tsv"
    path.write_text("".join("\t".join(f"{score:.4f}" for score in row) + "\n" for row in scores))
    return path


def kvpress_press(adaptive: bool) -> Callable[[Setting], dict[str, object]]:
    """SnapKVPress, alone or inside AdaKVPress, at the share of the prompt that the budget is."""

    def run(setting: Setting) -> dict[str, object]:
        from kvpress import AdaKVPress, SnapKVPress
        from transformers import DynamicCache

        model = build_model(setting)
        press = SnapKVPress(compression_ratio=1 - setting.budget / setting.prompt, window_size=setting.observe)
        if adaptive:
            press = AdaKVPress(press)

        def prefill(ids):
            cache = DynamicCache()
            with press(model):
                out = model(ids, past_key_values=cache, logits_to_keep=1)
            return out.logits, cache

        found = time_decode(model, setting, prefill)
        return {**found, "bytes": cache_bytes(found["cache"])}

    return run


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    run: Callable[[Setting], dict[str, object]]
    peer: bool = False


TORCHS = "kvcompile snapkv, torch's linear layers"
CONTESTANTS = (
    Contestant("untouched", untouched()),
    Contestant("untouched, FlexAttention", untouched("flex_attention")),
    Contestant("kvcompile keep_all", kvcompile_policy("keep_all")),
    Contestant("kvcompile snapkv", kvcompile_policy("snapkv", budget="budget", observe="observe")),
    Contestant(TORCHS, kvcompile_policy("snapkv", linear=False, budget="budget", observe="observe")),
    Contestant("kvcompile adakv", kvcompile_policy("adakv", budget="budget", observe="observe")),
    Contestant(
        "kvcompile prulong", kvcompile_policy("prulong", "retrieval", n_sink="sink", window="window", c="chunk")
    ),
    Contestant("kvpress SnapKV", kvpress_press(adaptive=False), peer=True),
    Contestant("kvpress AdaKV", kvpress_press(adaptive=True), peer=True),
)

STEP, ATTENTION, PREFILL = "median_ms", "attention_ms", "prefill_seconds"
WORDS = {STEP: "a step", ATTENTION: "attention part of a step", PREFILL: "prefill"}


@dataclass(frozen=True, slots=True)
class Claim:
    """The largest ratio of two contestants' times that is asked for; `of`: which time."""

    ours: str
    theirs: str
    limit: float
    of: str = STEP


CLAIMS = (
    Claim("kvcompile keep_all", "untouched", 0.6),
    Claim("kvcompile snapkv", "kvpress SnapKV", 0.9),
    Claim("kvcompile snapkv", "kvpress SnapKV", 0.6, ATTENTION),
    Claim("kvcompile adakv", "kvpress AdaKV", 0.4),
    Claim("kvcompile prulong", "untouched", 0.6, PREFILL),
)


# -- running them in turn --------------------------------------------------------------------------------------------


class Failed(Exception):
    """A contestant's process ended with an error: its last line."""


def measure(contestant: Contestant, setting: Setting, python: str) -> dict[str, object]:
    """One process of one contestant; raises Failed, with its error output passed on, where that ends badly."""
    command = [python, __file__, "--contestant", contestant.name, "--setting", json.dumps(setting.to_dict())]
    threads = str(setting.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if not contestant.peer:
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()
        print(said[-2000:], file=sys.stderr)
        raise Failed(_error_line(said))
    return json.loads(done.stdout.splitlines()[-1])


def _error_line(said: str) -> str:
    """The first line of the exception that a traceback ends with."""
    lines = [line for line in said.splitlines() if line and not line[0].isspace()]
    kinds = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (kinds or lines or ["no error output"])[-1][:300]


def one_process(name: str, setting: Setting) -> None:
    """The inside of such a process: measures and prints one line of JSON."""
    contestant = next(c for c in CONTESTANTS if c.name == name)
    found = contestant.run(setting)
    found.pop("cache")
    found["versions"] = versions("torch", "transformers", "kvpress" if contestant.peer else "kvcompile")
    found["machine"] = machine()
    print(json.dumps(found))


def compare(rounds: dict[str, list[dict]], failed: dict[str, str], setting: Setting) -> dict[str, object]:
    """Medians over the rounds, bytes against the untouched model, and each claim with its ratio per round.

    `failed`: why a contestant did not run; it has no row, and its claims are unknown.
    """
    median = {
        name: {of: statistics.median(r[of] for r in runs) for of in WORDS} for name, runs in rounds.items() if runs
    }
    full = rounds["untouched"][0]["bytes"] if rounds.get("untouched") else None
    contestants = {
        name: {
            "step_ms": round(median[name][STEP], 3),
            "attention_ms": round(median[name][ATTENTION], 3),
            "prefill_seconds": median[name][PREFILL],
            "bytes": runs[-1]["bytes"],
            "bytes_of_full": round(runs[-1]["bytes"] / full, 4) if full else None,
            "versions": runs[-1]["versions"],
        }
        for name, runs in rounds.items()
        if runs
    }
    claims = []
    for claim in CLAIMS:
        if claim.ours in median and claim.theirs in median and all(r[claim.of] > 0 for r in rounds[claim.theirs]):
            pairs = zip(rounds[claim.ours], rounds[claim.theirs], strict=True)
            ratio = median[claim.ours][claim.of] / median[claim.theirs][claim.of]
            each = [round(a[claim.of] / b[claim.of], 3) for a, b in pairs]
            found = {"ratio": round(ratio, 3), "holds": ratio <= claim.limit, "ratio_of_each_round": each}
            claims.append({**asdict(claim), **found})
    host = next((runs[0]["machine"] for runs in rounds.values() if runs), machine())
    said = {"setting": setting.to_dict(), "machine": host, "contestants": contestants, "failed": failed}
    return {**said, "claims": claims}


HOW = """\
The attention part of a step is the step's time less that of the same token through the same model, without a cache and
with an attention that gives zeros of the right shape and reads nothing; both alternate in one process, and the median
is that of the differences. kvcompile runs the linear layers of a step by a kernel of its own, as torch's use one thread
for a single row on this processor; the model without attention then has them as well, so its attention part gains
nothing by it, and one contestant runs without them. So appending to the cache counts as attention, and of kvcompile
also what its forward does around the layers. Everything that compiles did so before it was timed: kvcompile's kernels
when the model was optimised, FlexAttention in a prefill and three steps. prulong: head scores are random, 30 % of the
KV heads keep everything, the others a sink of {sink} and a window of {window}; the prompt comes in pieces of {chunk}.
Each contestant's process made the model and its prompt anew, from the same seeds."""


def as_table(found: dict[str, object], rounds: int) -> str:
    """The Markdown page of the results."""
    setting, host = found["setting"], found["machine"]
    lines = [
        "# A whole model on a CPU",
        "",
        f"Random Llama, 4 layers, 16/4 heads, head_dim 64, float32; prompt {setting['prompt']}, median of "
        f"{setting['tokens']} tokens, {setting['threads']} threads, {rounds} alternating rounds; budget "
        f"{setting['budget']}, observe {setting['observe']}. {host['cpu']}, {host['cores']} cores, "
        f"Python {host['python']}. Made by `python benchmarks/decode_cpu.py`.",
        "",
        HOW.format(**setting),
        "",
        "| contestant | ms a token | of it attention | prefill s | bytes held, of full | versions |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["contestants"].items():
        share = "" if row["bytes_of_full"] is None else f" ({row['bytes_of_full']:.3f})"
        stated = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        lines.append(
            f"| {name} | {row['step_ms']:.2f} | {row['attention_ms']:.2f} | {row['prefill_seconds']:.1f} "
            f"| {row['bytes'] / 2**20:.1f} MiB{share} | {stated} |"
        )
    lines += [f"| {name} | did not run: {why} | | | | |" for name, why in found["failed"].items()]
    if found["claims"]:
        lines += ["", "| ratio of times | value | each round | asked for | holds |", "|---|---|---|---|---|"]
        for claim in found["claims"]:
            each = ", ".join(f"{r:.2f}" for r in claim["ratio_of_each_round"])
            lines.append(
                f"| {WORDS[claim['of']]}: {claim['ours']} / {claim['theirs']} | {claim['ratio']:.3f} | {each} "
                f"| at most {claim['limit']} | {'yes' if claim['holds'] else 'no'} |"
            )
    return "\n".join(lines) + "\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME", help="names of contestants")
    parser.add_argument("--peer-python", default=os.environ.get("KVC_PEER_PYTHON"), help="Python that has kvpress")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of decode_cpu.json and decode_cpu.md")
    for field in fields(Setting):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.contestant:
        one_process(args.contestant, Setting(**json.loads(args.setting)))
        return 0
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    unknown = set(args.only or ()) - {c.name for c in CONTESTANTS}
    if unknown:
        print(f"no contestant {sorted(unknown)}; there are {[c.name for c in CONTESTANTS]}", file=sys.stderr)
        return 2
    chosen = [c for c in CONTESTANTS if args.only is None or c.name in args.only]
    if not args.peer_python and any(c.peer for c in chosen):
        print("kvpress is left out: set KVC_PEER_PYTHON to the Python of an environment that has it", file=sys.stderr)
        chosen = [c for c in chosen if not c.peer]
    rounds: dict[str, list[dict]] = {c.name: [] for c in chosen}
    failed: dict[str, str] = {}
    for turn in range(args.rounds):
        for contestant in [c for c in chosen if c.name not in failed]:
            try:
                found = measure(contestant, setting, args.peer_python if contestant.peer else sys.executable)
            except Failed as error:
                failed[contestant.name] = str(error)
                rounds[contestant.name].clear()
                print(f"round {turn + 1}: {contestant.name} did not run: {error}", file=sys.stderr)
                continue
            rounds[contestant.name].append(found)
            print(
                f"round {turn + 1}: {contestant.name:20s} {found['median_ms']:8.2f} ms a token, "
                f"prefill {found['prefill_seconds']:.1f} s",
                file=sys.stderr,
            )
    found = compare(rounds, failed, setting)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode_cpu.json").write_text(json.dumps({**found, "rounds": rounds}, indent=1) + "\n")
    table = as_table(found, args.rounds)
    (args.out / "decode_cpu.md").write_text(table)
    print(table)
    return 1 if any(not name.startswith("untouched, ") for name in failed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
