"""Which launch constants a kernel runs with on a GPU: tuned ones where there are any, else those of the spec.

Takes a spec, a GPU and a launch's sizes, gives `Chosen`. Order: timed results of the user, then shipped ones, then
analytic ones of either, then the spec's own constants, which need no file. Guarantees: never blocks, runs nothing
on the device, and takes only a config that is a candidate of today's templates; what it passes over, it names once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from kvcompile.kernels.gpus import GPUS, Gpu
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning_space import Config, default, facts_digest, kernel_digest, space, space_digest
from kvcompile.kernels.tuning_store import HOWS, SHIPPED, Bucket, Entry, TuneKey, file_of, read, user_folder

NEAR = 2  # doublings of rows and entries together up to which a neighbour's config is taken


@dataclass(frozen=True, slots=True)
class Chosen:
    """A config and where it is from. source: user, shipped or default; note: other versions, another bucket."""

    config: Config
    source: str
    how: str
    note: str = ""


def key_of(spec: KernelSpec, gpu: Gpu, bucket: Bucket) -> TuneKey:
    """What the config of a spec is filed under."""
    return TuneKey(_kernel(spec.template), facts_digest(spec), gpu.identity, bucket, space_digest(spec))


def _kernel(template: str) -> str:
    return f"{template}-{kernel_digest(template)}"


def config_for(spec: KernelSpec, gpu: Gpu, bucket: Bucket) -> Chosen:
    """The constants of a launch of `bucket` on a GPU."""
    found = sorted(_usable(key_of(spec, gpu, bucket), spec), key=lambda item: item[0])
    if found:
        (how, _, _), source, entry = found[0]
        return Chosen(entry.config, source, HOWS[how], _note(entry, bucket))
    if gpu.scaled:
        _tell_unknown(gpu.reported[0])
    return Chosen(default(spec), "default", "analytic")


def _usable(key: TuneKey, spec: KernelSpec) -> Iterator[tuple[tuple[int, int, int], str, Entry]]:
    """Entries for the key or a near bucket, with what to sort them by: how, source, distance."""
    places = (("user", user_folder()), ("shipped", SHIPPED))
    for rank, (source, place) in enumerate(places):
        path = file_of(place, key.gpu)
        for entry in read(path):
            other = entry.key
            if (other.spec, other.gpu) != (key.spec, key.gpu) or other.kernel.partition("-")[0] != spec.template:
                continue
            if (other.kernel, other.space) != (key.kernel, key.space):
                _tell_stale(path)
            elif entry.config not in space(spec):
                _tell_broken(path, entry.says)
            elif (steps := key.bucket.distance(other.bucket)) <= NEAR:
                yield (HOWS.index(entry.how), rank, steps), source, entry


def _note(entry: Entry, bucket: Bucket) -> str:
    parts = [f"from {entry.key.bucket.rows} rows of {entry.key.bucket.tokens}"] if entry.key.bucket != bucket else []
    here = dict(versions())
    parts += [f"with {name} {was}, here {here[name]}" for name, was in entry.versions if here.get(name, was) != was]
    return ", ".join(parts)


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """Of what compiles and launches, sorted by name; recorded beside a result, no part of its key."""
    found = []
    for name in ("torch", "triton"):
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "none"))
    return tuple(found)


@cache
def _tell_unknown(name: str) -> None:
    warnings.warn(
        f"no facts about the GPU {name!r} (known: {', '.join(GPUS)}): kernels run with analytic constants, which may "
        "be slower; `kvcompile tune POLICY --model DIR` times them here",
        stacklevel=2,
    )


@cache
def _tell_stale(path: Path) -> None:
    warnings.warn(
        f"{path} has configurations for kernels of another version of kvcompile; these are left out and the next "
        "source is taken; `kvcompile tune POLICY --model DIR` makes them anew",
        stacklevel=2,
    )


@cache
def _tell_broken(path: Path, says: str) -> None:
    warnings.warn(
        f"{path}: the configuration of {says} is no candidate of its template; it is left out and the next source is "
        "taken; `kvcompile tune POLICY --model DIR` makes it anew",
        stacklevel=2,
    )
