"""`max_bytes`: planned before running, refused with the figures, and nothing that was generated is lost."""

import gc

import pytest
import torch

import kvcompile
from kvcompile import CacheFull, KvCompileError, Spans
from kvcompile.pages import PagedStore
from kvcompile.spans import table_bytes
from kvcompile.store import Pools
from tests.models import random_model, tokens

POLICIES = {
    "keep_all": {},
    "streaming": {"n_sink": 4, "window": 28},
    "snapkv": {"budget": 40, "observe": 8},
    "h2o": {"heavy": 20, "local": 20},
    "adakv": {"budget": 40, "observe": 8},
}


def prompt(length, batch=1):
    return torch.tensor([tokens(length, seed=b) for b in range(batch)])


def peak_of(model, policy, length, steps, batch=1):
    options = POLICIES[policy]
    return kvcompile.explain(policy, model, prompt=length, generate=steps, batch=batch, **options).bytes_peak


def generated(model, ids, new, **options):
    mask = torch.ones_like(ids)  # else transformers takes what it has generated for padding, where it is token 0
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_what_explain_says_fits_runs_within_it(policy):
    model, ids = random_model(), prompt(200, batch=2)
    most = peak_of(model, policy, 200, 12, batch=2)
    kvcompile.optimize(model, policy, backend="reference", compile="off", max_bytes=most, **POLICIES[policy])
    out = generated(model, ids, 13)
    report = kvcompile.report(model).to_dict()
    assert report["bytes_allocated"] <= report["bytes_peak"] <= most
    assert out.past_key_values.nbytes() <= most


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefill_without_room_is_refused_before_it_runs_and_says_what_fits(policy):
    model, ids = random_model(), prompt(200, batch=2)
    most = peak_of(model, policy, 200, 0, batch=1) + 4096
    kvcompile.optimize(model, policy, backend="reference", compile="off", max_bytes=most, **POLICIES[policy])
    with pytest.raises(CacheFull, match=r"2 sequences of up to 200 tokens .* the first 1 of the 2 sequences") as caught:
        generated(model, ids, 2)
    error = caught.value
    assert error.limit == most < error.needed and error.sequences is None
    assert error.cache.get_seq_length() == 0 and error.cache.store.bytes_allocated() <= most
    del caught, error  # and with them the cache
    gc.collect()
    generated(model, ids[:1], 2)  # what was said to fit


def test_the_longest_prompt_that_is_said_to_fit_does_and_one_more_token_does_not():
    model = random_model()
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off", max_bytes="300kB")
    with pytest.raises(CacheFull) as caught:
        model(prompt(250))
    longest = int(str(caught.value).split("up to ")[2].split()[0])
    del caught
    assert 16 < longest < 250
    with pytest.raises(CacheFull):
        model(prompt(longest + 1))
    assert model(prompt(longest)).past_key_values.get_seq_length() == longest


@pytest.mark.parametrize(("policy", "backend"), [("keep_all", "cpu"), ("snapkv", "reference")])
def test_a_step_without_room_leaves_the_cache_and_a_larger_limit_goes_on(policy, backend):
    model, ids, options = random_model(), prompt(60), POLICIES[policy]
    kvcompile.optimize(model, policy, backend=backend, compile="off", **options)
    whole = generated(model, ids, 80).sequences
    most = peak_of(model, policy, 60, 20)
    kvcompile.optimize(model, policy, backend=backend, compile="off", max_bytes=most, **options)
    with pytest.raises(CacheFull, match="All tokens so far are in the cache") as caught:
        generated(model, ids, 80)
    cache, sofar = caught.value.cache, caught.value.sequences
    made = sofar.shape[1]
    assert 60 + 20 < made < 60 + 80 and torch.equal(sofar, whole[:, :made])
    assert cache.get_seq_length() == made - 1 and cache.store.bytes_allocated() <= most
    before = [[p.tolist() for p in cache.positions(layer)] for layer in range(3)], cache.stats()["bytes_resident"]
    with pytest.raises(CacheFull):
        model(sofar[:, -1:], past_key_values=cache)
    assert ([[p.tolist() for p in cache.positions(layer)] for layer in range(3)], cache.nbytes()) == before
    kvcompile.optimize(model, policy, backend=backend, compile="off", max_bytes=4 * most, **options)
    rest = generated(model, sofar, 60 + 80 - made, past_key_values=cache)
    assert torch.equal(rest.sequences, whole)


def test_live_caches_of_a_model_share_its_limit_and_those_that_are_gone_do_not_count():
    model, ids = random_model(), prompt(120)
    most = int(1.5 * peak_of(model, "keep_all", 120, 0))
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off", max_bytes=most)
    first = model(ids).past_key_values
    with pytest.raises(CacheFull, match=r"of the model's other caches"):
        model(ids)
    kvcompile.optimize(
        model, "keep_all", backend="reference", compile="off", max_bytes=most
    )  # the cache is still there
    with pytest.raises(CacheFull, match=r"of the model's other caches"):
        model(ids)
    del first
    gc.collect()
    second = model(ids).past_key_values
    other = random_model(seed=1)
    kvcompile.optimize(other, "keep_all", backend="reference", compile="off", max_bytes=most)
    assert other(ids).past_key_values.nbytes() == second.nbytes()


@pytest.mark.parametrize("paged", [False, True])
def test_a_full_device_is_the_same_clean_error(paged, monkeypatch):
    """The allocator of the pools stands in for a device that has no more memory."""
    model, ids = random_model(), prompt(70)
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    model._kvcompile.forward.engine.paged = paged
    whole = generated(model, ids, 40).sequences
    room = {"slots": 110 if not paged else 110 * 3 * 2}
    make = Pools.__init__

    def failing(self, plan, slots, dtype, device):
        if slots > room["slots"] * (1 if paged else 2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        make(self, plan, slots, dtype, device)

    monkeypatch.setattr(Pools, "__init__", failing)
    cache = model(ids).past_key_values
    assert isinstance(cache.store, PagedStore) == paged
    at = 70
    with pytest.raises(CacheFull, match=r"OutOfMemoryError: CUDA out of memory\. Tried to allocate") as caught:
        while at < 109:
            model(whole[:, at : at + 1], past_key_values=cache)
            at += 1
    assert caught.value.cache is cache and caught.value.limit is None
    assert 70 < at == cache.get_seq_length()
    room["slots"] = 1 << 30
    assert torch.equal(generated(model, whole[:, : at + 1], 110 - at - 1, past_key_values=cache).sequences, whole)


@pytest.mark.parametrize("paged", [False, True])
def test_a_batch_in_which_some_step_and_some_prefill_is_refused_as_a_whole(paged):
    model = random_model()
    most = 2 * peak_of(model, "keep_all", 60, 0, batch=2)

    def started(limit):
        kvcompile.optimize(model, "keep_all", backend="reference", compile="off", max_bytes=limit)
        model._kvcompile.forward.engine.paged = paged
        ids = prompt(40, batch=2)
        return model(ids, attention_mask=torch.tensor([[1] * 40, [0] * 40])).past_key_values

    mixed = prompt(200, batch=2)
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[0, :-1] = 0
    cache = started(most)
    with pytest.raises(CacheFull, match="1 sequence of up to 200 tokens"):
        model(mixed, attention_mask=mask, past_key_values=cache)
    assert [len(p) for p in cache.positions(0, 0)] == [40, 40] and [len(p) for p in cache.positions(0, 1)] == [0, 0]
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off", max_bytes=10 * most)
    model._kvcompile.forward.engine.paged = paged
    there = model(mixed, attention_mask=mask, past_key_values=cache)
    assert [[len(p) for p in cache.positions(layer, b)] for layer in range(3) for b in (0, 1)] == [
        [41, 41],
        [200, 200],
    ] * 3
    again = model(mixed, attention_mask=mask, past_key_values=started(None))
    torch.testing.assert_close(there.logits[:, -1], again.logits[:, -1])


def limited(policy, paged, **options):
    model = kvcompile.optimize(random_model(), policy, backend="reference", compile="off", **options)
    model.forward.engine.paged = paged
    return model, model.forward.engine.limit


def repeat_within(limit, cache):
    """One sequence of several stays and is repeated where nothing more may be allocated: refused, or within."""
    cache.select([0])
    limit.most = cache.store.bytes_allocated()
    try:
        cache.select([0, 0, 0])
    except CacheFull:
        assert cache.batch == cache.store.batch == 1
    assert cache.store.bytes_allocated() <= limit.most


@pytest.mark.parametrize("paged", [False, True])
def test_repeated_sequences_bring_what_stands_beside_their_pools(paged):
    """Pools that have room for repeats, since others were released, and newest queries that have not."""
    model, limit = limited("snapkv", paged, budget=40, observe=32)
    cache = model(prompt(60, batch=4)).past_key_values
    repeat_within(limit, cache)


@pytest.mark.parametrize("paged", [False, True])
def test_repeated_sequences_bring_their_tables_of_stretches(paged):
    model, limit = limited("graph_kv", paged)
    said = [Spans([("item", i, i + 1) for i in range(39)], {"item": []})] * 4
    cache = model(prompt(40, batch=4), spans=said).past_key_values
    repeat_within(limit, cache)


@pytest.mark.parametrize("paged", [False, True])
def test_a_prompt_and_its_candidates_are_refused_together(paged):
    model, limit = limited("keep_all", paged)
    ids = prompt(20).repeat(1, 4)
    refused = 0
    for limit.most in range(372_000, 700_000, 12_000):
        try:
            generated(model, ids, 3, prompt_lookup_num_tokens=16)
            break
        except CacheFull as error:
            assert not error.cache.guard.fault
            refused += 1
    assert refused and limit.most < 690_000


def test_sequences_that_step_do_not_leave_those_that_share_pages_without_room():
    """snapkv decides at the end of the later prompt, and its rows leave the shared pages before that."""
    model, limit = limited("snapkv", True, budget=90, observe=4)
    ids = torch.cat([prompt(40), prompt(40)])
    mask = torch.tensor([[0] * 39 + [1], [1] * 40])
    refused = 0
    for extra in range(360_000, 1_000_000, 80_000):
        limit.most = None
        cache = model(prompt(64)).past_key_values
        cache.select([0, 0])
        limit.most = cache.store.bytes_allocated() + extra
        try:
            model(ids, attention_mask=mask, past_key_values=cache)
            break
        except CacheFull:
            assert not cache.guard.fault and [s.seen for s in cache.sequences.each] == [64, 64]
            refused += 1
    assert refused and not cache.guard.fault and [s.seen for s in cache.sequences.each] == [65, 104]


def test_use_and_the_model_before_it_keep_their_limits():
    model = random_model()
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off", max_bytes=50_000)
    with kvcompile.use(model, "keep_all", backend="reference", compile="off", max_bytes="1GiB"):
        model(prompt(200))
    with pytest.raises(CacheFull):
        model(prompt(200))


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512MB", 512 << 20), ("1.5 k", 1536), ("7", 7), ("3b", 3), (12, 12)]
)
def test_sizes_are_numbers_or_text_with_units_of_1024(text, size):
    plan = kvcompile.explain("keep_all", random_model(), prompt=10, max_bytes=text)
    assert plan.max_bytes == size and plan.to_dict()["fits"] == (plan.bytes_peak <= size)


@pytest.mark.parametrize("wrong", ["", "2 GiBs", "lots", "-5", 0, -3, True, 2.5, "1e9", "9" * 40])
def test_what_is_no_size_is_refused(wrong):
    model = random_model()
    with pytest.raises(KvCompileError, match="max_bytes="):
        kvcompile.optimize(model, "keep_all", max_bytes=wrong)
    assert "_kvcompile" not in vars(model)


def test_explain_says_how_many_sequences_fit():
    model = random_model()
    one = kvcompile.explain("snapkv", model, prompt=200, budget=40, observe=8)
    many = kvcompile.explain("snapkv", model, prompt=200, batch=4, budget=40, observe=8, max_bytes=3 * one.bytes_peak)
    assert many.fits is False and many.batch_that_fits == 3
    assert "limit       does not fit in" in str(many) and "limit" not in str(one)


@pytest.mark.parametrize("paged", [False, True])
def test_tables_of_stretches_ask_before_they_are_made(paged):
    model, limit = limited('policy p():\n    attend span("self") | span("sources")\n', paged)
    cache = model(prompt(8), spans=Spans([("own", 0, 4)])).past_key_values
    cache.reset()
    former, wide = cache.store.segment, Spans([(f"part {i}", i, i + 1) for i in range(100)])
    limit.most = cache.store.bytes_allocated() + table_bytes(cache.plan, [wide]) - 1
    with pytest.raises(CacheFull, match="max_bytes"):
        model(prompt(100), spans=wide, past_key_values=cache)
    assert cache.store.segment is former and cache.sequences.each[0].spans is None
    assert cache.store.bytes_allocated() <= limit.most
    limit.most = None
    model(prompt(100), spans=wide, past_key_values=cache)
    assert cache.store.segment.shape[1] >= 100
