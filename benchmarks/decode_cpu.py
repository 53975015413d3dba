"""Decode on a CPU, side by side: the untouched model, kvcompile, and kvpress where it is installed.

    python benchmarks/decode_cpu.py [--rounds 3] [--only NAME ...] [--prompt N]

Each contestant runs in a process of its own, kvpress under the Python that KVC_PEER_PYTHON names (it needs an older
transformers). The contestants take turns, `--rounds` times, so that a drift of the machine falls on all of them.
Writes benchmarks/results/decode_cpu.json (all that was measured) and decode_cpu.md (the table).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from _common import Setting, build_model, cache_bytes, machine, time_decode, versions

RESULTS = Path(__file__).parent / "results"


# -- contestants: each runs in its own process and gives what time_decode gives, with `bytes` --------------------------


def untouched(setting: Setting) -> dict[str, object]:
    """The model with the cache that transformers gives it."""
    from transformers import DynamicCache

    model = build_model(setting)

    def prefill(ids):
        out = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        return out.logits, out.past_key_values

    found = time_decode(model, setting, prefill)
    return {**found, "bytes": cache_bytes(found["cache"])}


def kvcompile_policy(policy: str, **params: int) -> Callable[[Setting], dict[str, object]]:
    """A library policy of kvcompile; a parameter that is the name of a setting takes the setting's value."""

    def run(setting: Setting) -> dict[str, object]:
        import kvcompile

        model = build_model(setting)
        kvcompile.optimize(model, policy, **{name: getattr(setting, name) for name in params})

        def prefill(ids):
            out = model(ids, use_cache=True, logits_to_keep=1)
            return out.logits, out.past_key_values

        found = time_decode(model, setting, prefill)
        report = kvcompile.report(model).to_dict()
        return {**found, "bytes": report["bytes_resident"], "bytes_peak": report["bytes_peak"]}

    return run


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


CONTESTANTS = (
    Contestant("untouched", untouched),
    Contestant("kvcompile keep_all", kvcompile_policy("keep_all")),
    Contestant("kvcompile snapkv", kvcompile_policy("snapkv", budget=0, observe=0)),
    Contestant("kvcompile adakv", kvcompile_policy("adakv", budget=0, observe=0)),
    Contestant("kvpress SnapKV", kvpress_press(adaptive=False), peer=True),
    Contestant("kvpress AdaKV", kvpress_press(adaptive=True), peer=True),
)

# (ours, theirs, largest ratio of step times that is asked for)
CLAIMS = (
    ("kvcompile keep_all", "untouched", 1.0),
    ("kvcompile snapkv", "kvpress SnapKV", 1.0),
    ("kvcompile adakv", "kvpress AdaKV", 0.4),
)


# -- running them in turn --------------------------------------------------------------------------------------------


def measure(contestant: Contestant, setting: Setting, python: str) -> dict[str, object]:
    """One process of one contestant. Raises RuntimeError with the end of its error output."""
    command = [python, __file__, "--contestant", contestant.name, "--setting", json.dumps(setting.to_dict())]
    threads = str(setting.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if not contestant.peer:
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contestant.name}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_process(name: str, setting: Setting) -> None:
    """The inside of such a process: measures and prints one line of JSON."""
    contestant = next(c for c in CONTESTANTS if c.name == name)
    found = contestant.run(setting)
    found.pop("cache")
    found["versions"] = versions("torch", "transformers", "kvpress" if contestant.peer else "kvcompile")
    found["machine"] = machine()
    print(json.dumps(found))


def compare(rounds: dict[str, list[dict]], setting: Setting) -> dict[str, object]:
    """Medians over the rounds, bytes against the untouched model, and each claim with its ratio per round."""
    step = {name: statistics.median(r["median_ms"] for r in runs) for name, runs in rounds.items()}
    full = rounds["untouched"][0]["bytes"] if "untouched" in rounds else None
    contestants = {
        name: {
            "step_ms": round(step[name], 3),
            "prefill_seconds": statistics.median(r["prefill_seconds"] for r in runs),
            "bytes": runs[-1]["bytes"],
            "bytes_of_full": round(runs[-1]["bytes"] / full, 4) if full else None,
            "versions": runs[-1]["versions"],
        }
        for name, runs in rounds.items()
    }
    claims = []
    for ours, theirs, limit in CLAIMS:
        if ours in step and theirs in step:
            pairs = zip(rounds[ours], rounds[theirs], strict=True)
            ratio = step[ours] / step[theirs]
            each = [round(a["median_ms"] / b["median_ms"], 3) for a, b in pairs]
            claims.append(
                {"ours": ours, "theirs": theirs, "ratio": round(ratio, 3), "limit": limit, "holds": ratio <= limit}
                | {"ratio_of_each_round": each}
            )
    host = next(iter(rounds.values()))[0]["machine"]
    return {"setting": setting.to_dict(), "machine": host, "contestants": contestants, "claims": claims}


def as_table(found: dict[str, object], rounds: int) -> str:
    """The Markdown page of the results."""
    setting, host = found["setting"], found["machine"]
    lines = [
        "# Decode on a CPU",
        "",
        f"Random Llama, 4 layers, 16/4 heads, head_dim 64, float32; prompt {setting['prompt']}, median of "
        f"{setting['tokens']} tokens, {setting['threads']} threads, {rounds} alternating rounds; budget "
        f"{setting['budget']}, observe {setting['observe']}. {host['cpu']}, {host['cores']} cores, "
        f"Python {host['python']}. Made by `python benchmarks/decode_cpu.py`.",
        "",
        "| contestant | ms a token | prefill s | bytes held, of full | versions |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["contestants"].items():
        share = "" if row["bytes_of_full"] is None else f" ({row['bytes_of_full']:.3f})"
        stated = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        lines.append(
            f"| {name} | {row['step_ms']:.2f} | {row['prefill_seconds']:.1f} | {row['bytes'] / 2**20:.1f} MiB{share} "
            f"| {stated} |"
        )
    if found["claims"]:
        lines += ["", "| ratio of step times | value | each round | asked for | holds |", "|---|---|---|---|---|"]
        for claim in found["claims"]:
            each = ", ".join(f"{r:.2f}" for r in claim["ratio_of_each_round"])
            lines.append(
                f"| {claim['ours']} / {claim['theirs']} | {claim['ratio']:.3f} | {each} | at most {claim['limit']} "
                f"| {'yes' if claim['holds'] else 'no'} |"
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
    for turn in range(args.rounds):
        for contestant in chosen:
            found = measure(contestant, setting, args.peer_python if contestant.peer else sys.executable)
            rounds[contestant.name].append(found)
            print(
                f"round {turn + 1}: {contestant.name:20s} {found['median_ms']:8.2f} ms a token, "
                f"prefill {found['prefill_seconds']:.1f} s",
                file=sys.stderr,
            )
    found = compare(rounds, setting)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode_cpu.json").write_text(json.dumps({**found, "rounds": rounds}, indent=1) + "\n")
    table = as_table(found, args.rounds)
    (args.out / "decode_cpu.md").write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
