"""Saved caches: restored ones go on as the saved ones; another's are refused; writing that fails changes nothing."""

import json
import os
import signal
import stat
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kvcompile
from kvcompile import sealed
from kvcompile.api import optimized
from kvcompile.saving import HEAD, _numbers
from kvcompile.sequences import Progress
from tests.driving import LIBRARY, Sizes, call, padded, same
from tests.models import random_model, tokens

NAMES = ["keep_all", "snapkv", "h2o", "streaming", "adakv", "prulong", "lagkv", "windowkv", "d2o", "prefixkv"]
NAMES += ["streaming_compact", "elastic"]
ACROSS = """policy all_layers(budget=12):
    score s = sum[q in last(4)] mean[g] attn
    keep recent(4) | top(budget - 4) by s across layers
    at prefill.end
"""
TURNS = [[[3], [4]], [[8], [9]], [tokens(7, seed=5), tokens(7, seed=6)], [[4], [5]]]


def ready(policy, options, model=None, paged=False):
    model = kvcompile.optimize(model or random_model("llama64"), policy, backend="reference", compile="off", **options)
    model.forward.engine.paged = paged
    return model


def filled(model):
    """A cache of two sequences of different lengths, padded on the left, after two steps."""
    ids, mask = padded([tokens(31, seed=1), tokens(19, seed=2)], "left")
    cache = call(model, ids, mask=mask)[1]
    for token in (5, 9):
        call(model, torch.tensor([[token], [token + 1]]), cache)
    return cache


def goes_on_alike(model, cache, twin_model, twin):
    assert twin.get_seq_length() == cache.get_seq_length()
    for turn in TURNS:
        mine, _ = call(twin_model, torch.tensor(turn), twin)
        truth, _ = call(model, torch.tensor(turn), cache)
        assert mine.kept == truth.kept
        same(mine.logits, truth.logits, f"turn {turn}")
    told, truth = twin.stats(), cache.stats()
    for key in ("footprint", "peak", "kept", "evictions", "lengths", "bytes_full", "footprint_by_head"):
        assert told[key] == truth[key], key


def goes_from(name, paged, folder):
    sample = LIBRARY[name](Sizes())
    options = sample.options(folder)
    model = ready(sample.policy, options, sample.model(), paged)
    twin_model = ready(sample.policy, options, sample.model(), not paged)
    cache = filled(model)
    kvcompile.save_cache(model, cache, folder / "cache")
    goes_on_alike(model, cache, twin_model, kvcompile.load_cache(twin_model, folder / "cache"))


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_saved_from_pages_goes_on_in_extents(name, tmp_path):
    goes_from(name, True, tmp_path)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_a_cache_saved_from_extents_goes_on_in_pages(name, tmp_path):
    goes_from(name, False, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_policy_goes_on_in_the_other_layout(name, paged, tmp_path):
    goes_from(name, paged, tmp_path)


def test_a_policy_whose_layers_compete_goes_on(tmp_path):
    model = ready(ACROSS, {})
    cache = filled(model)
    kvcompile.save_cache(model, cache, tmp_path / "cache")
    goes_on_alike(model, cache, model, kvcompile.load_cache(model, tmp_path / "cache"))


def test_generate_goes_on_from_a_restored_cache(tmp_path):
    model = kvcompile.optimize(random_model("llama64"), "h2o", compile="off", heavy="30% of prompt")
    request = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    one = model.generate(torch.tensor([tokens(24, seed=1)]), **request)
    kvcompile.save_cache(model, one.past_key_values, tmp_path / "cache")
    text = torch.tensor([one.sequences[0].tolist() + tokens(6, seed=2)])
    fresh = kvcompile.optimize(random_model("llama64"), "h2o", compile="off", heavy="30% of prompt")
    restored = fresh.generate(text, past_key_values=kvcompile.load_cache(fresh, tmp_path / "cache"), **request)
    direct = model.generate(text, past_key_values=one.past_key_values, **request)
    assert torch.equal(restored.sequences, direct.sequences)


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    model = ready("streaming", {"n_sink": 1, "window": 6}, random_model("llama64").bfloat16())
    cache = filled(model)
    kvcompile.save_cache(model, cache, tmp_path / "one")
    kvcompile.save_cache(model, kvcompile.load_cache(model, tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_number_of_a_sequences_progress_is_saved():
    assert _numbers(Progress()).keys() == {f.name for f in fields(Progress)}


# -- one file that the tests below do things to ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return ready("snapkv", {"budget": 10, "observe": 4, "pool": 3})


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    """The bytes of a saved cache."""
    path = tmp_path_factory.mktemp("saved") / "cache"
    kvcompile.save_cache(model, filled(model), path)
    return path.read_bytes()


@pytest.fixture
def saved(content, tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(content)
    return path


def refused(model, path, *words):
    with pytest.raises(kvcompile.KvCompileError) as found:
        kvcompile.load_cache(model, path)
    for word in words:
        assert word in str(found.value), f"{word!r} is not in: {found.value}"
    assert str(path) in str(found.value)


def test_the_file_is_plain_safetensors_for_its_owner_only(saved, model, tmp_path):
    kvcompile.save_cache(model, filled(model), tmp_path / "again")
    assert stat.S_IMODE((tmp_path / "again").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "cache"]
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()[HEAD])["policy"].startswith("snapkv")
    cache, tensors = kvcompile.load_cache(model, saved), load_file(saved)
    where = torch.cat(cache.positions(0, 0) + cache.positions(0, 1))
    assert tensors["layers.0.pos"].sort().values.tolist() == where.sort().values.tolist()


def test_another_policy_other_parameters_another_model_other_weights_another_dtype(saved):
    snap = {"budget": 10, "observe": 4, "pool": 3}
    refused(ready("streaming", {}), saved, "another policy", "snapkv", "streaming")
    refused(ready("snapkv", {**snap, "budget": 11}), saved, "other parameters")
    refused(ready("snapkv", snap, random_model("llama128")), saved, "other sizes", "head_dim 64 there, 128 here")
    refused(ready("snapkv", snap, random_model("llama64", seed=1)), saved, "other weights")
    refused(ready("snapkv", snap, random_model("llama64").bfloat16()), saved, "dtype float32 there, bfloat16 here")


def test_a_model_that_is_not_optimised(saved):
    with pytest.raises(kvcompile.KvCompileError, match="not optimised"):
        kvcompile.load_cache(random_model("llama64"), saved)


def test_a_cache_is_saved_only_with_its_own_model(model, tmp_path):
    other = ready("streaming", {})
    with pytest.raises(kvcompile.KvCompileError, match="streaming"):
        kvcompile.save_cache(model, filled(other), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_files_of_others(model, tmp_path):
    path = tmp_path / "cache"
    save_file({"layers.0.k": torch.zeros(4, 64)}, path)
    refused(model, path, "no saved cache of kvcompile")
    torch.save({"k": torch.zeros(3)}, path)
    refused(model, path, "safetensors")
    path.write_bytes(b"")
    refused(model, path, "cut off")


def test_things_that_are_no_files(model, tmp_path):
    refused(model, tmp_path / "missing", "No such file")
    refused(model, tmp_path, "not a plain file")
    os.mkfifo(tmp_path / "pipe")
    refused(model, tmp_path / "pipe", "not a plain file")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    refused(model, tmp_path / "round", "cannot be read")
    with pytest.raises(kvcompile.KvCompileError, match="folder"):
        kvcompile.save_cache(model, filled(model), tmp_path)
    with pytest.raises(kvcompile.KvCompileError, match="cannot be written"):
        kvcompile.save_cache(model, filled(model), tmp_path / "missing" / "cache")
    with pytest.raises(kvcompile.KvCompileError, match="cannot be written"):
        kvcompile.save_cache(model, filled(model), tmp_path / "round")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_rights_that_are_missing(model, saved):
    saved.chmod(0)
    refused(model, saved, "Permission denied")
    saved.parent.chmod(0o500)
    with pytest.raises(kvcompile.KvCompileError, match="Permission denied"):
        kvcompile.save_cache(model, filled(model), saved.parent / "new")
    saved.parent.chmod(0o700)


def test_a_link_is_followed_both_ways(model, saved, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(saved)
    before = saved.read_bytes()
    kvcompile.save_cache(model, kvcompile.load_cache(model, link), link)
    assert link.is_symlink()
    assert saved.read_bytes() == before


# -- writing that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call_name", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(call_name, model, saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if call_name == "write":
        monkeypatch.setattr(sealed, "_bytes_of", full)
    else:
        monkeypatch.setattr(os, call_name, full)
    cache = filled(model)
    with pytest.raises(kvcompile.KvCompileError, match="No space left"):
        kvcompile.save_cache(model, cache, saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    call(model, torch.tensor([[3], [4]]), cache)  # and the cache goes on


@pytest.mark.parametrize("calls", [1, 2, 9, 20, "fsync", "replace"])
def test_a_kill_in_mid_save_leaves_the_old_file_valid(calls, model, saved, content):
    """A child process kills itself in the middle of its n-th tensor, before it has flushed, or before the rename."""
    old = kvcompile.load_cache(model, saved).positions(0)
    made = sealed.Part("x", torch.float32, (1 << 15,), lambda: torch.ones(1 << 15))
    parts = [made._replace(name=f"x{i}") for i in range(24)]
    child = os.fork()
    if not child:
        left = [calls]

        def dying(*args):
            left[0] = left[0] - 1 if isinstance(left[0], int) else 0
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args)

        plain = sealed._bytes_of
        if isinstance(calls, int):
            sealed._bytes_of = dying
        else:
            setattr(os, calls, dying)
        sealed.put(saved, {}, parts)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert saved.read_bytes() == content
    assert [p.tolist() for p in kvcompile.load_cache(model, saved).positions(0)] == [p.tolist() for p in old]


def test_drafts_of_killed_writers_go_after_a_day(model, saved):
    old, new, other = (saved.with_name(name) for name in (".cache.draft-a", ".cache.draft-b", ".other.draft-a"))
    for draft in (old, new, other):
        draft.write_bytes(b"half")
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    kvcompile.save_cache(model, filled(model), saved)
    assert sorted(p.name for p in saved.parent.iterdir()) == [".cache.draft-b", ".other.draft-a", "cache"]


def test_a_model_restored_meanwhile_has_no_caches_to_save(tmp_path):
    model = ready("keep_all", {})
    cache = filled(model)
    kvcompile.restore(model)
    with pytest.raises(kvcompile.KvCompileError, match="not optimised"):
        kvcompile.save_cache(model, cache, tmp_path / "cache")
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    kvcompile.save_cache(model, cache, tmp_path / "cache")
    assert optimized(model).compiled.plan.digest == cache.plan.digest


def test_a_cache_that_exceeds_the_models_max_bytes_is_not_restored(saved):
    """And takes no room from the model: a smaller one of its own still fits."""
    snap = {"budget": 10, "observe": 4, "pool": 3}
    room = kvcompile.load_cache(ready("snapkv", snap), saved).stats()["bytes_allocated"]
    small = ready("snapkv", {**snap, "max_bytes": room * 2 // 3})
    with pytest.raises(kvcompile.KvCompileError, match="max_bytes"):
        kvcompile.load_cache(small, saved)
    assert call(small, torch.tensor([tokens(6, seed=1)]))


def test_tokens_taken_back_that_this_account_never_timed_leave_no_negative_speed(tmp_path):
    model = ready("keep_all", {})
    kvcompile.save_cache(model, filled(model), tmp_path / "cache")
    cache = kvcompile.load_cache(model, tmp_path / "cache")
    cache.crop(-2)
    call(model, torch.tensor([[5], [6]]), cache)
    assert cache.stats()["decode_tokens_per_second"] > 0


def test_what_is_no_cache_is_not_saved(tmp_path):
    with pytest.raises(kvcompile.KvCompileError, match="not NoneType"):
        kvcompile.save_cache(ready("keep_all", {}), None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
