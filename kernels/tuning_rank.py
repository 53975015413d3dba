"""Prunes and ranks the candidates of a kernel without running one.

Takes a plan, one of its specs, sizes and a GPU; gives candidates, the likely fastest first. Compiled figures
(registers, spills, shared memory) prune and set the occupancy where there are any; else a stated guess does.
The model is for ordering: candidates within 2 % of each other count as equal, and what changes least goes first there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import Gpu
from kvcompile.kernels.headers import Sizes, header_for
from kvcompile.kernels.offline import SHARED_LIMIT, Resources, compile_apart
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.render import render, write
from kvcompile.kernels.roofline import Launch, Needs, Traffic, resident
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning_space import Config, default, space, tile_bytes, with_config

GUESS = 128  # registers of a thread where nothing was compiled
CACHED = 3  # times as fast as memory the L2 is taken to be
EQUAL = 0.02  # of the best prediction: no model here is finer


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate, its predicted seconds, its blocks on one multiprocessor; compiled: whether these are known."""

    config: Config
    seconds: float
    blocks: int
    compiled: bool


def rows_of(plan: PolicyPlan, spec: KernelSpec, batch: int) -> int:
    """Rows that one launch serves: of one layer, of all layers where the kernel evicts."""
    rows = batch * plan.facts.kv_heads
    return rows * plan.facts.layers if spec.template == "evict" else rows


def launch_of(plan: PolicyPlan, spec: KernelSpec, sizes: Sizes, config: Config) -> Launch:
    """What a launch moves and how much of it is under way at a time; never falls as tokens or batch grow."""
    traffic = header_for(plan, spec, sizes).traffic
    chosen, rows, tokens = dict(config), rows_of(plan, spec, sizes.batch), sizes.tokens
    match spec.template:
        case "decode" | "spans":
            target = chosen["units"] * sizes.gpu.multiprocessors
            units = max(float(rows), min(rows * tokens / chosen["min_chunk"], float(target)))
            part = (spec.number("group") * spec.number("head_dim") + 2 * spec.number("group_pad")) * 4
            traffic = Traffic(
                (*traffic.parts, ("partial results, out and in", int(2 * units * part))), traffic.launches
            )
            return Launch(traffic, min(units, float(target)), tile_bytes(spec, chosen))
        case "prefill" | "blocks":
            lines = rows * spec.number("group") * tokens / chosen["block_m"]
            # The diagonal is computed whole; each tile reads its entries again, from the cache.
            wasted = 1 + (chosen["block_m"] + chosen["block_n"]) / max(tokens, 1)
            again = int(lines * tokens / 2 * plan.facts.entry_bytes) // CACHED
            traffic = Traffic(
                (*traffic.parts, ("keys and values again", again)), operations=int(traffic.operations * wasted)
            )
            return Launch(traffic, lines, tile_bytes(spec, chosen))
        case "columns" | "keys":
            # Queries come from memory once and lie in the cache for all programs of a row: no choice changes that.
            streamed = tuple((name, size) for name, size in traffic.parts if name != "queries, each pass")
            traffic = Traffic(streamed, traffic.launches, traffic.operations)
            return Launch(traffic, max(float(rows), rows * tokens / chosen["block_n"]), tile_bytes(spec, chosen))
        case "pack":
            return Launch(traffic, max(float(rows), rows * tokens / 1024), 32 * plan.facts.entry_bytes)
        case "marks" | "units" | "chosen":
            return Launch(traffic, max(float(rows), rows * tokens / 1024), chosen["block_n"] * plan.facts.entry_bytes)
        case "pool":
            return Launch(traffic, max(float(rows), rows * tokens / 512), 512 * 12)
        case _:  # evict, select: a program per group of heads; a block's scores, flags and positions
            return Launch(traffic, rows / spec.number("heads"), 2048 * 9)


def ranked(
    plan: PolicyPlan,
    spec: KernelSpec,
    sizes: Sizes,
    compiled: Mapping[Config, tuple[Resources, ...]] | None = None,
) -> tuple[Ranked, ...]:
    """The candidates that a GPU can run, best first; of those that spill more than others only the untuned one, last.

    compiled: what each candidate takes (`compile_space`); None: a guess of `GUESS` registers.
    """
    left = []
    for config in space(spec):
        needs = _needs(spec, config, compiled)
        blocks = min((resident(sizes.gpu, need) for need in needs), default=0)
        launch = launch_of(plan, spec, sizes, config)
        seconds = launch.seconds(sizes.gpu, blocks, str(dict(spec.facts).get("dtype", "float32")))
        spills = 0 if compiled is None else sum(used.spill_stores for used in compiled.get(config, ()))
        left.append((spills, Ranked(config, seconds, blocks, compiled is not None)))
    left = [(spills, found) for spills, found in left if found.blocks > 0]
    if not left:
        raise KvCompileError(f"{spec.name}: none of its {len(space(spec))} configurations fits {sizes.gpu.name}")
    least = min(spills for spills, _ in left)
    own = default(spec)
    fit = [(spills, found) for spills, found in left if spills == least or found.config == own]
    best = min(found.seconds for spills, found in fit if spills == least)

    def order(item: tuple[int, Ranked]) -> tuple[int, int, int, float, Config]:
        spills, found = item
        changes = sum(mine != theirs for mine, theirs in zip(found.config, own, strict=True))
        return spills, int((found.seconds / best - 1) / EQUAL), changes, found.seconds, found.config

    return tuple(found for _, found in sorted(fit, key=order))


def _needs(
    spec: KernelSpec, config: Config, compiled: Mapping[Config, tuple[Resources, ...]] | None
) -> tuple[Needs, ...]:
    """Of each function of the file; empty where the candidate did not compile."""
    if compiled is None:
        chosen = dict(config)
        shared = tile_bytes(spec, chosen) if "block_n" in chosen else 0
        return (Needs(GUESS, shared, chosen["warps"]),)
    return tuple(Needs(used.registers, used.shared, used.warps) for used in compiled.get(config, ()))


def can_compile(gpu: Gpu) -> bool:
    """Whether the offline compiler knows the architecture."""
    return gpu.arch.startswith("sm_") and int(gpu.arch.removeprefix("sm_")) in SHARED_LIMIT


@dataclass(frozen=True, slots=True)
class Files:
    """The kernel file of each candidate, rendered when it is asked for; configs of one text share one."""

    plan: PolicyPlan
    spec: KernelSpec
    sizes: Sizes
    place: Path

    def __call__(self, config: Config) -> Path:
        variant = with_config(self.spec, config)
        path = self.place / f"{self.spec.template}_{variant.digest()}.py"
        return path if path.exists() else write(render(variant, header_for(self.plan, variant, self.sizes)), path)


def compile_space(files: Files, gpu: Gpu) -> dict[Config, tuple[Resources, ...]]:
    """Registers, spills and shared memory of every candidate, by the offline compiler; needs no GPU.

    Candidates that differ in arguments of the launch only (`min_chunk`, `units`) are compiled once.
    """
    every = space(files.spec)
    alike: dict[Config, Config] = {}
    for config in every:
        alike.setdefault(_compiled_part(config), config)
    paths = {part: files(config) for part, config in alike.items()}
    table = compile_apart(list(dict.fromkeys(paths.values())), [gpu.arch])
    return {config: table[paths[_compiled_part(config)].stem] for config in every}


def _compiled_part(config: Config) -> Config:
    return tuple((name, value) for name, value in config if name not in ("min_chunk", "units"))
