"""P4: bytes are what memory really holds, counted from outside: live tensors, and the allocator's own events.

Nothing here looks into the cache: storages are found by walking the interpreter's objects before and after.
"""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kvcompile
from tests.driving import BACKENDS, LIBRARY, Sizes, call, drive, one_by_one
from tests.models import random_model, tokens

# Page tables, lengths and the like: small, and no part of the pools.
BOOKKEEPING = 48 * 1024
# Cosine and sine of 256 places, float32, where keys lie unrotated.
ANGLES = 2 * 4 * 64 * 256


def live_bytes() -> int:
    """Bytes of all tensor storages that are alive in this process, each counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # The type is asked, not the object: isinstance would run the __class__ of whatever lies around.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and not is_fake(thing):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def is_fake(tensor: torch.Tensor) -> bool:
    return type(tensor).__module__.startswith("torch._subclasses")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
def test_p4_allocated_is_what_the_process_really_holds(name, backend, tmp_path):
    sample = LIBRARY[name](Sizes(budget=40, observe=8, chunk=64, percent=25))
    model, options = sample.model(), sample.options(tmp_path)
    trained = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))  # weights are no part of the cache
    before = live_bytes()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options)
    ids = torch.tensor([tokens(240, seed=1)])
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for token in tokens(3, seed=2):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    held = live_bytes() - before
    report = kvcompile.report(model).to_dict()
    assert report["bytes_resident"] <= report["bytes_allocated"] <= report["bytes_peak"]
    assert report["bytes_allocated"] <= held + 1, "claims pools that are not there"
    assert held <= report["bytes_allocated"] + trained + BOOKKEEPING, "holds more than it says"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
def test_p4_resident_is_the_entries_in_whole_pages(name, backend, tmp_path):
    """Resident bytes lie between the kept keys and values themselves and those with a page of waste per row."""
    sample = LIBRARY[name](Sizes(budget=40, observe=8, chunk=64, percent=25))
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **sample.options(tmp_path))
    seen = drive(model, tokens(200, seed=3), *one_by_one(tokens(3, seed=4)))
    positions = [len(head) for layer in seen[-1].kept[0] for head in layer]
    report = kvcompile.report(model).to_dict()
    entry = 2 * 64 * 4
    lengths = torch.tensor(report["lengths"]).flatten().tolist()
    # What razor has folded has no position, but it is an entry.
    assert all(n - p in ((0, 1) if name == "razor" else (0,)) for n, p in zip(lengths, positions, strict=True))
    assert report["bytes_full"] == len(lengths) * 203 * entry
    assert sum(lengths) * entry <= report["bytes_resident"]
    # positions, flags and states: at most 16 bytes an entry; an extent of the cpu backend is at most 64 longer
    angles = ANGLES if name in ("streaming_compact", "freqkv") else 0
    assert report["bytes_resident"] <= sum(n + 64 for n in lengths) * (entry + 16) + angles


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
def test_p4_memory_stays_within_the_plan(name, backend, tmp_path):
    sample = LIBRARY[name](Sizes(budget=40, observe=8, chunk=64, percent=25))
    options = sample.options(tmp_path)
    model = sample.model()
    plan = kvcompile.explain(sample.policy, model, prompt=200, generate=20, **options).to_dict()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options)
    drive(model, tokens(200, seed=5), *one_by_one(tokens(20, seed=6)))
    report = kvcompile.report(model).to_dict()
    assert report["bytes_full"] == plan["bytes_full"]
    assert report["bytes_resident"] <= plan["bytes"] + BOOKKEEPING
    assert report["bytes_allocated"] <= plan["bytes_peak"] + BOOKKEEPING
    assert report["bytes_peak"] <= plan["bytes_peak"] + BOOKKEEPING


# -- the figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_adakv_at_a_tenth_holds_a_tenth(backend):
    """adakv at 10 %: resident at most 0.12, peak at most 0.40 of full, four layers."""
    model = random_model("llama64", num_hidden_layers=4)
    kvcompile.optimize(model, "adakv", backend=backend, compile="off", budget=409, observe=32)
    call(model, torch.tensor([tokens(4096, seed=7)]))
    report = kvcompile.report(model).to_dict()
    assert report["bytes_resident"] <= 0.12 * report["bytes_full"]
    assert report["bytes_peak"] <= 0.40 * report["bytes_full"]
    assert report["kept"] == pytest.approx(409 / 4096, abs=1e-9)


def test_the_allocator_sees_the_saving():
    """The peak that the allocator itself records falls by most of what the report says was saved."""

    def peak(policy, **params):
        model = random_model("llama64", num_hidden_layers=6, num_key_value_heads=4)
        if policy:
            kvcompile.optimize(model, policy, backend="cpu", compile="off", **params)
        ids = torch.tensor([tokens(2048, seed=8)])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        assert cache is not None
        return peak_of(seen)

    full = 6 * 4 * 2048 * 2 * 64 * 4
    untouched, evicting = peak(None), peak("snapkv", budget=128, observe=16)
    # Of the full cache 1/6 is the layer in flight and 1/16 the budgets; a tenth of full is left for scores.
    assert untouched - evicting >= full * (1 - 1 / 6 - 1 / 16 - 0.10)


def peak_of(seen: profile) -> int:
    """Largest sum of allocations less frees, in bytes, over the allocator's events in order."""
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0, "the profiler gave no memory events"
    return most
