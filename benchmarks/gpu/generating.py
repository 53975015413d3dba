"""Whole-model decode of an 8B-shaped Llama with random weights, under CUDA graphs: full cache and a quarter of it.

The cache is filled with noise, not by a prompt: decode reads as many bytes whatever they say, and a prompt of sixteen
times 32k tokens would take longer than all else here.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from measuring import Bench, Cell, Figures, Part

import kvcompile
from kvcompile.cache import KvCache
from kvcompile.pages import PagedStore

SHORT = 8  # tokens of the prompt that makes the cache


def cells(size: str) -> list[Cell]:
    """Sequences, tokens of context, per cent of its entries that are kept, by which policy, compiled how."""
    names = ("batch", "context", "keep", "policy", "compile")
    if size == "dry":
        some = [(2, 32, 100, "keep_all", "eager"), (2, 32, 50, "streaming", "eager")]
    else:
        graph = "cudagraph"
        some = [
            (16, 32768, 100, "keep_all", graph),
            (16, 32768, 25, "snapkv", graph),
            (64, 32768, 25, "snapkv", graph),  # as many bytes as the full cache of 16
            (16, 32768, 25, "streaming", graph),  # evicts in every step
            (1, 8192, 100, "keep_all", graph),
            (1, 8192, 100, "keep_all", "eager"),
            (16, 32768, 100, "keep_all", "cudagraph+inductor"),
            (16, 32768, 25, "snapkv", "cudagraph+inductor"),
        ]
        some = some[:3] if size == "quick" else some
    return [dict(zip(names, sizes, strict=True)) for sizes in some]


_MODEL: list[Any] = []


def model_of(bench: Bench) -> Any:
    """Built once: Llama-3.1-8B's shape, weights drawn on the device; tiny in a dry run."""
    if not _MODEL:
        from transformers import LlamaConfig, LlamaForCausalLM

        large = {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        }  # fmt: skip
        small = {
            "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        }  # fmt: skip
        config = LlamaConfig(**(small if bench.dry else large), max_position_embeddings=1 << 18, rope_theta=500000.0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        try:
            with bench.device:
                _MODEL.append(LlamaForCausalLM(config).eval())
        finally:
            torch.set_default_dtype(before)
    return _MODEL[0]


def policy_of(cell: Cell, kept: int) -> tuple[str, dict[str, Any]]:
    """The library policy that holds `kept` entries a row."""
    params: dict[str, dict[str, Any]] = {
        "keep_all": {},
        "snapkv": {"budget": kept},
        "streaming": {"n_sink": 4, "window": kept - 4},
    }
    return cell["policy"], params[cell["policy"]]


def fill(cache: KvCache, context: int, kept: int) -> None:
    """Let every row hold `kept` entries of noise, as if a prompt of `context` tokens had been read."""
    store, page = cache.store, cache.plan.page
    assert isinstance(store, PagedStore)
    rows = store.length.shape[0]
    for layer in range(cache.plan.facts.layers):
        store.reserve(layer, [kept] * store.rows)
    store.commit()
    held, pages = -(-kept // page), store.free.shape[0]
    shuffled = torch.randperm(pages, device=store.device).int()
    store.table[:, :held] = shuffled[: rows * held].view(rows, held)
    store.free[: pages - rows * held] = shuffled[rows * held :]
    store.top.fill_(pages - rows * held)
    store.length.fill_(kept)
    # A sink, then the newest: positions that any policy here would keep.
    places = torch.arange(held * page, dtype=torch.int32, device=store.device)
    places = torch.where(places < 4, places, places + (context - kept)).clamp(max=context - 1)
    at = store.table[:, :held].long()
    store.pools.pos.view(pages, page)[at.flatten()] = places.view(held, page).repeat(rows, 1)
    store.pools.frozen.zero_()
    for pool in (store.pools.k, store.pools.v):
        pool.normal_()
    for each in cache.sequences.each:
        each.seen = each.prompt = context
        each.steps, each.prefilled = 0, True


def measure(bench: Bench, cell: Cell) -> Figures:
    """Milliseconds a step, tokens a second of all sequences together; floor: weights and cache once at copy speed."""
    batch, context = cell["batch"], cell["context"]
    kept = context * cell["keep"] // 100
    model = model_of(bench)
    policy, params = policy_of(cell, kept)
    how, backend = cell["compile"], "triton"
    kvcompile.optimize(model, policy, backend=backend, compile=how, **params)
    figures: Figures = {}
    try:
        bench.attempt(figures, "step", lambda: _step(bench, model, batch, context, kept) * 1e3)
        facts = model.forward.engine.plan.facts
        figures["cache_gib"] = batch * facts.layers * facts.kv_heads * kept * facts.entry_bytes / 2**30
        figures["graphs"] = kvcompile.report(model).cuda_graphs if figures["step"] else None
    finally:
        kvcompile.restore(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.get_input_embeddings().weight.nbytes  # a step reads one row of it for each sequence
    moved = weights + figures["cache_gib"] * 2**30
    figures["floor"] = moved / bench.copy_rate(1 << (20 if bench.dry else 31)) * 1e3
    figures["tokens"] = batch / figures["step"] * 1e3 if figures["step"] else None
    return figures


def _step(bench: Bench, model: Any, batch: int, context: int, kept: int) -> float:
    """Seconds a step: graphs are captured by then, and the host runs ahead of the device."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, SHORT), device=bench.device)
    warm, count = (1, 1) if bench.dry else (6, 40)
    with torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        fill(cache, context, kept)
        token = ids[:, :1].contiguous()
        for _ in range(warm):
            model(token, past_key_values=cache, logits_to_keep=1)
        if bench.dry:
            start = time.perf_counter()
            model(token, past_key_values=cache, logits_to_keep=1)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            model(token, past_key_values=cache, logits_to_keep=1)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / count


PART = Part(
    "model",
    "Whole-model decode",
    "Llama-3.1-8B's shape with random weights in bf16, a cache filled with noise; every step appends one token to "
    "each sequence. floor: weights and resident keys and values read once at the copy's bytes a second.",
    cells,
    measure,
    (
        ("cache_gib", "keys and values", "GiB"),
        ("step", "step", "ms"),
        ("floor", "floor", "ms"),
        ("tokens", "tokens/s", ""),
        ("graphs", "graphs captured", ""),
    ),
)
