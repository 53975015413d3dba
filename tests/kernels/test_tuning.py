"""Which constants a launch gets: the order of the sources, what is passed over, and that launches use them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvcompile.kernels import tuning, tuning_store
from kvcompile.kernels.choose import decode_spec, pack_spec
from kvcompile.kernels.choose_listed import listed_decode
from kvcompile.kernels.gpus import GPUS, Gpu
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton_backend import library as library_module
from kvcompile.kernels.triton_backend import reads
from kvcompile.kernels.triton_backend.library import At, Library, library
from kvcompile.kernels.tuning import config_for, key_of, versions
from kvcompile.kernels.tuning_space import KNOBS, default, kernel_digest, space, space_digest
from kvcompile.kernels.tuning_store import SHIPPED, Bucket, Entry, read, save
from tests.kernels.test_render import h2o
from tests.kernels.triton_interpreted.read_plans import power

H200 = GPUS["H200"]
BUCKET = Bucket(8, 4096)
SPEC = decode_spec(h2o())


def config(**changes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((dict(default(SPEC)) | changes).items()))


def entry(
    how: str = "timed", bucket: Bucket = BUCKET, gpu: Gpu = H200, spec: KernelSpec = SPEC, **changes: int
) -> Entry:
    made = tuple(sorted((dict(default(spec)) | changes).items()))
    return Entry(key_of(spec, gpu, bucket), made, how, 1e-5, spec.name, spec.facts, versions())


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Empty folders for the user's and the shipped files."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setenv("KVC_TUNED", str(user))
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    for tell in (tuning._tell_broken, tuning._tell_stale, tuning._tell_unknown):
        tell.cache_clear()
    return user, shipped


def test_the_order_of_the_sources(places: tuple[Path, Path]) -> None:
    user, shipped = places
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_for(SPEC, H200, BUCKET) == tuning.Chosen(default(SPEC), "default", "analytic")
        save((entry("analytic", warps=2),), H200, shipped)
        assert config_for(SPEC, H200, BUCKET).config == config(warps=2)
        save((entry("analytic", warps=8),), H200, user)
        assert config_for(SPEC, H200, BUCKET) == tuning.Chosen(config(warps=8), "user", "analytic")
        save((entry("timed", stages=2),), H200, shipped)
        assert config_for(SPEC, H200, BUCKET) == tuning.Chosen(config(stages=2), "shipped", "timed")
        save((entry("timed", stages=4),), H200, user)
        assert config_for(SPEC, H200, BUCKET) == tuning.Chosen(config(stages=4), "user", "timed")


def test_a_near_bucket_serves_and_a_far_one_does_not(places: tuple[Path, Path]) -> None:
    save((entry(bucket=Bucket(8, 8192), warps=8), entry(bucket=Bucket(16, 16384), warps=2)), H200, places[0])
    near = config_for(SPEC, H200, BUCKET)
    assert near.config == config(warps=8) and near.note == "from 8 rows of 8192"
    assert config_for(SPEC, H200, Bucket(16, 32768)).config == config(warps=2)
    assert config_for(SPEC, H200, Bucket(512, 65536)).source == "default"


def test_other_kernels_and_devices_are_other_keys(places: tuple[Path, Path]) -> None:
    save((entry(warps=8),), H200, places[0])
    assert config_for(pack_spec(h2o()), H200, BUCKET).source == "default"
    assert config_for(decode_spec(h2o(head_dim=64)), H200, BUCKET).source == "default"
    assert config_for(SPEC, GPUS["H100"], BUCKET).source == "default"
    assert config_for(SPEC, replace(H200, multiprocessors=66), BUCKET).source == "default"


def test_other_versions_are_noted_and_used(places: tuple[Path, Path]) -> None:
    save(
        (replace(entry(warps=8), versions=(("triton", "1.0"), ("torch", dict(versions())["torch"]))),), H200, places[0]
    )
    found = config_for(SPEC, H200, BUCKET)
    assert found.config == config(warps=8) and found.note == f"with triton 1.0, here {dict(versions())['triton']}"


@pytest.mark.parametrize("part", ["kernel", "space"])
def test_configs_for_other_templates_are_named_once_and_left_out(places: tuple[Path, Path], part: str) -> None:
    old = {"kernel": "decode-" + "0" * 16, "space": "0" * 16}[part]
    path = save((replace(entry(warps=8), key=replace(entry().key, **{part: old})),), H200, places[0])  # type: ignore[arg-type]
    save((entry(stages=2),), H200, places[1])
    with pytest.warns(UserWarning, match="another version of kvcompile") as told:
        assert config_for(SPEC, H200, BUCKET) == tuning.Chosen(config(stages=2), "shipped", "timed")
        assert config_for(SPEC, H200, BUCKET).source == "shipped"
    assert len(told) == 1 and str(path) in str(told[0].message)


def test_a_config_that_no_template_offers_is_never_launched(places: tuple[Path, Path]) -> None:
    path = save((entry(warps=8),), H200, places[0])
    path.write_text(path.read_text().replace('"warps": 8', '"warps": 3'))
    with pytest.warns(UserWarning, match="no candidate") as told:
        assert config_for(SPEC, H200, BUCKET).config == default(SPEC)
    assert str(path) in str(told[0].message)


def test_a_corrupt_file_gives_way_to_the_next_source(places: tuple[Path, Path]) -> None:
    path = save((entry(warps=8),), H200, places[0])
    save((entry(stages=2),), H200, places[1])
    path.write_text(path.read_text()[:-40])
    with pytest.warns(UserWarning, match="not JSON"):
        assert config_for(SPEC, H200, BUCKET).source == "shipped"


def test_an_unknown_gpu_is_told_of_once_and_runs_untuned(places: tuple[Path, Path]) -> None:
    unknown = replace(H200, reported=("NVIDIA X",), scaled=("operations",))
    with pytest.warns(UserWarning, match="no facts about the GPU 'NVIDIA X'.*kvcompile tune") as told:
        assert config_for(SPEC, unknown, BUCKET).config == default(SPEC)
        config_for(pack_spec(h2o()), unknown, BUCKET)
    assert len(told) == 1
    save((entry(gpu=unknown, warps=8),), unknown, places[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_for(SPEC, unknown, BUCKET).config == config(warps=8)


def test_launches_take_tuned_constants(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(library_module, "_gpu", lambda device: H200)
    library_module._tuned.cache_clear()
    save((entry(warps=8, units=2),), H200, places[0])
    policy = h2o()
    on_gpu, on_cpu = At(torch.device("cuda"), 8, 4000), At(torch.device("cpu"), 8, 4000)
    found = library(policy)
    assert found.decode().WARPS == found.decode(on_cpu).WARPS == 4 and found.target(on_cpu) is None
    assert found.decode(on_gpu).WARPS == 8 and found.target(on_gpu) == 2 * 132
    assert found.pack(on_gpu) is found.pack(), "nothing was tuned for it"
    scratch = found.decode(on_gpu).make_scratch(8, 64, torch.device("cpu"), found.target(on_gpu))
    assert scratch["target"] == 264 and scratch["part_max"].shape[0] == 8 + 264
    far = At(torch.device("cuda"), 4096, 1 << 20)
    assert found.decode(far) is found.decode() and found.target(far) is None
    library_module._tuned.cache_clear()


def test_a_step_that_reads_lists_takes_its_own_tuned_target(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(library_module, "_gpu", lambda device: H200)
    library_module._tuned.cache_clear()
    policy = power(dtype="bfloat16")
    save((entry(spec=listed_decode(policy), units=4),), H200, places[0])
    targets = []
    monkeypatch.setattr(Library, "listed_decode", lambda *_: SimpleNamespace(WRITES_SCORE=False, make_scratch=aimed))
    monkeypatch.setattr(Library, "listed_units", lambda *_: SimpleNamespace(make_scratch=lambda *_: {}))

    def aimed(rows: int, capacity: int, device: torch.device, target: int | None) -> dict[str, int]:
        targets.append(target)
        return {}

    monkeypatch.setattr(reads, "_tables", lambda *_: (torch.empty(0), torch.empty(0)))
    site = SimpleNamespace(batch=4, k=SimpleNamespace(device=torch.device("cuda")), marks=torch.empty(0, 4, 0))
    reads.Reading.prepare(policy, site, 4000)
    assert targets == [4 * 132]
    library_module._tuned.cache_clear()


def faults(entries: tuple[Entry, ...]) -> list[str]:
    """What is wrong with shipped entries, held against the templates and candidates of today."""
    found = []
    for shipped in entries:
        template, _, digest = shipped.key.kernel.partition("-")
        spec = KernelSpec(template, shipped.facts)
        for wrong, what in (
            (template not in KNOBS or digest != kernel_digest(template), "was made for another template"),
            (shipped.key.space != space_digest(spec), "was chosen from other candidates"),
            (shipped.config not in space(spec), "is no candidate"),
            (shipped.how != "timed", "was not measured"),
            (shipped.key.gpu not in {known.identity for known in GPUS.values()}, "is for an unknown GPU"),
        ):
            if wrong:
                found.append(f"{shipped.says} {shipped.key.bucket}: {what}; tune it anew")
    return found


def test_shipped_configs_fit_the_templates_of_today() -> None:
    for path in SHIPPED.glob("*.json"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            entries = read(path)
        assert entries and not faults(entries), faults(entries)


def test_shipped_configs_that_do_not_fit_are_found(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = save((entry(warps=8),), H200, places[1])
    assert faults(read(path)) == []
    (analytic,) = faults((entry("analytic", warps=8),))
    assert "was not measured" in analytic
    data = json.loads(path.read_text())
    data["configs"][0]["config"]["warps"] = 3
    path.write_text(json.dumps(data))
    assert "is no candidate" in faults(read(path))[0]
    monkeypatch.setitem(KNOBS, "decode", KNOBS["decode"] | {"warps": (4, 8)})
    assert "other candidates" in faults((entry(warps=8), read(path)[0]))[0]


def test_what_is_stored_is_keyed_by_more_than_names() -> None:
    assert tuning_store.HOWS[0] == "timed"
    key = key_of(SPEC, H200, BUCKET)
    assert key.kernel.startswith("decode-") and key.gpu == H200.identity
    assert "torch" not in repr(key) and {name for name, _ in versions()} == {"torch", "triton"}
