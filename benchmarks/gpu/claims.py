"""What the results must show on an H200, as data: each claim has its limit, the figure that was found, and a verdict.

A claim is judged on what was measured in one run; where any figure that it needs is missing, it is unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]
Results = dict[str, Rows]  # part -> rows, each a cell with its figures


@dataclass(frozen=True)
class Claim:
    """limit: at least or at most that. found: the worst figure over the rows that it speaks of, None without any."""

    says: str
    part: str
    limit: float
    at_least: bool
    found: Callable[[Rows], float | None]

    def judged(self, results: Results) -> dict[str, Any]:
        """The claim with what was found: holds is yes, no or unmeasured."""
        value = self.found(results.get(self.part, []))
        holds = "unmeasured"
        if value is not None:
            holds = "yes" if (value >= self.limit if self.at_least else value <= self.limit) else "no"
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return {"claim": self.says, "limit": bound, "found": value, "holds": holds}


def _ratio(above: str, below: str) -> Callable[[dict[str, Any]], float | None]:
    def of(row: dict[str, Any]) -> float | None:
        over, under = row.get(above), row.get(below)
        return over / under if over is not None and under else None

    return of


def _worst(
    of: Callable[[dict[str, Any]], float | None], where: Callable[[dict[str, Any]], bool], worst: Callable[..., float]
) -> Callable[[Rows], float | None]:
    def found(rows: Rows) -> float | None:
        some = [of(row) for row in rows if where(row)]
        known = [value for value in some if value is not None]
        return worst(known) if known and len(known) == len(some) else None

    return found


def _large(row: dict[str, Any]) -> bool:
    return (row.get("mib") or 0) >= 64


def _proportional(rows: Rows) -> float | None:
    """Most time per live pair with local heads, over the same without any, at one length; from 32k tokens on."""
    base = {row["tokens"]: row for row in rows if row["local"] == 0 and row.get("ours")}
    some = [row for row in rows if row["local"] > 0 and row["tokens"] >= 32768]
    if not some or not all(row.get("ours") and row["tokens"] in base for row in some):
        return None
    return max(row["ours"] / row["live"] / base[row["tokens"]]["ours"] for row in some)


def _model(rows: Rows, batch: int, keep: int, compile: str) -> float | None:
    wanted = {"batch": batch, "context": 32768, "keep": keep, "compile": compile}
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()) and row["policy"] != "streaming":
            return row.get("tokens")
    return None


def _gain(batch: int) -> Callable[[Rows], float | None]:
    def found(rows: Rows) -> float | None:
        gains = []
        for how in ("cudagraph", "cudagraph+inductor"):
            full, less = _model(rows, 16, 100, how), _model(rows, batch, 25, how)
            if full and less:
                gains.append(less / full)
        return max(gains, default=None)

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
