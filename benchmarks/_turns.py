"""Contestants of one process that take turns, so that a slow spell of the machine falls on all of them.

Takes contestants; gives a row each: median milliseconds, those of each round, bytes a second, or why it did not run.
Guarantees: whatever compiles does so before anything is timed; results are compared before they are timed; a contestant
that fails costs its own row only. Needs torch and nothing of the package.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WARM_UP = 2
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the largest number of the result
Row = dict[str, Any]


class Absent(Exception):
    """Raised by a contestant that is not there: why, in a sentence."""


def nothing() -> None:
    """What most contestants need before a call."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """`run` is timed, `before` is not and runs ahead of each call; `bytes` are those that a call must move.

    like: the contestant whose result this one's must equal; view: makes the results of both one shape.
    """

    name: str
    run: Callable[[], Any]
    before: Callable[[], object] = nothing
    bytes: int = 0
    like: str | None = None
    view: Callable[[Any], Any] = field(default=lambda out: out)


@dataclass(frozen=True, slots=True)
class Claim:
    """The largest ratio of two contestants' times that is asked for."""

    ours: str
    theirs: str
    limit: float


@dataclass(frozen=True, slots=True)
class Section:
    """One comparison: who takes part, whose time is 1 in its table, what is claimed, what bytes or pairs predict.

    slow: its contestants take fewer turns, of one call each.
    """

    kind: str
    title: str
    facts: dict[str, Any]
    base: str
    contestants: list[Contestant]
    claims: tuple[Claim, ...] = ()
    predicted: dict[str, float] = field(default_factory=dict)
    slow: bool = False


class Sweep:
    """Reads and writes a buffer larger than the caches of the processor: what was in them goes, as it does between two
    calls of one layer of a model, where the other layers come in between.
    """

    def __init__(self, mebibytes: int) -> None:
        import torch

        self.buffer = torch.ones(mebibytes * 2**18)

    def __call__(self) -> None:
        self.buffer.add_(1)


def first_line(error: BaseException) -> str:
    """What kind of error, and how its message begins."""
    if isinstance(error, Absent):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def race(contestants: list[Contestant], rounds: int, calls: int, sweep: Callable[[], object]) -> dict[str, Row]:
    """The rows by name. A round is `calls` calls of each, one contestant after the other, each round another first."""
    rows, results = {}, {}
    for contestant in contestants:
        rows[contestant.name], results[contestant.name] = _warm(contestant)
    for contestant in contestants:
        wrong = _differs(contestant, results)
        if wrong:
            rows[contestant.name] = {"error": wrong}
    results.clear()
    running = [c for c in contestants if "error" not in rows[c.name]]
    took: dict[str, list[float]] = {c.name: [] for c in running}
    for turn in range(rounds):
        start = turn % max(1, len(running))
        for contestant in running[start:] + running[:start]:
            took[contestant.name].append(statistics.median(_timed(contestant, sweep) for _ in range(calls)))
    for contestant in running:
        ms = statistics.median(took[contestant.name])
        rows[contestant.name] |= {"ms": round(ms, 4), "each_round": [round(t, 4) for t in took[contestant.name]]}
        if contestant.bytes:
            rows[contestant.name]["gb_s"] = round(contestant.bytes / ms / 1e6, 2)
    return rows


def judge(claim: Claim, rows: dict[str, Row]) -> Row:
    """The ratio of two rows and of each of their rounds, and whether it holds; `holds` None where one did not run."""
    said: Row = {"ours": claim.ours, "theirs": claim.theirs, "limit": claim.limit, "ratio": None, "holds": None}
    ours, theirs = rows.get(claim.ours, {}), rows.get(claim.theirs, {})
    if "ms" in ours and "ms" in theirs:
        pairs = zip(ours["each_round"], theirs["each_round"], strict=True)
        ratio = ours["ms"] / theirs["ms"]
        said |= {"ratio": round(ratio, 4), "holds": ratio <= claim.limit}
        said["ratio_of_each_round"] = [round(a / b, 4) for a, b in pairs]
    return said


def _warm(contestant: Contestant) -> tuple[Row, Any]:
    import torch

    try:
        for _ in range(WARM_UP):
            contestant.before()
            with torch.no_grad():
                out = contestant.run()
        return {}, contestant.view(out)
    except Exception as error:  # a peer may fail in any way, and the page says how
        return {"error": first_line(error)}, None


def _differs(contestant: Contestant, results: dict[str, Any]) -> str:
    """Why a result is not the one that it must equal; empty where it is, or where there is nothing to compare."""
    found, right = results[contestant.name], results.get(contestant.like or "")
    if found is None or right is None:
        return ""
    error = float((found.double() - right.double()).abs().max())
    largest = float(right.double().abs().max())
    allowed = TOLERANCE.get(str(found.dtype).removeprefix("torch."), 0.0) * largest
    return "" if error <= allowed else f"wrong: differs by {error:.2e} from {contestant.like}, allowed {allowed:.2e}"


def _timed(contestant: Contestant, sweep: Callable[[], object]) -> float:
    import torch

    contestant.before()
    sweep()
    with torch.no_grad():
        start = time.perf_counter()
        contestant.run()
        return (time.perf_counter() - start) * 1e3
