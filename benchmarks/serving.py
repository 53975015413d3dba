"""Hours of serving in minutes: does memory stay flat, is nothing lost, is every token right?

    python benchmarks/serving.py

Requests of random lengths arrive at random for several policies, run together on one cache for each policy, and end
or are cancelled. A tick gives every running request one token. A sample of the requests is run again, alone and by the
eager reference, and compared token by token. No speed is measured. Writes benchmarks/results/serving.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import versions
from _serving import Request, Server, Traffic, arrivals, conserved, replay

RESULTS = Path(__file__).parent / "results"
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "keep_all": ("keep_all", {}),
    "snapkv": ("snapkv", {"budget": 48, "observe": 8}),
    "h2o": ("h2o", {"heavy": 24, "local": 24}),
    "streaming": ("streaming", {"window": 60}),
    "adakv": ("adakv", {"budget": 48, "observe": 8}),
}
FLAT = 0.02  # by how much resident memory may differ between the second and the last quarter
LOOKS = 100  # times at which memory and slots are looked at
NEAR = 1e-3  # logits closer than this are a tie that rounding may turn over


@dataclass(frozen=True, slots=True)
class Setting:
    """`hours` of simulated time; a tick is the time that a token takes."""

    hours: float = 2.0
    tick_seconds: float = 0.25
    most: int = 6
    sample: int = 40
    seed: int = 0
    backend: str = "auto"
    rate: float = 0.06

    @property
    def ticks(self) -> int:
        return round(self.hours * 3600 / self.tick_seconds)


def build_model(policy: str, backend: str) -> Any:
    """A random Llama of two layers with sharp attention, the same weights each time, optimised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvcompile

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    name, params = POLICIES[policy]
    return kvcompile.optimize(model, name, backend=backend, **params)


def resident() -> int:
    """Bytes of memory that this process has in use, after what Python no longer needs has gone."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(setting: Setting, policies: Sequence[str]) -> dict[str, Any]:
    """The whole run: figures of memory, of each policy, and of the replayed sample."""
    traffic = Traffic(rate=setting.rate)
    servers = {name: Server(build_model(name, setting.backend), setting.most) for name in policies}
    coming = {name: arrivals(traffic, setting.ticks, setting.seed + i) for i, name in enumerate(policies)}
    following = {name: next(some, None) for name, some in coming.items()}
    done = {name: Done(setting.sample, random.Random(setting.seed)) for name in policies}
    memory: list[int] = []
    started, lost = time.perf_counter(), 0
    for now in range(setting.ticks):
        for name, server in servers.items():
            while (request := following[name]) is not None and request.arrives <= now:
                server.waiting.append(request)
                following[name] = next(coming[name], None)
            for request in server.tick(now):
                done[name].add(request)
        if now % max(1, setting.ticks // LOOKS) == 0:
            memory.append(resident())
            lost += sum(not conserved(s.cache) for s in servers.values() if s.cache is not None)
    seconds = time.perf_counter() - started
    rows = {name: _row(servers[name], done[name], name) for name in policies}
    return {
        "setting": asdict(setting), "traffic": asdict(traffic), "seconds": seconds, "memory": memory,
        "drift": drift(memory), "lost": lost, "policies": rows,
        "versions": versions("torch", "transformers", "kvcompile"),
    }  # fmt: skip


class Done:
    """What has ended: figures of all, and an even sample of those that have got a token, so that memory stays flat."""

    def __init__(self, most: int, dice: random.Random) -> None:
        self.most, self.dice = most, dice
        self.requests = self.cancelled = self.tokens = self.answered = 0
        self.sample: list[Request] = []

    def add(self, request: Request) -> None:
        self.requests += 1
        self.cancelled += len(request.tokens) < request.wanted
        self.tokens += len(request.tokens)
        if not request.tokens:
            return
        self.answered += 1
        if len(self.sample) < self.most:
            self.sample.append(request)
        elif (at := self.dice.randrange(self.answered)) < self.most:
            self.sample[at] = request


def _row(server: Server, done: Done, name: str) -> dict[str, Any]:
    model = build_model(name, "reference")
    differing = [gap for at, gap in (replay(model, request) for request in done.sample) if at is not None]
    return {
        "requests": done.requests, "cancelled": done.cancelled, "steps": server.steps, "tokens": done.tokens,
        "peak_bytes": server.peak, "replayed": len(done.sample),
        "replayed_tokens": sum(len(r.tokens) for r in done.sample),
        "wrong": sum(gap >= NEAR for gap in differing), "ties": sum(gap < NEAR for gap in differing),
    }  # fmt: skip


def drift(memory: Sequence[int]) -> float:
    """How much more memory the last quarter had than the second, relative; the first is warming up."""
    quarter = max(1, len(memory) // 4)
    early, late = sorted(memory[quarter : 2 * quarter]), sorted(memory[-quarter:])
    if not early:
        return 0.0
    return late[len(late) // 2] / early[len(early) // 2] - 1


def page(found: dict[str, Any]) -> str:
    """The run as a Markdown page."""
    setting = found["setting"]
    held = "holds" if abs(found["drift"]) <= FLAT else "does not hold"
    with_ = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    columns = ("requests", "cancelled", "steps", "tokens", "peak_bytes", "replayed", "replayed_tokens", "wrong", "ties")
    lines = [
        "# Serving",
        "",
        f"{setting['hours']:g} hours of simulated serving, {setting['tick_seconds']:g} s a token, "
        f"in {found['seconds']:.0f} s on a CPU; at most {setting['most']} sequences at a time for each policy, "
        f"backend `{setting['backend']}`; {with_}.",
        "",
        f"- resident memory, last quarter against second: {found['drift']:+.2%} (limit {FLAT:.0%}: {held}), "
        f"{found['memory'][-1] / 2**20:.0f} MiB at the end",
        f"- caches in which a slot was lost or given out twice, of {len(found['memory'])} looks: {found['lost']}",
        f"- wrong: the replay's two best logits are {NEAR:g} or more apart where a token differs; else it is a tie",
        "",
        "| policy | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in found["policies"].items():
        lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: memory flat, nothing lost, nothing wrong; else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--only", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = vars(parser.parse_args(arguments))
    only, out = options.pop("only"), options.pop("out")
    torch.set_num_threads(1)  # the model is so small that a second thread would cost more than it does
    found = serve(Setting(**options), only)
    out.mkdir(parents=True, exist_ok=True)
    (out / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
    text = page(found)
    (out / "serving.md").write_text(text)
    print(text, end="")
    wrong = sum(row["wrong"] for row in found["policies"].values())
    return int(bool(found["lost"] or wrong or abs(found["drift"]) > FLAT))


if __name__ == "__main__":
    raise SystemExit(main())
