"""Going back: a cropped cache is the cache of the shorter text, or is refused with the reason and left alone."""

import contextlib

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import kvcompile
from kvcompile.drafting import drafting
from tests.driving import LIBRARY, Sizes, call, drive, kept, one_by_one, padded, same, some_slow
from tests.models import random_model, tokens

LAYOUTS = ["extents", "pages"]


def model_of(name, layout="extents", **changes):
    sample = LIBRARY[name](Sizes(**changes))
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend="reference", compile="off", **sample.params)
    model.forward.engine.paged = layout == "pages"
    return model


def fed(model, *turns):
    cache = None
    for turn in turns:
        found, cache = call(model, torch.tensor([turn]), cache)
    return found, cache


@pytest.mark.parametrize(
    ("name", "layout"),
    some_slow(
        ["keep_all", "snapkv", "pyramidkv", "adakv", "snapkv_chunked"],
        LAYOUTS,
        [("keep_all", "extents"), ("snapkv", "pages"), ("adakv", "pages")],
    ),
)
def test_decoded_tokens_can_be_taken_back(name, layout):
    """Ten tokens, seven of them taken back, others in their place: as if the seven had never been."""
    model = model_of(name, layout)
    prompt, first, other = tokens(37, seed=1), tokens(10, seed=2), tokens(4, seed=3)
    _, cache = fed(model, prompt, *one_by_one(first))
    cache.crop(-7)
    assert cache.get_seq_length() == 40
    found = [call(model, torch.tensor([[t]]), cache)[0] for t in other]
    truth = drive(model, prompt, *one_by_one(first[:3] + other))[4:]
    for mine, expected in zip(found, truth, strict=True):
        assert mine.kept == expected.kept
        same(mine.logits, expected.logits, "after crop")
    plain = fed(model, prompt, *one_by_one(first[:3] + other))[1]
    assert cache.run.tokens == plain.run.tokens
    assert cache.sequences.each[0].steps == plain.sequences.each[0].steps
    assert cache.stats()["evictions"] == plain.stats()["evictions"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_cache_can_be_cut_inside_of_its_prompt(layout):
    model = model_of("keep_all", layout)
    prompt, other = tokens(40, seed=1), tokens(9, seed=2)
    _, cache = fed(model, prompt, *one_by_one(tokens(3, seed=3)))
    cache.crop(25)
    assert kept(cache, 3) == (((tuple(range(25)),) * 2),) * 3
    found, _ = call(model, torch.tensor([other]), cache)
    same(found.logits, drive(model, prompt[:25], other)[-1].logits, "second turn")


def test_every_sequence_of_a_padded_batch_goes_back():
    model = model_of("keep_all")
    prompts = [tokens(20, seed=1), tokens(7, seed=2)]
    ids, mask = padded(prompts, "left")
    cache = call(model, ids, None, mask)[1]
    for t in ([[3], [4]], [[5], [6]]):
        call(model, torch.tensor(t), cache)
    cache.crop(-2)
    assert ([s.seen for s in cache.sequences.each], cache.get_seq_length()) == ([20, 7], 20)
    cache.crop(12)
    assert ([s.seen for s in cache.sequences.each], cache.get_seq_length()) == ([12, 7], 12)
    found = call(model, torch.tensor([[9], [9]]), cache)[0]
    for b, prompt in enumerate(prompts):
        same(found.logits[b : b + 1], drive(model, prompt[:12], [9])[-1].logits, f"sequence {b}")


@pytest.mark.parametrize(
    ("name", "tokens_back", "why"),
    [
        ("h2o", -1, "states"),
        ("streaming", -1, "decided what to keep when 41 tokens were known"),
        ("snapkv", 39, "decided what to keep when 40 tokens were known"),
        ("tova", -1, "decided"),
    ],
)
def test_what_cannot_be_undone_is_refused_and_changes_nothing(name, tokens_back, why):
    model = model_of(name)
    found, cache = fed(model, tokens(40, seed=1), [7])
    with pytest.raises(kvcompile.KvCompileError, match=f"(?s)sequence 0 cannot be cropped.*{why}"):
        cache.crop(tokens_back)
    assert kept(cache, 3) == found.kept[0]
    assert cache.get_seq_length() == 41


def test_nothing_to_take_back_is_no_change():
    model = model_of("h2o")
    found, cache = fed(model, tokens(40, seed=1), [7])
    for n in (0, 41, 1000):
        cache.crop(n)
    assert kept(cache, 3) == found.kept[0]


def test_a_decision_by_queries_that_went_is_refused_until_enough_came_in_their_place():
    """snapkv's second turn asks the newest 4 queries: those that the cropped tokens had replaced are no more."""
    prompt, first = tokens(37, seed=1), tokens(6, seed=2)
    model = model_of("snapkv", observe=4)
    _, cache = fed(model, prompt, *one_by_one(first))
    cache.crop(-3)
    with pytest.raises(kvcompile.KvCompileError, match=r"newest 4 queries.*feed at least 3 tokens"):
        call(model, torch.tensor([tokens(2, seed=3)]), cache)
    more = tokens(3, seed=3)
    assert (
        call(model, torch.tensor([more]), cache)[0].kept == drive(model, prompt, *one_by_one(first[:3]), more)[-1].kept
    )


# -- sliding windows -------------------------------------------------------------------------------------------------


def windowed(window=8):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=window, initializer_range=0.12, attn_implementation="sdpa",
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ["keep_all", "snapkv"])
def test_assisted_decoding_inside_of_a_window_waits_with_what_has_left_it(name):
    ids = torch.tensor([(tokens(7, seed=1) * 3)[:19]])
    request = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    params = {"budget": 6, "observe": 2} if name == "snapkv" else {}
    model = kvcompile.optimize(windowed(), name, backend="reference", compile="off", **params)
    plain = model.generate(ids, **request)
    made = model.generate(ids, prompt_lookup_num_tokens=4, **request)
    assert torch.equal(made.sequences, plain.sequences)
    if name == "keep_all":
        assert torch.equal(made.sequences, windowed().generate(ids, **request).sequences)
    # No row holds more than its window and a draft.
    assert int(made.past_key_values.store.length.max()) <= 8 + 5


def test_a_window_that_has_moved_on_cannot_be_moved_back():
    model = kvcompile.optimize(windowed(), "keep_all", backend="reference", compile="off")
    _, cache = fed(model, tokens(30, seed=1))
    with pytest.raises(kvcompile.KvCompileError, match="decided"):
        cache.crop(-1)


def test_a_model_without_windows_is_cut_at_the_tokens_asked_for():
    model = kvcompile.optimize(random_model("qwen64"), "keep_all", compile="off")
    _, cache = fed(model, tokens(12, seed=1))
    cache.crop(5)
    assert kept(cache, 2) == ((tuple(range(5)),) * 2,) * 2


# -- what has no room ------------------------------------------------------------------------------------------------


def test_a_batch_that_shares_pages_is_cropped_as_a_whole_or_not_at_all():
    """Room for the copies of one sequence, then of two, at last of all."""
    model = model_of("keep_all", "pages")
    limit, seen = model.forward.engine.limit, set()
    for extra in (200_000, 300_000, 400_000, 600_000):
        limit.most = None
        _, cache = call(model, torch.tensor([tokens(40)]))
        cache.select([0, 0, 0])
        limit.most = cache.store.bytes_allocated() + extra
        with contextlib.suppress(kvcompile.CacheFull):
            cache.crop(-20)
        lengths = {s.seen for s in cache.sequences.each}
        assert {len(p) for b in range(3) for p in cache.positions(0, b)} == lengths
        seen.add(tuple(lengths))
    assert seen == {(40,), (20,)}


def test_queries_kept_for_a_draft_are_not_put_back_once_tokens_before_it_are_gone():
    """Four tokens as a draft, cut to before it, as many again, cut to inside: what was kept knows an older text."""
    model = model_of("snapkv", observe=4)
    _, cache = fed(model, tokens(37, seed=1), *one_by_one(tokens(3, seed=2)))
    with drafting(model, None):
        call(model, torch.tensor([tokens(4, seed=3)]), cache)
    cache.crop(-6)
    for token in tokens(6, seed=4):
        call(model, torch.tensor([[token]]), cache)
    before = cache.store.ring.clone()
    cache.crop(-3)
    assert torch.equal(cache.store.ring, before)
