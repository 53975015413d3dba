"""What the decode benchmark's contestants share: the model, the timed loop, the facts of the machine.

Runs under each contestant's own Python, so it needs torch and transformers only, and no fixed version of either.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setting:
    """One measurement; sizes in tokens."""

    prompt: int = 16384
    tokens: int = 64
    warm_up: int = 4
    threads: int = 2
    budget: int = 1638
    observe: int = 64
    sink: int = 128
    window: int = 1024
    chunk: int = 2048

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


LAYERS, Q_HEADS, KV_HEADS = 4, 16, 4


def build_model(setting: Setting, attention: str = "sdpa"):
    """A random Llama: 4 layers, 16/4 heads, head_dim 64, float32; the same weights in every environment."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=64,
        max_position_embeddings=2 * setting.prompt,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def bare_model(setting: Setting):
    """The same model whose attention reads nothing and gives zeros of the right shape: what is left of a step."""
    from transformers import AttentionInterface

    def nothing(module, query, key, value, attention_mask, **_):
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None

    AttentionInterface.register("nothing", nothing)
    return build_model(setting, "nothing")


def prompt_ids(setting: Setting):
    """Token ids [1, prompt], the same in every environment."""
    import torch

    return torch.randint(3, 512, (1, setting.prompt), generator=torch.Generator().manual_seed(1))


def time_decode(model, setting: Setting, prefill, bare=None) -> dict[str, object]:
    """Times `prefill(ids) -> (last logits, cache)` once and then each greedy step alone.

    Positions are explicit, because a cache that dropped entries no longer tells the length of the text. After each step
    the same token runs through the bare model, without a cache: what a step takes beyond that is its attention part.
    bare: that model, where the contestant runs more than attention in its own way; else `bare_model`. Gives seconds
    of the prefill, milliseconds of each step and of each bare one, medians (of the steps, and of what each takes
    beyond its bare one), and the cache.
    """
    import torch

    ids, bare = prompt_ids(setting), bare or bare_model(setting)
    steps, rests = [], []
    with torch.no_grad():
        start = time.perf_counter()
        logits, cache = prefill(ids)
        prefill_seconds = time.perf_counter() - start
        for i in range(setting.warm_up + setting.tokens):
            token = logits[:, -1:].argmax(-1)
            place = torch.tensor([[setting.prompt + i]])
            start = time.perf_counter()
            out = model(token, past_key_values=cache, position_ids=place)
            between = time.perf_counter()
            bare(token, position_ids=place, use_cache=False)
            steps.append((between - start) * 1e3)
            rests.append((time.perf_counter() - between) * 1e3)
            logits = out.logits
    timed, rest = steps[setting.warm_up :], rests[setting.warm_up :]
    beyond = [step - bare_step for step, bare_step in zip(timed, rest, strict=True)]
    return {
        "prefill_seconds": round(prefill_seconds, 3),
        "step_ms": [round(ms, 3) for ms in timed],
        "bare_ms": [round(ms, 3) for ms in rest],
        "median_ms": round(statistics.median(timed), 3),
        "attention_ms": round(statistics.median(beyond), 3),
        "cache": cache,
    }


def cache_bytes(cache) -> int:
    """Keys and values that a Hugging Face cache holds."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def machine() -> dict[str, object]:
    """The processor as the system names it, its threads and the platform."""
    import os

    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        names = [line.split(":", 1)[1].strip() for line in listing.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def versions(*names: str) -> dict[str, str]:
    """Versions of the named distributions; of a package that runs from its tree the one it says; others left out."""
    import sys
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in sys.modules:
                found[name] = sys.modules[name].__version__
    return found
