"""Caches whose entries are read by choice: selected, joined, cloned, cropped, saved ones go on as a fresh run does."""

import pytest
import torch

import kvcompile
from kvcompile import KvCache
from tests.driving import BACKENDS, call, drive, one_by_one, padded, same, some_slow
from tests.following import policy
from tests.models import tokens
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
