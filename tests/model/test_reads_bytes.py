"""P4, P6, P7 of policies that choose what is read: every entry stays, and landmarks are bytes like others."""

from pathlib import Path

import pytest
import torch

import kvcompile
from tests.driving import drive, one_by_one
from tests.model.test_bytes import BOOKKEEPING, live_bytes
from tests.models import tokens
from tests.reading import LIBRARY, some

PROMPT, STEPS = tokens(200, seed=3), tokens(12, seed=4)
ENTRY = 2 * 64 * 4


def within_the_plan(model, policy, backend, prompt, options, **told):
    """Asserts of a prompt and 12 steps that bytes held are those reported, and none more than planned. told: to the
    model, with the prompt."""
    weights = sum(Path(path).stat().st_size for path in options.get("tables", {}).values())  # no part of the cache
    plan = kvcompile.explain(policy, model, prompt=len(prompt), generate=12, **options).to_dict()
    before = live_bytes()
    kvcompile.optimize(model, policy, backend=backend, compile="off", **options)
    with torch.no_grad():
        cache = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1, **told).past_key_values
        for token in STEPS:
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    held = live_bytes() - before
    report = kvcompile.report(model).to_dict()
    assert report["bytes_resident"] <= report["bytes_allocated"] <= report["bytes_peak"]
    assert report["bytes_allocated"] <= held + 1, "claims pools that are not there"
    assert held <= report["bytes_allocated"] + weights + BOOKKEEPING, "holds more than it says"
    assert report["bytes_full"] == plan["bytes_full"]
    assert report["bytes_resident"] <= plan["bytes"] + BOOKKEEPING
    assert report["bytes_allocated"] <= plan["bytes_peak"] + BOOKKEEPING
    assert report["bytes_peak"] <= plan["bytes_peak"] + BOOKKEEPING


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["quest", "moba"]))
def test_p4_memory_of_reads_is_what_is_held_and_within_the_plan(name, backend):
    case = LIBRARY[name]
    within_the_plan(case.model(), case.policy, backend, PROMPT, case.options())


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["quest", "llmdrop"]))
def test_the_ceiling_of_a_run_counts_what_its_steps_read(name, backend):
    """Bytes read, not bytes held: what `explain` says before the run, the report says after it."""
    case = LIBRARY[name]
    planned = kvcompile.explain(case.policy, case.model(), prompt=200, generate=12, **case.options()).to_dict()
    model = case.optimized(backend)
    drive(model, PROMPT, *one_by_one(STEPS))
    told = kvcompile.report(model).to_dict()
    assert told["ceiling"] == pytest.approx(planned["ceiling"], rel=1e-9)
    if name in ("quest", "powerattention", "moba", "llmdrop"):  # others read all, or what is not known before
        assert told["ceiling"] > 1.0


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["tidal", "llmdrop"]))
def test_p6_footprint_of_reads_is_that_of_the_full_cache(name, backend):
    """Layers that are off hold nothing and count as heads that hold nothing."""
    case = LIBRARY[name]
    model = case.optimized(backend)
    drive(model, PROMPT[:60], *one_by_one(STEPS))
    truth = case.oracle()
    truth.run(PROMPT[:60], STEPS)
    told = kvcompile.report(model).to_dict()
    assert told["footprint"] == pytest.approx(truth.footprint(), abs=1e-12)
    assert told["footprint"] == pytest.approx(1 - len(truth.off) / truth.layers, abs=1e-12)
    assert told["evictions"] == 0


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["quest"]))
def test_p7_reads_lose_no_entry_through_a_long_decode(name, backend):
    case = LIBRARY[name]
    model = case.optimized(backend)
    off = case.reader().off
    seen = drive(model, PROMPT[:30], *one_by_one(tokens(36, seed=8)))
    for j, found in enumerate(seen):
        everything = tuple(range(30 + j))
        for layer, heads in enumerate(found.kept[0]):
            assert all(head == (() if layer in off else everything) for head in heads), f"layer {layer}, call {j}"


def test_explain_counts_the_landmarks_that_a_step_has_at_hand():
    """On both sides of an edge of pages of four: a page counts from the token after its last on."""
    case = LIBRARY["quest"]
    model = case.optimized("cpu")
    cache = model(torch.tensor([PROMPT[:18]]), logits_to_keep=1).past_key_values
    told, held = [], []
    for steps, token in enumerate(STEPS[:7], 1):
        model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)
        (read,) = (r for r in kvcompile.explain(case.policy, model, prompt=18, generate=steps, **case.options()).reads
                   if r.landmark_bytes)  # fmt: skip
        told.append(read.landmark_bytes * read.resident / ENTRY)  # a page's smallest and largest key
        held.append(cache.store.marked.unique().tolist())
    assert held == [[4], [4], [5], [5], [5], [5], [6]]
    assert told == pytest.approx([n for (n,) in held])
