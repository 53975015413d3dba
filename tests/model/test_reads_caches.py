"""Caches whose entries are read by choice: selected, joined, cloned, cropped, saved ones go on as a fresh run does."""

import pytest
import torch

import kvcompile
from kvcompile import KvCache
from tests.driving import BACKENDS, call, drive, kept, one_by_one, padded, same, some_slow
from tests.following import policy
from tests.models import random_model, tokens
from tests.reading import LIBRARY, Case, some

PAGE = "unit page(4) with lo = min[i] k, hi = max[i] k, c = mean[i] k"
QUEST = "attend newest page | top(2) pages by sum[d] max(q * lo, q * hi) per query_head"
NAMES = {
    "quest": LIBRARY["quest"],
    "moba": LIBRARY["moba"],
    "seerattention_r": LIBRARY["seerattention_r"],
    "quest on what is kept": Case(
        policy(PAGE, "state acc = 0", "on attend: acc += sum[q] attn",
               "keep recent(4) | top(20) by acc per head", "at prefill.end, step", QUEST, "at step"),
        lambda: None,
    ),
    "a held set": Case(policy(PAGE, QUEST, "at chunk, every(3)"), lambda: None),
}  # fmt: skip
LAYOUTS = ("extents", "pages")
PAIRS = some_slow(NAMES, LAYOUTS, [("quest", "extents"), ("quest on what is kept", "pages"), ("a held set", "extents")])
FIRST, MORE = tokens(31, seed=1), tokens(9, seed=2)


def model_of(name, layout="extents"):
    model = NAMES[name].optimized("cpu" if layout == "extents" else "reference")
    model.forward.engine.paged = layout == "pages"
    return model


def goes_on(model, cache, alone, rows, what):
    """Steps of MORE from a place on are what `alone` saw in the same steps; the same for every row."""
    for j, seen in alone:
        found, cache = call(model, torch.tensor([[MORE[j]]] * rows), cache)
        for b in range(rows):
            same(found.logits[b : b + 1], seen.logits, f"{what}, step {j}, row {b}")
            assert found.kept[b] == seen.kept[0]


def fresh(model):
    """What a run that nothing disturbs sees in each of its steps."""
    return list(enumerate(drive(model, FIRST, *one_by_one(MORE))[1:]))


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_selected_rows_go_on_as_a_fresh_run(name, layout):
    model = model_of(name, layout)
    alone = fresh(model)
    _, cache = call(model, torch.tensor([FIRST, tokens(31, seed=3)]))
    call(model, torch.tensor([[MORE[0]], [9]]), cache)
    cache.select([0, 0, 0])
    goes_on(model, cache, alone[1:], 3, "selected")


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_joined_and_cloned_caches_go_on_as_a_fresh_run(name, layout):
    model = model_of(name, layout)
    alone = fresh(model)
    caches = [call(model, torch.tensor([FIRST]))[1] for _ in range(2)]
    for cache in caches:
        call(model, torch.tensor([[MORE[0]]]), cache)
    twin = caches[0].clone()
    goes_on(model, KvCache.join(caches), alone[1:], 2, "joined")
    goes_on(model, twin, alone[1:], 1, "cloned")


@pytest.mark.parametrize("name", ["quest", "moba", "seerattention_r"])
def test_a_cropped_cache_goes_on_as_a_fresh_run(name):
    model = model_of(name)
    alone = fresh(model)
    _, cache = call(model, torch.tensor([FIRST]))
    for token in (MORE[0], 17, 23, 41, 5, 6):  # a page is filled with tokens that are taken back
        call(model, torch.tensor([[token]]), cache)
    cache.crop(32)
    goes_on(model, cache, alone[1:], 1, "cropped")


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_saved_cache_goes_on_in_the_other_layout(name, layout, tmp_path):
    model = model_of(name, layout)
    alone = fresh(model)
    _, cache = call(model, torch.tensor([FIRST]))
    for token in MORE[:4]:
        call(model, torch.tensor([[token]]), cache)
    kvcompile.save_cache(model, cache, tmp_path / "cache")
    other = model_of(name, "pages" if layout == "extents" else "extents")
    goes_on(other, kvcompile.load_cache(other, tmp_path / "cache"), alone[4:], 1, "loaded")


@pytest.mark.parametrize(
    ("name", "backend"),
    some(["quest", "moba", "powerattention", "sampleattention", "seerattention_r"], ["quest", "sampleattention"]),
)
def test_generate_of_a_padded_batch_gives_the_tokens_of_each_prompt_alone(name, backend):
    model = LIBRARY[name].optimized(backend)
    prompts = [tokens(n, seed=40 + n) for n in (33, 9, 21)]
    ids, mask = padded(prompts, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for b, mine in enumerate(prompts):
        alone = model.generate(torch.tensor([mine]), max_new_tokens=8, do_sample=False)
        assert together[b, -8:].tolist() == alone[0, -8:].tolist(), f"row {b}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_unlike_lengths_and_phases_read_their_own_sets(backend):
    """A second prompt for one row of a batch while the other takes a step's token: each as it would alone."""
    model = NAMES["moba"].optimized(backend)
    other = tokens(14, seed=6)
    alone = [drive(model, FIRST, tokens(6, seed=7), [11]), drive(model, other, [8], [12])]
    ids, mask = padded([FIRST, other], "left")
    found, cache = call(model, ids, mask=mask)
    ids, more = padded([tokens(6, seed=7), [8]], "left")
    mask = torch.cat([mask, more], 1)
    found, cache = call(model, ids, cache, mask)
    for b in range(2):
        same(found.logits[b, more[b].bool()], alone[b][1].logits[0], f"row {b}, second call")
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    found, _ = call(model, torch.tensor([[11], [12]]), cache, mask)
    for b in range(2):
        same(found.logits[b], alone[b][2].logits[0], f"row {b}, last step")


PICKED = policy(
    "layers 0: attend all",
    "layers 1:",
    "    score s = sum[q in last(4)] attn",
    "    pick t = top(5) by s per head",
    "    attend all",
    "    at prefill.end",
    "layers 2: attend t | recent(3)",
    "at step",
)


@pytest.mark.parametrize(
    ("text", "steps", "tokens_left"),
    [(NAMES["a held set"].policy, 4, 32), (PICKED, 2, 20), (policy(PAGE, QUEST, "at every(2)"), 3, 30)],
    ids=["a set of the third step", "a choice of the prompt", "a set of the second step"],
)
def test_what_a_later_query_chose_is_not_read_by_after_a_crop(text, steps, tokens_left):
    """The set that held before is gone, so the crop is refused; back to where nothing was chosen yet, it is not."""
    model = kvcompile.optimize(random_model(), text, backend="cpu", compile="off")
    _, cache = call(model, torch.tensor([FIRST]))
    for token in MORE[:steps]:
        call(model, torch.tensor([[token]]), cache)
    before = kept(cache, 3)
    with pytest.raises(kvcompile.KvCompileError, match="has decided what to read"):
        cache.crop(tokens_left)
    assert kept(cache, 3) == before and cache.get_seq_length() == 31 + steps


def test_a_crop_behind_the_latest_choice_goes_on_as_a_fresh_run():
    model = model_of("a held set")
    alone = fresh(model)
    _, cache = call(model, torch.tensor([FIRST]))
    for token in (*MORE[:4], 17):
        call(model, torch.tensor([[token]]), cache)
    cache.crop(-1)
    goes_on(model, cache, alone[4:], 1, "cropped")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_and_loaded_caches_say_what_a_step_of_theirs_reads(layout, tmp_path):
    text = policy(PAGE, "attend newest page | top(10% of prompt) pages by dot(q, c) per head", "at step")
    model = kvcompile.optimize(random_model(), text, backend="reference", compile="off")
    model.forward.engine.paged = layout == "pages"
    _, cache = call(model, torch.tensor([tokens(200)]))
    call(model, torch.tensor([[5]]), cache)
    kvcompile.save_cache(model, cache, tmp_path / "cache")
    said = cache.stats()["ceiling"]
    assert said > 1.05
    assert cache.clone().stats()["ceiling"] == said
    assert kvcompile.load_cache(model, tmp_path / "cache").stats()["ceiling"] == said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_landmarks_without_room_are_refused_before_they_are_allocated(layout):
    """A step that begins a new block of landmarks, under a limit that has no room for twice as many."""
    model = model_of("quest", layout)
    limit = model.forward.engine.limit
    _, cache = call(model, torch.tensor([tokens(63)]))
    store = cache.store
    while store.covering(cache.get_seq_length() + 1) == (0, 0):
        call(model, torch.tensor([[5]]), cache)
    room = sum(store.covering(cache.get_seq_length() + 1))
    before = store.bytes_allocated(), store.bytes_resident(), cache.get_seq_length()
    limit.most = before[0] + room - 1
    with pytest.raises(kvcompile.CacheFull) as found:
        call(model, torch.tensor([[5]]), cache)
    assert found.value.cache is cache
    assert (store.bytes_allocated(), store.bytes_resident(), cache.get_seq_length()) == before
    limit.most = None
    call(model, torch.tensor([[5]]), cache)
    assert cache.stats()["bytes_peak"] >= before[0] + room


def test_a_call_that_is_looked_into_for_nan_counts_only_what_its_cache_holds(monkeypatch):
    """Kernels find the entries of a row that drops none by position, so no row may have seen more than it holds."""
    model = NAMES["quest"].model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    options = {"backend": "cpu", "compile": "off", **NAMES["quest"].params}
    kvcompile.optimize(model, NAMES["quest"].policy, **options)
    made, make = [], model.forward.new_cache
    monkeypatch.setattr(model.forward, "new_cache", lambda *given: made.append(make(*given)) or made[-1])
    _, cache = call(model, torch.tensor([[n for n in tokens(41) if n != 7]]))
    told = cache.get_seq_length()
    with pytest.raises(kvcompile.KvCompileError, match=f"hold NaN .*position {told}"):
        call(model, torch.tensor([[7]]), cache)
    assert len(made) == 2
    for looked_into in made:
        assert (looked_into.store.length == looked_into.sequences.each[0].seen).all()
