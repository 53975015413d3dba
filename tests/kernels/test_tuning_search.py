"""Pruning, ranking and the search: by hand-made figures, by a fake timer, and by the compiler for an H200."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from kvcompile.kernels.choose import decode_spec, specs_for
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS, KIB
from kvcompile.kernels.headers import Sizes
from kvcompile.kernels.offline import Resources
from kvcompile.kernels.plan import Expr, PolicyPlan, Selection
from kvcompile.kernels.roofline import RESERVED, Launch, Needs, Traffic, resident
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning import config_for
from kvcompile.kernels.tuning_rank import Files, can_compile, compile_space, launch_of, ranked, rows_of
from kvcompile.kernels.tuning_search import EFFORTS, search
from kvcompile.kernels.tuning_space import KNOBS, Config, default, space
from kvcompile.kernels.tuning_store import Bucket, save
from tests.kernels.test_render import adakv, h2o
from tests.kernels.triton_interpreted.plans import PREFILL_END, plan

H200 = GPUS["H200"]
SIZES = Sizes(4, 8192, H200)


def specs() -> list[tuple[PolicyPlan, KernelSpec]]:
    norm = Expr("unary", (Expr("field", (), "k"),), "norm")
    knorm = plan((Selection("bottom", norm, 1, Fraction(1, 4)),), triggers=(PREFILL_END,))
    seen = {spec.template: (policy, spec) for policy in (h2o(), adakv(), knorm) for spec in specs_for(policy)}
    assert set(seen) == {"decode", "prefill", "evict", "select", "pack", "columns", "keys", "pool"}
    return list(seen.values())


# ------------------------------------------------------------------ the model


def test_occupancy_is_bound_by_what_runs_out_first() -> None:
    assert resident(H200, Needs(128, 0, 4)) == 65536 // (128 * 128) == 4
    assert resident(H200, Needs(121, 0, 4)) == 4, "registers are handed out in eights"
    assert resident(H200, Needs(16, 0, 4)) == 2048 // 128
    assert resident(H200, Needs(32, 73 * KIB, 4)) == 228 * KIB // (73 * KIB + RESERVED) == 3
    assert resident(H200, Needs(32, 227 * KIB, 4)) == 1 and resident(H200, Needs(32, 227 * KIB + 1, 4)) == 0
    assert resident(GPUS["L40S"], Needs(16, 0, 4)) == 1536 // 128
    assert resident(GPUS["MI300X"], Needs(128, 0, 4)) == 131072 // (128 * 256)


def test_seconds_are_bound_by_bandwidth_by_latency_and_by_arithmetic() -> None:
    enough = Launch(Traffic((("a", 48 * 10**8),)), 1e9, 64 * KIB)
    assert enough.seconds(H200, 2) == pytest.approx(1e-3 + 3e-6)
    one = Launch(Traffic((("a", 10**6),)), 1.0, 10**4)
    assert one.seconds(H200, 2) == pytest.approx(10**6 / 10**4 * 0.7e-6 + 3e-6)
    sums = Launch(Traffic((("a", 8),), operations=989 * 10**9), 1e9, 64 * KIB)
    assert sums.seconds(H200, 2) == pytest.approx(1e-3 + 3e-6)
    assert sums.seconds(H200, 2, "float32") == pytest.approx(989e9 / 67e12 + 3e-6)
    assert enough.seconds(H200, 0) == float("inf")


@pytest.mark.parametrize(("policy", "spec"), specs(), ids=lambda value: getattr(value, "template", ""))
def test_predictions_never_fall_as_bytes_grow(policy: PolicyPlan, spec: KernelSpec) -> None:
    lengths = sorted({*(1 << n for n in range(5, 18)), *range(200, 1400, 37), 65537})
    for config in (space(spec)[0], default(spec), space(spec)[-1]):
        for blocks in (1, 4):
            for sizes in ([Sizes(2, n, H200) for n in lengths], [Sizes(n, 4096, H200) for n in range(1, 65)]):
                launches = [launch_of(policy, spec, size, config) for size in sizes]
                for less, more in itertools.pairwise(launches):
                    assert less.traffic.total <= more.traffic.total
                    assert less.seconds(H200, blocks) <= more.seconds(H200, blocks) * (
                        1 + 1e-4
                    )  # bytes are whole numbers


def test_a_faster_memory_is_never_slower() -> None:
    launch = launch_of(h2o(), decode_spec(h2o()), Sizes(16, 32768, H200), default(decode_spec(h2o())))
    assert launch.seconds(H200, 2) < launch.seconds(GPUS["H100"], 2) < launch.seconds(GPUS["A100-40GB"], 2)


# ------------------------------------------------------------------ pruning and ranking


def used(config: Config, **changes: int) -> tuple[Resources, ...]:
    facts = {"registers": 96, "spill_stores": 0, "shared": 32 * KIB} | changes
    return (
        Resources("k", "sm_90", facts["registers"], facts["spill_stores"], 0, facts["shared"], 0,
                  dict(config)["warps"], (), ""),
    )  # fmt: skip


def test_what_does_not_fit_or_spills_is_pruned_and_the_untuned_stays_last() -> None:
    policy, spec = h2o(), decode_spec(h2o())
    own = default(spec)
    compiled = {config: used(config) for config in space(spec)}
    assert {r.config for r in ranked(policy, spec, SIZES, compiled)} == set(space(spec))
    for config in compiled:
        if dict(config)["warps"] == 8:
            compiled[config] = used(config, shared=228 * KIB)
        elif dict(config)["block_n"] == 64:
            compiled[config] = used(config, spill_stores=8)
    found = ranked(policy, spec, SIZES, compiled)
    assert found[-1].config == own
    assert {r.config for r in found[:-1]} == {
        c for c in space(spec) if dict(c)["warps"] < 8 and dict(c)["block_n"] != 64
    }
    everything_spills = {config: used(config, spill_stores=8) for config in space(spec)}
    assert len(ranked(policy, spec, SIZES, everything_spills)) == len(space(spec))
    with pytest.raises(KvCompileError, match="none of its 324 configurations fits H200"):
        ranked(policy, spec, SIZES, {config: used(config, shared=228 * KIB) for config in space(spec)})


def test_equal_predictions_go_to_what_changes_least() -> None:
    for policy, spec in specs():
        found = ranked(policy, spec, SIZES)
        best = min(r.seconds for r in found)
        if next(r for r in found if r.config == default(spec)).seconds < best * 1.02:
            assert found[0].config == default(spec)
        assert found[0].seconds < best * 1.02 and not found[0].compiled


def test_occupancy_tells_candidates_apart() -> None:
    """Where only one program stands on a multiprocessor, too few bytes are under way for the bandwidth."""
    spec = decode_spec(h2o())
    compiled = {
        config: used(config, registers=255 if dict(config)["block_n"] == 128 else 64, shared=40 * KIB)
        for config in space(spec)
    }
    found = {r.config: r for r in ranked(h2o(), spec, Sizes(16, 32768, H200), compiled)}
    narrow = tuple(sorted({"block_n": 32, "warps": 8, "stages": 2, "min_chunk": 256, "units": 4}.items()))
    starved = tuple(sorted({"block_n": 32, "warps": 8, "stages": 2, "min_chunk": 256, "units": 1}.items()))
    assert found[narrow].seconds < found[starved].seconds
    wide = tuple(sorted({"block_n": 128, "warps": 8, "stages": 2, "min_chunk": 256, "units": 4}.items()))
    assert found[wide].blocks == 1 < found[narrow].blocks


@pytest.mark.slow
def test_the_compiler_prunes_for_a_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 columns: the untuned tile spills on an H200, a smaller one does not."""
    pytest.importorskip("triton")
    monkeypatch.setitem(KNOBS, "columns", {"block_n": (32, 64), "block_q": (16, 64), "warps": (4,)})
    policy = h2o(dtype="float32", head_dim=32, group=2)
    spec = next(spec for spec in specs_for(policy) if spec.template == "columns")
    sizes = Sizes(1, 4096, H200)
    compiled = compile_space(Files(policy, spec, sizes, tmp_path), H200)
    assert set(compiled) == set(space(spec)) and len(compiled) == 4
    spills = {config: sum(r.spill_stores for r in resources) for config, resources in compiled.items()}
    assert all(r.arch == "sm_90" and r.warps == 4 for resources in compiled.values() for r in resources)
    assert min(spills.values()) == 0 < spills[default(spec)]
    found = ranked(policy, spec, sizes, compiled)
    assert all(r.compiled and r.blocks >= 1 for r in found)
    assert spills[found[0].config] == 0 and found[-1].config == default(spec)
    assert {r.config for r in found[:-1]} == {config for config, bytes_ in spills.items() if not bytes_}


def test_only_known_architectures_are_compiled_for() -> None:
    assert can_compile(H200) and can_compile(GPUS["L40S"]) and can_compile(GPUS["B200"])
    assert not can_compile(GPUS["MI300X"]) and not can_compile(replace(H200, arch="sm_75"))


# ------------------------------------------------------------------ the search


class Fake:
    """A timer whose answers are made up: `fast` is twice as fast as all else; `broken` configs refuse to launch."""

    def __init__(self, fast: dict[str, int], gain: float = 2.0, wrong: bool = False, refuse: bool = False) -> None:
        self.fast, self.gain, self.wrong, self.refuse = fast, gain, wrong, refuse
        self.asked: list[tuple[str, Config, int]] = []

    def seconds(self, spec: KernelSpec, path: Path, config: Config, repeats: int) -> float:
        assert path.read_text().startswith('"""'), "a candidate is a kernel file"
        self.asked.append((spec.template, config, repeats))
        if self.refuse:
            return float("inf")
        return 1e-5 / (self.gain if dict(config).items() >= self.fast.items() else 1.0)

    def right(self, path: Path) -> bool:
        return not (self.wrong and "WARPS = 2" in path.read_text())


def only(policy: PolicyPlan, template: str, monkeypatch: pytest.MonkeyPatch) -> PolicyPlan:
    """Searching one kernel of a policy."""
    chosen = tuple(spec for spec in specs_for(policy) if spec.template == template)
    monkeypatch.setattr("kvcompile.kernels.tuning_search.specs_for", lambda _: chosen)
    return policy


def test_a_search_finds_what_is_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy, timer, told = only(h2o(), "pack", monkeypatch), Fake({"warps": 8}), list[str]()
    (found,) = search(policy, SIZES, "full", timer, told.append, compile_them=False)
    assert found.entry.config == (("warps", 8),) and found.entry.how == "timed"
    assert (found.entry.seconds, found.own) == (5e-6, 1e-5)
    assert (found.candidates, found.fitting, found.timed, found.compiled) == (3, 3, 3, False)
    assert len(told) == 2 and "timed" in found.line() and "untuned 10.0" in found.line()
    # The best are timed again, longer.
    assert [repeats for _, _, repeats in timer.asked] == [50] * 3 + [150] * 3
    monkeypatch.setenv("KVC_TUNED", str(tmp_path))
    save((found.entry,), H200)
    bucket = Bucket.of(rows_of(policy, found.spec, SIZES.batch), SIZES.tokens)
    assert config_for(found.spec, H200, bucket).config == (("warps", 8),)


def test_quick_times_few_and_always_the_untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, timer = only(h2o(), "decode", monkeypatch), Fake({"warps": 8})
    (found,) = search(policy, SIZES, "quick", timer, compile_them=False)
    first = [config for _, config, repeats in timer.asked if repeats == 20]
    assert len(first) in (EFFORTS["quick"], EFFORTS["quick"] + 1) and default(found.spec) in first
    assert found.timed == len(first) < found.fitting


@pytest.mark.parametrize("gain", [1.0, 1.01])
def test_noise_changes_nothing(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = search(only(h2o(), "pack", monkeypatch), SIZES, "full", Fake({"warps": 8}, gain), compile_them=False)
    assert found.entry.config == default(found.spec)


def test_a_kernel_that_is_right_nowhere_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, heard = Fake({"warps": 8}), list[str]()
    monkeypatch.setattr(timer, "right", lambda path: not path.name.startswith("evict"))
    chosen = tuple(spec for spec in specs_for(h2o()) if spec.template in ("evict", "pack", "select"))
    monkeypatch.setattr("kvcompile.kernels.tuning_search.specs_for", lambda _: chosen)
    with pytest.raises(KvCompileError, match="no configuration passes the kernel's own check"):
        search(h2o(), SIZES, "full", timer, compile_them=False, found=lambda one: heard.append(one.spec.template))
    assert sorted(heard) == ["pack", "select"]


def test_a_fast_kernel_that_is_wrong_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Fake({"warps": 2}, wrong=True)
    (found,) = search(only(h2o(), "pack", monkeypatch), SIZES, "full", timer, compile_them=False)
    assert found.entry.config != (("warps", 2),)
    timer.right = lambda path: False  # type: ignore[method-assign]
    with pytest.raises(KvCompileError, match="own check"):
        search(h2o(), SIZES, "full", timer, compile_them=False)


def test_a_device_that_refuses_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KvCompileError, match="none of 3 configurations could be launched"):
        search(only(h2o(), "pack", monkeypatch), SIZES, "full", Fake({}, refuse=True), compile_them=False)


def test_without_a_timer_there_is_a_ranking_that_says_so() -> None:
    found = search(h2o(), SIZES, "none", compile_them=False)
    assert [o.spec.template for o in found] == [spec.template for spec in specs_for(h2o())]
    assert {o.entry.how for o in found} == {"analytic"} and not any(o.timed for o in found)
    assert all("analytic, nothing was run" in o.line() and "not compiled" in o.line() for o in found)
    with pytest.raises(KvCompileError, match="needs the device; --effort none"):
        search(h2o(), SIZES, "quick", compile_them=False)
    with pytest.raises(KvCompileError, match="none, quick, full"):
        search(h2o(), SIZES, "huge", compile_them=False)


def test_inputs_are_put_back_between_launches() -> None:
    from kvcompile.kernels.tuning_device import copies, put_back

    inputs = {"length": torch.tensor([3, 4]), "k": torch.ones(2, 2), "scale": 0.5, "score": None}
    before, kept = copies(inputs), inputs["length"]
    inputs["length"] += 1  # type: ignore[operator]
    inputs["k"].zero_()  # type: ignore[union-attr]
    put_back(inputs, before)
    assert inputs["length"] is kept and kept.tolist() == [3, 4] and bool((inputs["k"] == 1).all())  # type: ignore[union-attr]


def test_the_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.kernels.tuning_device import DeviceTimer

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KvCompileError, match="TRITON_INTERPRET is set"):
        DeviceTimer()


@pytest.mark.gpu
def test_the_device_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.kernels.gpus import of_device
    from kvcompile.kernels.tuning_device import DeviceTimer

    monkeypatch.setenv("KVC_TUNED", str(tmp_path))
    here = of_device()
    found = search(h2o(), Sizes(2, 4096, here), "quick", DeviceTimer())
    for outcome in found:
        assert outcome.entry.how == "timed" and outcome.own is not None
        assert 1e-6 < outcome.entry.seconds <= outcome.own
        traffic = launch_of(h2o(), outcome.spec, Sizes(2, 4096, here), outcome.entry.config).traffic
        assert outcome.entry.seconds > traffic.total / here.bandwidth / 4, "faster than the memory allows"
        print(outcome.line())
    assert save(tuple(o.entry for o in found), here).exists()
