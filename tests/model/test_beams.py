"""Beam search: keep_all gives the untouched model's beams; each beam keeps what its policy says of its own tokens."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import kvcompile
from tests.driving import LIBRARY, Sizes, call, kept, padded, some_slow
from tests.models import random_model, tokens

LAYOUTS = ["extents", "pages"]


def model_of(name, layout):
    sample = LIBRARY[name](Sizes())
    model = sample.model()
    backend = "cpu" if layout == "extents" else "reference"
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **sample.params)
    model.forward.engine.paged = layout == "pages"
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "request_of",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "top_k": 12},
    ],
    ids=["beams", "returned", "sampled"],
)
def test_full_caches_give_the_untouched_models_beams(layout, request_of):
    prompts = [tokens(19, seed=1), tokens(8, seed=2)]
    ids, mask = padded(prompts, "left")

    def run(model):
        torch.manual_seed(5)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=10, return_dict_in_generate=True, output_scores=True, **request_of
        )

    truth, made = run(random_model("llama64")), run(model_of("keep_all", layout))
    assert torch.equal(made.sequences, truth.sequences)
    torch.testing.assert_close(made.sequences_scores, truth.sequences_scores, atol=1e-4, rtol=1e-4)


class Watch(LogitsProcessor):
    """Takes down, before each choice, the tokens of every beam and what its rows hold."""

    def __init__(self, model):
        self.rows, self.cache, self.moved = [], None, 0
        model.register_forward_hook(self._forward)

    def _forward(self, module, args, output):
        if self.cache is None:
            self.cache = output.past_key_values
            original = self.cache.select
            self.cache.select = lambda rows: (self._moves(rows), original(rows))

    def _moves(self, rows):
        self.moved += rows.tolist() != list(range(len(rows)))

    def __call__(self, input_ids, scores):
        self.rows = [(ids.tolist(), kept(self.cache, 3, b)) for b, ids in enumerate(input_ids)]
        return scores


@pytest.mark.parametrize(
    ("name", "layout"),
    some_slow(["snapkv", "h2o", "streaming", "adakv"], LAYOUTS, [("h2o", "extents"), ("snapkv", "pages")]),
)
def test_every_beam_keeps_what_its_policy_says_of_its_own_tokens(name, layout):
    """The tokens of each beam, fed one after the other to a cache of their own, leave the same positions."""
    model = model_of(name, layout)
    prompt = tokens(23, seed=3)
    watch = Watch(model)
    model.generate(
        torch.tensor([prompt]), num_beams=3, max_new_tokens=9, do_sample=True, top_k=40, temperature=3.0,
        logits_processor=LogitsProcessorList([watch]),
    )  # fmt: skip
    assert watch.moved > 1
    assert len({tuple(ids) for ids, _ in watch.rows}) == 3
    for ids, positions in watch.rows:
        _, cache = call(model, torch.tensor([prompt]))
        for token in ids[len(prompt) :]:
            call(model, torch.tensor([[token]]), cache)
        assert kept(cache, 3) == positions


def test_beams_share_their_prompts_pages():
    """Rows that go on from one beam hold its pages: far fewer than so many caches."""
    model = model_of("keep_all", "pages")
    prompt, beams = tokens(64, seed=1), 4
    made = model.generate(
        torch.tensor([prompt]), num_beams=beams, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    cache = made.past_key_values
    single = call(model, torch.tensor([prompt]))[1]
    assert cache.store.shared.saved > 0
    assert cache.nbytes() - cache.store.beside_bytes < 3 * (single.nbytes() - single.store.beside_bytes)
