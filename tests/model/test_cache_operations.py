"""What can be done to a cache between forwards: select, repeat, join, clone, crop, reset, on extents and on pages."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvcompile
from kvcompile import KvCache
from kvcompile.pages import PagedStore
from tests.driving import LIBRARY, Sizes, call, drive, examples, kept, one_by_one, padded, same, some_slow
from tests.models import random_model, tokens

POLICIES = ["keep_all", "snapkv", "h2o", "streaming", "adakv"]
LAYOUTS = ["extents", "pages"]


def model_of(name, layout="extents", **changes):
    """On pages the reference's operators run, as they do on a GPU where no kernel exists."""
    sample = LIBRARY[name](Sizes(**changes))
    model = sample.model()
    backend = "cpu" if layout == "extents" else "reference"
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **sample.params)
    model.forward.engine.paged = layout == "pages"
    return model


def step(model, cache, fed):
    return call(model, torch.tensor([[t] for t in fed]), cache)[0]


def conserved(cache):
    """Pages: held by a row or free, each once; extents: inside of the pool and apart from each other."""
    store = cache.store
    if isinstance(store, PagedStore):
        held = torch.arange(store.table.shape[1]) < -(-store.length // store.plan.page)[:, None]
        pages = store.table[held].unique().tolist()
        free = store.free[: int(store.top)].tolist()
        assert sorted(pages + free) == list(range(store.free.shape[0]))
        assert cache.nbytes() == len(pages) * store.plan.page * store.slot_bytes + store.beside_bytes
        assert int(held.sum()) - len(pages) == store.shared.saved
        return
    for layer, pool in enumerate(store.pools):
        places = sorted((start, start + room) for start, room in store.table[layer].tolist() if room)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
        assert not places or places[-1][1] <= min(pool.slots, int(store.top[layer]))
        assert bool((store.length[layer] <= store.table[layer, :, 1]).all())


def test_room_that_crop_left_is_not_counted_on_after_a_repeat():
    model = model_of("keep_all")
    _, cache = call(model, torch.tensor([tokens(40)]))
    cache.crop(29)  # leaves its row more room than a copy of it gets
    step(model, cache, [5])
    cache.select([0, 0])
    for token in range(6):
        step(model, cache, [token, token])
        conserved(cache)


@pytest.mark.parametrize("name", ["keep_all", "streaming_compact"])
def test_sites_stay_from_step_to_step_and_follow_what_moves(name):
    model = model_of(name)
    _, cache = call(model, torch.tensor([tokens(20)]))
    step(model, cache, [5])
    sites = cache.store.sites()
    step(model, cache, [6])
    assert cache.store.sites() is sites
    cache.select([0, 0])
    step(model, cache, [7, 7])
    for layer, site in enumerate(cache.store.sites()):
        fresh = cache.store.site(layer)
        assert [t.data_ptr() for t in site if t.numel()] == [t.data_ptr() for t in fresh if t.numel()]
        assert site.clock is cache.store.clock and site is not sites[layer]


# -- shared prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    some_slow(POLICIES, LAYOUTS, [(name, "pages") for name in POLICIES[1:]] + [("h2o", "extents")]),
)
def test_continuations_of_a_shared_prefix_are_what_each_is_alone(name, layout):
    model = model_of(name, layout)
    prompt, parts = tokens(37, seed=1), [tokens(12, seed=10 + i) for i in range(3)]
    alone = [drive(model, prompt, *one_by_one(part))[1:] for part in parts]
    _, cache = call(model, torch.tensor([prompt]))
    cache.select([0] * 3)
    for j in range(12):
        found = step(model, cache, [part[j] for part in parts])
        conserved(cache)
        for i, truth in enumerate(alone):
            assert found.kept[i] == truth[j].kept[0]
            same(found.logits[i : i + 1], truth[j].logits, f"continuation {i}, step {j}")


def test_a_shared_page_is_counted_once_and_freed_by_its_last_holder():
    model = model_of("keep_all", "pages")
    _, cache = call(model, torch.tensor([tokens(40, seed=1)]))  # two full pages and a half one a row
    rows, page = 6, cache.store.plan.page * cache.store.slot_bytes
    beside = cache.store.beside_bytes
    assert cache.nbytes() - beside == rows * 3 * page
    allocated = cache.stats()["bytes_allocated"]
    cache.select([0] * 4)
    assert cache.nbytes() - beside == rows * (2 + 4) * page
    assert cache.stats()["bytes_allocated"] < 4 * allocated
    cache.select([1, 3])
    assert cache.nbytes() - beside == rows * (2 + 2) * page
    cache.select([1])
    assert cache.nbytes() - beside == rows * 3 * page
    assert cache.store.shared.saved == 0
    conserved(cache)


def test_rows_that_decide_copy_their_shared_pages_before_the_forward():
    """One of two continuations is asked to decide (a second prompt); the other keeps what both shared."""
    model = model_of("snapkv", "pages", budget=40)
    prompt, more = tokens(60, seed=1), tokens(20, seed=2)
    truth = drive(model, prompt, more)[-1]
    _, cache = call(model, torch.tensor([prompt]))
    before = kept(cache, 3)
    cache.select([0, 0])
    shared = cache.store.shared.saved
    ids, mask = padded([more, []], "left")
    found, cache = call(model, ids, cache, mask)
    assert shared > 0
    assert cache.store.shared.saved == 0
    assert found.kept == (truth.kept[0], before)
    conserved(cache)


def test_what_reads_change_is_never_shared():
    model = model_of("h2o", "pages")
    _, cache = call(model, torch.tensor([tokens(40, seed=1)]))
    one = cache.nbytes() - cache.store.beside_bytes
    cache.select([0, 0])
    assert cache.nbytes() - cache.store.beside_bytes == 2 * one


# -- any mix of operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    some_slow(["streaming", "h2o", "adakv", "lagkv", "lazy"], LAYOUTS, [("adakv", "pages"), ("streaming", "extents")]),
)
@examples(5)
@given(data=st.data())
def test_any_operations_leave_each_sequence_what_it_is_alone(name, layout, data):
    """Each sequence's history is replayed alone afterwards: same logits, same positions; memory adds up all the way."""
    model = model_of(name, layout)
    fresh = iter(range(1000))
    lengths = data.draw(st.lists(st.integers(1, 45), min_size=1, max_size=3), "prompts")
    prompts = [tokens(n, seed=next(fresh)) for n in lengths]
    ids, mask = padded(prompts, "left")
    found, cache = call(model, ids, None, mask)
    history = [[p] for p in prompts]
    for kind in data.draw(
        st.lists(st.sampled_from(["step", "select", "clone", "join"]), min_size=4, max_size=9), "ops"
    ):
        if kind == "step":
            fed = [tokens(1, seed=next(fresh))[0] for _ in history]
            found = step(model, cache, fed)
            history = [[*h, [t]] for h, t in zip(history, fed, strict=True)]
        elif kind == "select":
            chosen = data.draw(st.lists(st.integers(0, len(history) - 1), min_size=1, max_size=4), "rows")
            cache.select(chosen)
            history = [list(history[b]) for b in chosen]
        elif kind == "clone":
            cache = copy.deepcopy(cache)
        elif len(history) < 4:
            prompt = tokens(data.draw(st.integers(1, 30), "joining"), seed=next(fresh))
            cache = KvCache.join([cache, call(model, torch.tensor([prompt]))[1]])
            history.append([prompt])
        assert cache.batch == len(history)
        conserved(cache)
    last = [tokens(1, seed=next(fresh))[0] for _ in history]
    found = step(model, cache, last)
    for b, (turns, token) in enumerate(zip(history, last, strict=True)):
        truth = drive(model, *turns, [token])[-1]
        assert found.kept[b] == truth.kept[0]
        same(found.logits[b : b + 1], truth.logits, f"sequence {b}")
    assert cache.run.tokens == [sum(map(len, turns)) + 1 for turns in history]
    assert cache.stats()["evictions"] == sum(cache.run.tokens) * 6 - int(cache.store.length.sum())


def test_the_names_of_transformers_are_select():
    model = model_of("streaming")
    prompts = [tokens(20, seed=b) for b in range(2)]
    alone = [drive(model, p)[0].kept[0] for p in prompts]
    for ask, chosen in (
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1]),
    ):
        _, cache = call(model, torch.tensor(prompts))
        ask(cache)
        assert [kept(cache, 3, b) for b in range(cache.batch)] == [alone[b] for b in chosen]


@pytest.mark.parametrize("chosen", [[], [2], [-1]])
def test_a_selection_that_names_no_sequence_is_refused(chosen):
    _, cache = call(model_of("streaming"), torch.tensor([tokens(20, seed=b) for b in range(2)]))
    with pytest.raises(kvcompile.KvCompileError, match="cannot be selected"):
        cache.select(chosen)


def test_caches_of_different_policies_are_not_joined():
    model = random_model("llama64")
    found = []
    for window in (5, 6):
        kvcompile.optimize(model, "streaming", compile="off", n_sink=1, window=window)
        found.append(call(model, torch.tensor([tokens(20)]))[1])
    with pytest.raises(kvcompile.KvCompileError, match="one policy"):
        KvCache.join(found)
    with pytest.raises(kvcompile.KvCompileError, match="at least one"):
        KvCache.join([])


def test_an_emptied_cache_is_as_new():
    model = model_of("h2o", "pages")
    prompt = torch.tensor([tokens(40, seed=1)])
    truth, cache = call(model, prompt)
    fresh = cache.stats()["footprint"]
    step(model, cache, [5])
    cache.reset()
    assert (cache.get_seq_length(), cache.batch) == (0, 1)
    assert cache.nbytes() == cache.store.beside_bytes
    found, cache = call(model, prompt, cache)
    assert found.kept == truth.kept
    assert torch.equal(found.logits, truth.logits)
    assert cache.stats()["footprint"] == fresh


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_that_a_limit_has_no_room_for_are_refused_and_change_nothing(layout):
    model = random_model("llama64")
    prompt, backend = torch.tensor([tokens(120, seed=1)]), "cpu" if layout == "extents" else "reference"
    kvcompile.optimize(model, "h2o", backend=backend, compile="off", max_bytes=2_000_000, heavy=60, local=30)
    model.forward.engine.paged = layout == "pages"
    found, cache = call(model, prompt)
    before = cache.nbytes()
    for ask in (lambda: cache.select([0] * 40), lambda: KvCache.join([cache] * 40)):
        with pytest.raises(kvcompile.KvCompileError, match="max_bytes"):
            ask()
        assert (cache.batch, cache.nbytes(), kept(cache, 3)) == (1, before, found.kept[0])
        conserved(cache)
    cache.select([0] * 3)
    step(model, cache, [3, 4, 5])
    conserved(cache)


# -- generate() on what came of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_goes_on_after_sequences_of_different_padding_were_selected_or_joined(layout):
    """The user keeps the rows of `sequences` that he keeps of the cache; joined ones he pads on the left, as before."""
    model = model_of("streaming", layout)
    request = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    prompts = [tokens(n, seed=n) for n in (23, 9, 14)]
    alone = [model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :] for p in prompts]
    ids, mask = padded(prompts, "left")
    out = model.generate(ids, attention_mask=mask, **request)
    cache, chosen = out.past_key_values, [2, 1, 2]
    cache.select(chosen)
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)[chosen]
    more = model.generate(out.sequences[chosen], attention_mask=mask, past_key_values=cache, **request)
    for row, b in enumerate(chosen):
        assert torch.equal(more.sequences[row, -8:], alone[b])
    single = [model.generate(torch.tensor([p]), **request) for p in prompts]
    cache = KvCache.join([s.past_key_values for s in single])
    ids, mask = padded([s.sequences[0].tolist() for s in single], "left")
    more = model.generate(ids, attention_mask=mask, past_key_values=cache, **request)
    for row, truth in enumerate(alone):
        assert torch.equal(more.sequences[row, -8:], truth)


def test_a_mask_is_not_taken_for_numbers_of_sequences():
    _, cache = call(model_of("streaming"), torch.tensor([tokens(20, seed=b) for b in range(2)]))
    for mask in (torch.tensor([False, True]), [False, True]):
        with pytest.raises(kvcompile.KvCompileError, match="batch_select_indices"):
            cache.select(mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_whose_rows_are_all_empty_can_be_copied(layout):
    """Of a prompt of one token this policy keeps nothing."""
    model = model_of("h2o", layout)
    _, cache = call(model, torch.tensor([[7]]))
    assert not int(cache.store.length.sum())
    twin = cache.clone()
    twin.select([0, 0])
    found = step(model, twin, [9, 9])
    same(found.logits[1:], step(model, cache, [9]).logits, "the copy's step")


@pytest.mark.parametrize("wrong", [0, None, torch.tensor(0), [0.5], ["0"], [None]], ids=repr)
def test_what_is_no_list_of_sequences_is_refused_by_name(wrong):
    _, cache = call(model_of("keep_all"), torch.tensor([tokens(4)]))
    with pytest.raises(kvcompile.KvCompileError, match="select takes a list of numbers"):
        cache.select(wrong)
    with pytest.raises(kvcompile.KvCompileError, match="join takes a list"):
        KvCache.join(cache if wrong == 0 else wrong)
    assert cache.batch == 1


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("crop", ("a",), "tokens must be a whole number, not 'a'"),
        ("crop", (-1.5,), "tokens must be a whole number, not -1.5"),
        ("crop", (True,), "tokens must be a whole number, not True"),
        ("crop", (torch.tensor([1, 2]),), "tokens must be a whole number"),
        ("positions", ("a",), "layer must be a whole number, not 'a'"),
        ("positions", (3,), "layer 3 of a model with 3 layers: give one of 0 to 2"),
        ("positions", (-1,), "layer -1 of a model with 3 layers"),
        ("positions", (0, 1.0), "row must be a whole number, not 1.0"),
        ("positions", (0, -1), "row -1 of a cache with 2 sequences: give one of 0 to 1"),
        ("select", ("x",), "select takes a list of numbers"),
        ("select", ([True, False],), "a mask is for batch_select_indices, as a tensor"),
        ("batch_select_indices", ("x",), "select takes a list of numbers"),
        ("batch_select_indices", (torch.tensor([True]),), r"mask of shape \[1\] for a cache with 2 sequences"),
        ("batch_select_indices", (torch.tensor([[False, True]]),), r"mask of shape \[1, 2\]"),
        ("batch_repeat_interleave", ("a",), "repeats must be a whole number, not 'a'"),
        ("batch_repeat_interleave", (0,), "every sequence stays at least once"),
    ],
)
def test_numbers_that_are_none_or_name_nothing_are_refused_and_change_nothing(name, args, said, two_sequences):
    before = [kept(two_sequences, 3, row) for row in range(2)]
    with pytest.raises(kvcompile.KvCompileError, match=said):
        getattr(two_sequences, name)(*args)
    assert two_sequences.batch == 2 and two_sequences.columns == 12
    assert [kept(two_sequences, 3, row) for row in range(2)] == before


@pytest.fixture(scope="module")
def two_sequences():
    model = model_of("keep_all")
    return call(model, torch.tensor([tokens(12, seed=1), tokens(12, seed=2)]))[1]
