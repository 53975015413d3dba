"""A cell: one case on one suite, length and seed, and the file that keeps its result.

Takes results; gives JSON files named by the SHA-256 of all that decides them. Guarantees: a file is written in one
step, so an interrupted sweep leaves whole files or none; a file that is not what its name says is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from kvcompile.evaluation.answering import FIGURES, Outcome
from kvcompile.evaluation.budgets import Case
from kvcompile.evaluation.samples import Sample

FORMAT = 1
DONE, SKIPPED = "done", "skipped"
MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Cell:
    """The result of one case on `count` samples. Where it was skipped, `reason` says why and the figures are None.

    score: mean over samples of the mean over their turns, in [0, 1]; turns: mean by turn; nll: nats per token, mean
    over turns of kind text. Bytes are per sequence. policy, params, clauses: resolved, as text of the language;
    tables: file and SHA-256 by name; digest: of the plan; classes: head class of each KV head, [layer][head].
    samples: per sample depth, prompt tokens, scores and produced texts by turn.
    """

    key: str
    label: str
    budget: float | None
    chunk: int | None
    suite: str
    later: bool
    length: int
    seed: int
    count: int
    status: str = DONE
    reason: str = ""
    score: float | None = None
    turns: tuple[float, ...] = ()
    nll: float | None = None
    footprint: float | None = None
    peak: float | None = None
    kept: float | None = None
    bytes_resident: float | None = None
    bytes_full: float | None = None
    bytes_peak: float | None = None
    seconds: float | None = None
    policy: str = ""
    digest: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    clauses: tuple[str, ...] = ()
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    classes: tuple[tuple[str, ...], ...] = ()
    footprint_by_head: tuple[tuple[float, ...], ...] | None = None
    samples: tuple[Mapping[str, Any], ...] = ()

    @property
    def done(self) -> bool:
        return self.status == DONE

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self)


# What does not decide a result.
_OF_THE_CASE = ("label", "budget", "chunk")


def filled(cell: Cell, samples: list[Sample], outcome: Outcome) -> Cell:
    """The cell with what a run of it gave."""
    most = max(map(len, outcome.scores))
    nll = [value for turns in outcome.nll for value in turns if value is not None]
    each = tuple(
        {"depth": sample.depth, "tokens": tokens, "scores": list(scores), "produced": list(produced)}
        for sample, tokens, scores, produced in zip(
            samples, outcome.prompt_tokens, outcome.scores, outcome.produced, strict=True
        )
    )
    return replace(
        cell,
        score=outcome.score,
        turns=tuple(fmean(s[turn] for s in outcome.scores if turn < len(s)) for turn in range(most)),
        nll=fmean(nll) if nll else None,
        **{key: getattr(outcome, key) for key in FIGURES},
        seconds=outcome.seconds,
        footprint_by_head=outcome.footprint_by_head,
        samples=each,
    )


def save_cell(folder: Path, cell: Cell) -> None:
    """Write `folder/KEY.json` in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{cell.key}.{os.getpid()}"
    aside.write_text(json.dumps({"format": FORMAT, **cell.to_dict()}, indent=1), encoding="utf-8")
    os.replace(aside, folder / f"{cell.key}.json")


def load_cell(folder: Path, wanted: Cell) -> Cell | str | None:
    """The finished cell of this key, under the names of `wanted`; None where there is none, and a text that says
    what is wrong with a file that cannot be used."""
    path = folder / f"{wanted.key}.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            return f"it is larger than {MAX_BYTES} bytes"
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return str(error).split("\n")[0][:200]
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        return "it is not a cell of this version"
    wrong = _misfit(found, wanted)
    if wrong:
        return wrong
    cell = Cell(**{key: _tuples(value) for key, value in found.items()})
    return renamed(cell, wanted) if cell.done else None


def renamed(cell: Cell, wanted: Cell) -> Cell:
    """The cell under the label, budget and chunk of another: the same result may serve several cases."""
    return replace(cell, **{key: getattr(wanted, key) for key in _OF_THE_CASE})


_IDENTITY = ("key", "suite", "later", "length", "seed", "count")
_NUMBERS = ("score", *FIGURES, "seconds")


def _misfit(found: dict[str, Any], wanted: Cell) -> str:
    if set(found) != {spec.name for spec in fields(Cell)}:
        return "it has other fields than a cell"
    for key in _IDENTITY:
        if found[key] != getattr(wanted, key):
            return f"its {key} is another"
    if found["status"] == SKIPPED:
        return ""
    if found["status"] != DONE or not all(type(found[key]) in (int, float) for key in _NUMBERS):
        return "it has no result"
    samples = found["samples"]
    if not isinstance(samples, list) or len(samples) != wanted.count:
        return f"it does not hold {wanted.count} samples"
    if not all(isinstance(sample, dict) and {"depth", "tokens", "scores"} <= set(sample) for sample in samples):
        return "a sample of it is incomplete"
    return ""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def empty(key: str, case: Case, suite: Any, length: int, seed: int, count: int) -> Cell:
    """A cell before it is run."""
    return Cell(key, case.label, case.budget, case.chunk, suite.name, suite.later, length, seed, count)
