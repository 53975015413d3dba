"""The account of one cache's life: footprint, peak, bytes, time. Counted, never estimated.

Footprint follows PruLong (arXiv 2506.17121): each forward of n tokens on P resident entries adds
n(n+1)/2 + nP, over T(T+1)/2, mean over KV heads; peak is the largest mean over KV heads of P + n, over T.
Both are counted for every KV head; whole numbers until they are asked for, so that means are exact.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.extents import ExtentStore
from kvcompile.kernels.layout import Clock
from kvcompile.kernels.plan import PolicyPlan, Region
from kvcompile.pages import PagedStore
from kvcompile.passes.reading import idle_weights, step_reads
from kvcompile.sequences import Piece
from kvcompile.tally import Tally

_waiting: list[Run] = []  # caches that went where nothing could be counted


def _traced() -> bool:
    """Whether operators mean something else just now: torch traces with stand-ins, or some mode looks on."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._dispatch_tls_local_exclude_set().has(
        torch._C.DispatchKey.Python
    )


def _let_go() -> None:
    """Close what waits. Garbage is collected at any time: where torch traces, the next cache that comes sees to it."""
    while _waiting and not _traced():
        run = _waiting.pop()
        run._closed = run._memory()
        del run.store


class Run:
    """Accounts for one cache. After `close` the numbers stay, the memory does not."""

    def __init__(self, plan: PolicyPlan, store: ExtentStore | PagedStore, batch: int) -> None:
        _let_go()
        self.plan, self.store = plan, store
        self.batch = batch
        self.start()
        self._closed: dict[str, object] | None = None

    def start(self) -> None:
        """As new: nothing has run."""
        batch, store = self.batch, self.store
        self.tally = Tally(self.plan, batch, store.device)  # there, as a step must not wait for its own lengths
        self.triangles = [0] * batch  # n(n+1)/2, the same for all heads
        self.tokens = [0] * batch
        self.prefill_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_tokens = 0
        self.decode_seconds = 0.0
        self.bytes_peak = 0

    def before(self, pieces: Sequence[Piece], lengths: Tensor, width: int, evicts: bool) -> None:
        """A forward of `width` columns is about to run on rows of these lengths, int32 [layers, batch, kv_heads];
        evicts: some of them may lose entries."""
        counts = [p.new + p.peek for p in pieces]
        self.tally.before(counts, lengths, not evicts and all(p.step and p.new == 1 for p in pieces))
        for b, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            self.tokens[b] += piece.new
            self.triangles[b] += count * (count + 1) // 2
        fresh = self.batch * width * self.plan.facts.kv_heads * self.plan.facts.entry_bytes
        self.bytes_peak = max(self.bytes_peak, self.store.bytes_allocated() + max(fresh, self.store.transient))
        self.store.transient = 0

    def timed(self, seconds: float, step: bool, tokens: int) -> None:
        """A forward of so many real tokens took so long, on the host's clock."""
        if step:
            self.decode_tokens += tokens
            self.decode_seconds += seconds
        else:
            self.prefill_tokens += tokens
            self.prefill_seconds += seconds

    def select(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what `sequences[i]` was, its account with it. Call when the store has it so."""
        self.tally.select(sequences)
        self.triangles, self.tokens = ([counts[b] for b in sequences] for counts in (self.triangles, self.tokens))
        self.batch = len(sequences)
        self.bytes_peak = max(self.bytes_peak, self.store.bytes_allocated() + self.store.transient)
        self.store.transient = 0

    def take_over(self, runs: Sequence[Run]) -> None:
        """The accounts of these caches, whose sequences this one now holds, in order."""
        self.tally.take_over([r.tally for r in runs])
        self.triangles, self.tokens = [n for r in runs for n in r.triangles], [n for r in runs for n in r.tokens]
        for name in ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds"):
            setattr(self, name, sum(getattr(r, name) for r in runs))
        self.bytes_peak = max(self.store.bytes_allocated(), *(r.bytes_peak for r in runs))

    def take_back(self, b: int, tokens: int, steps: int) -> None:
        """A sequence has lost its newest tokens, of which so many were steps; what they cost stays."""
        self.tally.settle()
        self.tokens[b] -= tokens
        # A restored cache, or what was selected, may hold tokens that no forward of this account has brought.
        self.decode_tokens = max(0, self.decode_tokens - steps)
        self.prefill_tokens = max(0, self.prefill_tokens - (tokens - steps))

    def close(self) -> None:
        """Take down the figures that need the memory, then let it go."""
        _waiting.append(self)
        _let_go()

    def _memory(self) -> dict[str, object]:
        lengths = self.store.lengths()
        facts = self.plan.facts
        heads = facts.layers * facts.kv_heads
        seen = sum(self.tokens)
        entries = int(lengths.sum())
        full = sum(facts.untouched(tokens) for tokens in self.tokens) * facts.entry_bytes
        weights = facts.weight_bytes - idle_weights(self.plan)
        read = weights + self._step_bytes(lengths)
        return {
            "kept": entries / (seen * heads) if seen else 1.0,
            "bytes_resident": self.store.bytes_resident(),
            "bytes_allocated": self.store.bytes_allocated(),
            "bytes_full": full,
            "bytes_peak": max(self.bytes_peak, self.store.bytes_allocated()),
            "lengths": lengths[:, 0].tolist(),
            "evictions": self._dropped(lengths),
            "ceiling": (facts.weight_bytes + full) / read if read else 1.0,
        }

    def _dropped(self, lengths: Tensor) -> int:
        """Entries that the policy has dropped. Rows of which it keeps all have none: what leaves the model's window
        there leaves the untouched cache, too; in other rows such entries count with those that lost."""
        plan, seen = self.plan, sum(self.tokens)
        held = lengths.sum(1).tolist()
        keeps = [
            cls.only_picks or any(isinstance(t, Region) and t.kind == "all" for t in cls.keep) for cls in plan.classes
        ]
        losing = {cls.rows_of if cls.rows_of is not None else i for i, cls in enumerate(plan.classes) if not keeps[i]}
        rows = [(layer, head) for layer in plan.live for head, of in enumerate(plan.class_of[layer]) if of in losing]
        return sum(seen - held[layer][head] for layer, head in rows)

    def _step_bytes(self, lengths: Tensor) -> int:
        """Keys, values and landmarks that a decode step reads of rows of these lengths."""
        entry, total = self.plan.facts.entry_bytes, 0.0
        if not self.plan.reads:
            return int(lengths.sum()) * entry
        for b, (tokens, clock) in enumerate(zip(self.tokens, self.store.clock.tolist(), strict=True)):
            held = lengths[:, b].tolist()
            rows = {(layer, head): n for layer, line in enumerate(held) for head, n in enumerate(line)}
            prompt = min(clock[Clock.PROMPT], tokens)
            step = step_reads(self.plan, rows, prompt, tokens - prompt, {})
            total += step.entries * entry + step.landmark_bytes
        return int(total)

    def numbers(self) -> dict[str, object]:
        """The figures of the report, in its keys. `lengths` is that of the first sequence; ratios are means over
        sequences of each one's own ratio, `by_head` [layer][KV head]."""
        tally, total = self.tally, torch.tensor(self.tokens, dtype=torch.float64).clamp(min=1)
        area, widest, widest_sum = (t.cpu() for t in tally.settled())
        heads = self.plan.facts.layers * self.plan.facts.kv_heads
        triangles = torch.tensor(self.triangles)[:, None] * tally.reads.cpu()
        spent = (area + triangles) / (total * (total + 1) / 2)[:, None]
        return {
            "footprint": float(spent.mean()),
            "peak": float((widest_sum / (heads * total)).mean()),
            "footprint_by_head": spent.mean(1).tolist(),
            "peak_by_head": (widest / total[:, None]).mean(1).tolist(),
            "prefill_seconds": self.prefill_seconds,
            "decode_tokens_per_second": self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0,
            **(self._memory() if self._closed is None else self._closed),
        }


class Stopwatch:
    """Host seconds of a block; waits for the device at the end of a prefill only."""

    def __init__(self, device: torch.device, wait: bool) -> None:
        self.device, self.wait = device, wait

    def __enter__(self) -> Stopwatch:
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self.start
