"""A prompt in one piece through our operators, and the page of the benchmark of reads."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import torch
from _attention_page import claim_line, table
from torch import Tensor

from kvcompile import sequences
from kvcompile.extents import ExtentStore
from kvcompile.kernels import ops
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy

HOW = """\
All contestants of a table ran in one process and took turns, each round another one first; milliseconds are medians
over the rounds of the median of a round's calls. Before each call {sweep} MiB are written, so that keys, values and
landmarks come from memory. Rows have {q}/{kv} heads, head_dim {d}; keys and queries are drawn at random, so query
heads of a group hardly agree on what they choose, which is the worst case. kvcompile ran {kernels}; a step's time
includes appending its entry and keeping landmarks, a piece's the landmarks of the whole prompt.

"predicted" is the ratio to our dense read that arithmetic gives: in decode by bytes (landmarks once for each KV head,
chosen pages once for each query head; all keys once more where single entries are chosen), in prefill by the part of
causal blocks, or for PowerAttention of pairs, that is live. What is asked of prefill is 1.3 times that. Layers without
attention are measured on a whole random Llama of four layers, 16/4 heads of 64, against a model of the two others,
between which the feed-forward halves of the missing two run as plain modules: same weights, equal logits."""


class Piece:
    """One sequence's prompt in one layer: q [1, q_heads, n, D], k and v [1, kv_heads, n, D]."""

    def __init__(self, policy: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        n, width, dtype = q.shape[2], q.shape[3], str(q.dtype).removeprefix("torch.")
        plan = compile_policy(policy, ModelFacts(1, q.shape[1], k.shape[1], width, dtype)).plan
        backend = ops.backend("cpu")
        backend.prepare(plan)
        self.key, self.scale, self.tensors = ops.register(ops.Program(plan, backend)), width**-0.5, (q, k, v)
        self.store = ExtentStore(plan, 1, q.dtype, torch.device("cpu"))
        self.store.cover(n)
        known, piece = sequences.Sequences(plan, 1), [sequences.Piece(n, ends=True)]
        known.begin_prefill([n])
        clock, counts = known.numbers(piece)
        fires = torch.tensor(known.fires(piece, self.store.lengths()), dtype=torch.uint8)
        for name, source in (("clock", clock), ("counts", counts), ("fires", fires)):
            getattr(self.store, name).copy_(source)

    def read(self) -> Tensor:
        """The piece's read, landmarks from nothing: [1, n, q_heads, D]."""
        self.store.marked.zero_()
        out: Tensor = torch.ops.kvc.attend_prefill_v1(*self.tensors, list(self.store.site(0)), self.scale, self.key)
        return out


def page(found: dict[str, Any]) -> str:
    """The Markdown page."""
    setting, host = found["setting"], found["machine"]
    used = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "# Narrowed reads on a CPU",
        "",
        f"{host['cpu']}, {host['cores']} cores, {setting['threads']} threads, Python {host['python']}, {used}; "
        f"{setting['rounds']} rounds of {setting['calls']} calls, prefill {setting['slow_rounds']} rounds. "
        f"Made by `{shlex.join(['python', 'benchmarks/reads_cpu.py', *sys.argv[1:]])}`.",
        "",
        HOW.format(sweep=setting["sweep"], q=32, kv=8, d=128, kernels=found["kernels"]),
    ]
    claims = [(section["title"], claim) for section in found["sections"] for claim in section["claims"]]
    lines += ["", "| comparison | ratio | each round | asked for | holds |", "|---|---|---|---|---|"]
    lines += [claim_line(title, claim) for title, claim in claims]
    for section in found["sections"]:
        rows = table(section["rows"], section["base"])
        told = [
            f" {section['predicted'][name]:.3f} |" if name in section["predicted"] else " |" for name in section["rows"]
        ]
        lines += ["", f"## {section['title']}", "", rows[0] + " predicted |", rows[1] + "---|"]
        lines += [row + more for row, more in zip(rows[2:], told, strict=True)]
    return "\n".join(lines) + "\n"
