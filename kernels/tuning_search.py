"""The search: candidates pruned by compiling, ranked by the model, timed where there is a timer.

Takes a plan, sizes and an effort; gives an `Outcome` per kernel, best config and what it was chosen from. Guarantees:
`how` is timed only where a timer ran the winner and its file passed its own check; the untuned config is always
among the timed ones and stays where nothing is faster by more than the noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvcompile.kernels.choose import specs_for
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.headers import Sizes
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning import key_of, versions
from kvcompile.kernels.tuning_rank import Files, Ranked, can_compile, compile_space, ranked, rows_of
from kvcompile.kernels.tuning_space import Config, default, space
from kvcompile.kernels.tuning_store import Bucket, Entry

EFFORTS = {"none": 0, "quick": 12, "full": 1 << 30}  # candidates that are timed, the best ranked first
REPEATS = {"quick": 20, "full": 50}
FINAL = 5  # of them are timed again, longer
NOISE = 0.02  # a config must be faster than the untuned one by more than this part


class Timer(Protocol):
    """Runs candidates. seconds: the median of some launches, infinite where it cannot be launched."""

    def seconds(self, spec: KernelSpec, path: Path, config: Config, repeats: int) -> float: ...

    def right(self, path: Path) -> bool:
        """Whether the kernel file passes its own check on the device."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found for one kernel. Counts of candidates: all, those left by pruning, those timed.

    own: seconds of the untuned config, measured or predicted as `entry.seconds` is; None where it does not fit.
    """

    spec: KernelSpec
    entry: Entry
    own: float | None
    candidates: int
    fitting: int
    timed: int
    compiled: bool

    def line(self) -> str:
        """For the terminal."""
        config = " ".join(f"{name}={value}" for name, value in self.entry.config)
        own = "" if self.own is None else f", untuned {self.own * 1e6:.1f}"
        how = "timed" if self.entry.how == "timed" else "analytic, nothing was run"
        part = f"{self.fitting} of {self.candidates} fit" + ("" if self.compiled else ", not compiled")
        return f"{self.spec.name}: {config}  {self.entry.seconds * 1e6:.1f} us{own} ({how}; {part}, {self.timed} timed)"


def search(
    plan: PolicyPlan,
    sizes: Sizes,
    effort: str,
    timer: Timer | None = None,
    tell: Callable[[str], None] = lambda what: None,
    compile_them: bool = True,
    found: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, ...]:
    """Every kernel of a plan on `sizes.gpu`. tell: hears what is being done; found: hears each outcome at once.

    Raises:
        KvCompileError: kernels of which nothing fits or is right; the others have been searched.
    """
    if effort not in EFFORTS:
        raise KvCompileError(f"effort {effort!r}: there are {', '.join(EFFORTS)}")
    if EFFORTS[effort] and timer is None:
        raise KvCompileError(f"effort {effort} times kernels and needs the device; --effort none ranks without it")
    outcomes, refused = [], []
    with tempfile.TemporaryDirectory() as place:
        for spec in specs_for(plan):
            try:
                outcome = _one(plan, spec, sizes, effort, timer, tell, compile_them, Path(place))
            except KvCompileError as error:
                refused.append(str(error))
                continue
            found(outcome)
            outcomes.append(outcome)
    if refused:
        raise KvCompileError("; ".join(refused))
    return tuple(outcomes)


def _one(
    plan: PolicyPlan,
    spec: KernelSpec,
    sizes: Sizes,
    effort: str,
    timer: Timer | None,
    tell: Callable[[str], None],
    compile_them: bool,
    place: Path,
) -> Outcome:
    compiling = compile_them and can_compile(sizes.gpu)
    files = Files(plan, spec, sizes, place)
    tell(f"{spec.name}: {len(space(spec))} configurations" + (f", compiling for {sizes.gpu.arch}" if compiling else ""))
    order = ranked(plan, spec, sizes, compile_space(files, sizes.gpu) if compiling else None)
    key = key_of(spec, sizes.gpu, Bucket.of(rows_of(plan, spec, sizes.batch), sizes.tokens))
    if timer is None or not EFFORTS[effort]:
        found = {known.config: known.seconds for known in order}
        winner, how, timed = order[0].config, "analytic", 0
    else:
        found, timed = _timed(spec, order, files, effort, timer, tell)
        winner, how = _winner(spec, found, files, timer), "timed"
    entry = Entry(key, winner, how, found[winner], spec.name, spec.facts, versions())
    return Outcome(spec, entry, found.get(default(spec)), len(space(spec)), len(order), timed, compiling)


def _timed(
    spec: KernelSpec,
    order: tuple[Ranked, ...],
    files: Files,
    effort: str,
    timer: Timer,
    tell: Callable[[str], None],
) -> tuple[dict[Config, float], int]:
    """Seconds of the candidates that ran, the best few from a second, longer round; how many were tried."""
    own = default(spec)
    some = [known.config for known in order[: EFFORTS[effort]]]
    some += [own] if own in {known.config for known in order} - set(some) else []
    tell(f"{spec.name}: timing {len(some)} configurations")
    repeats = REPEATS[effort]
    first = {config: timer.seconds(spec, files(config), config, repeats) for config in some}
    ran = {config: seconds for config, seconds in first.items() if seconds < float("inf")}
    if not ran:
        raise KvCompileError(f"{spec.name}: none of {len(some)} configurations could be launched on the device")
    best = sorted(ran, key=lambda config: ran[config])[:FINAL]
    finals = [*best, *([own] if own in ran and own not in best else [])]
    return {config: timer.seconds(spec, files(config), config, 3 * repeats) for config in finals}, len(some)


def _winner(spec: KernelSpec, found: dict[Config, float], files: Files, timer: Timer) -> Config:
    own = default(spec)
    by_time = sorted(found, key=lambda config: found[config])
    if own in found and found[own] <= found[by_time[0]] * (1 + NOISE):
        by_time = [own, *(config for config in by_time if config != own)]
    for config in by_time:
        if found[config] < float("inf") and timer.right(files(config)):
            return config
    raise KvCompileError(f"{spec.name}: no configuration passes the kernel's own check on this device; report this")
