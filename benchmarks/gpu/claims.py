"""What the results must show on an H200, as data: each claim has its limit, the figure that was found, and a verdict.

Where any figure that a claim needs is missing it does not hold: it is unmeasured, or refuted by those that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]
Found = tuple[float | None, bool]  # the figure, and whether all that it speaks of was measured
Results = dict[str, Rows]  # part -> rows, each a cell with its figures


@dataclass(frozen=True)
class Claim:
    """limit: at least or at most that. found: the worst figure over the rows that it speaks of."""

    says: str
    part: str
    limit: float
    at_least: bool
    found: Callable[[Rows], Found]

    def judged(self, results: Results) -> dict[str, Any]:
        """The claim with what was found: holds is yes, no or unmeasured."""
        value, whole = self.found(results.get(self.part, []))
        kept = value is None or (value >= self.limit if self.at_least else value <= self.limit)
        holds = "no" if not kept else "yes" if whole and value is not None else "unmeasured"
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return {"claim": self.says, "limit": bound, "found": value, "holds": holds}


def _ratio(above: str, below: str) -> Callable[[dict[str, Any]], float | None]:
    def of(row: dict[str, Any]) -> float | None:
        over, under = row.get(above), row.get(below)
        return over / under if over is not None and under else None

    return of


def _worst(
    of: Callable[[dict[str, Any]], float | None], where: Callable[[dict[str, Any]], bool], worst: Callable[..., float]
) -> Callable[[Rows], Found]:
    def found(rows: Rows) -> Found:
        some = [of(row) for row in rows if where(row)]
        known = [value for value in some if value is not None]
        return (worst(known) if known else None), len(known) == len(some)

    return found


def _large(row: dict[str, Any]) -> bool:
    """By its sizes, as one that failed has no figures: 64 MiB of eight heads of 128, keys and values in bf16."""
    return bool(row["entries"] * row["batch"] * 4096 >= 64 << 20)


def _proportional(rows: Rows) -> Found:
    """Most time per live pair with local heads, over the same without any, at one length; from 32k tokens on."""
    base = {row["tokens"]: row for row in rows if row["local"] == 0 and row.get("ours")}
    some = [row for row in rows if row["local"] > 0 and row["tokens"] >= 32768]
    known = [row for row in some if row.get("ours") and row["tokens"] in base]
    worst = max((row["ours"] / row["live"] / base[row["tokens"]]["ours"] for row in known), default=None)
    return worst, len(known) == len(some)


def _model(rows: Rows, batch: int, keep: int, compile: str) -> float | None:
    wanted = {"batch": batch, "context": 32768, "keep": keep, "compile": compile}
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()) and row["policy"] != "streaming":
            return row.get("tokens")
    return None


def _gain(batch: int) -> Callable[[Rows], Found]:
    def found(rows: Rows) -> Found:
        gains = []
        for how in ("cudagraph", "cudagraph+inductor"):
            full, less = _model(rows, 16, 100, how), _model(rows, batch, 25, how)
            if full and less:
                gains.append(less / full)
        return max(gains, default=None), bool(gains)  # the better way of compiling

    return found


CLAIMS = (
    Claim(
        "decode, from 64 MiB of keys and values on: part of the copy's bytes a second",
        "decode", 0.85, True, _worst(lambda row: row.get("of_copy"), _large, min),
    ),
    Claim(
        "decode with fused scores (H2O), from 64 MiB on: times that without",
        "decode", 1.05, False, _worst(_ratio("scored", "ours"), _large, max),
    ),
    Claim(
        "ragged decode: times faster than FlexAttention",
        "decode", 1.5, True, _worst(_ratio("flex_ragged", "ragged"), lambda row: bool(row.get("flex_asked")), min),
    ),
    Claim(
        "a prompt of 64k with half of the heads local: times faster than dense SDPA",
        "prefill", 1.6, True,
        _worst(lambda row: row.get("over_dense"), lambda row: row["tokens"] == 65536 and row["local"] == 50, min),
    ),
    Claim(
        "time per pair that is read, with local heads over without, from 32k on (1: proportional; this limit is ours)",
        "prefill", 1.25, False, _proportional,
    ),
    Claim(
        "eviction: part of the time of topk + gather",
        "evict", 0.5, False, _worst(lambda row: row.get("part"), lambda row: True, max),
    ),
    Claim(
        "8B-shaped decode, batch 16 at 32k, keeping 25 %: times the tokens of the full cache (the ceiling is 2.55)",
        "model", 2.2, True, _gain(16),
    ),
    Claim(
        "the same at equal memory, batch 64 over batch 16 (no limit was set: faster at all)",
        "model", 1.0, True, _gain(64),
    ),
    Claim(
        "a step over chosen pages (1024 tokens of 64k, 8 sequences): times faster than over all",
        "pages", 4.0, True,
        _worst(lambda row: row.get("over_dense"), lambda row: row["entries"] == 65536 and row["batch"] == 8, min),
    ),
    Claim(
        "a prompt of 64k by chosen blocks, 90 % not read: times faster than dense SDPA",
        "blocks", 4.0, True,
        _worst(lambda row: row.get("over_dense"), lambda row: row["tokens"] == 65536 and row["sparse"] == 90, min),
    ),
)  # fmt: skip
