"""P2: a padded, batched prompt gives what the same prompt gives alone: logits and kept positions, all the way."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvcompile
from tests.driving import (
    BACKENDS,
    LIBRARY,
    NEAR_TIE,
    Sizes,
    call,
    drive,
    examples,
    one_by_one,
    padded,
    same,
    sizes,
)
from tests.models import random_model, tokens
from tests.oracle import Oracle

STEPS = 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
@examples(2)
@given(data=st.data())
def test_p2_a_padded_batch_equals_each_prompt_alone(name, backend, data, tmp_path_factory):
    side = data.draw(st.sampled_from(["left", "right"]), "side")
    family = data.draw(st.sampled_from(["llama64", "qwen128"]), "family")
    size = data.draw(sizes(random_model(family).config.num_hidden_layers), "sizes")
    lengths = data.draw(st.lists(st.integers(1, 36), min_size=2, max_size=3), "lengths")
    margin = data.draw(st.integers(0, 3), "columns that are padding in every row")
    sample = LIBRARY[name](size)
    prompts = [tokens(n, seed=20 + b) for b, n in enumerate(lengths)]
    forced = [tokens(STEPS, seed=30 + b) for b in range(len(lengths))]
    for prompt, steps in zip(prompts, forced, strict=True):
        truth = Oracle(sample.model(family), sample.rule())
        truth.run(prompt, steps)
        assume(truth.closest > NEAR_TIE)

    model = sample.model(family)
    options = sample.options(tmp_path_factory.mktemp("mask"), family)
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options)
    alone = [drive(model, prompt, *one_by_one(steps)) for prompt, steps in zip(prompts, forced, strict=True)]

    ids, mask = padded(prompts, side, width=max(lengths) + margin)
    found, cache = call(model, ids, mask=mask)
    for b, prompt in enumerate(prompts):
        assert found.kept[b] == alone[b][0].kept[0], f"kept after the prompt, row {b}"
        same(found.logits[b, mask[b].bool()], alone[b][0].logits[0], f"prompt of row {b}, {len(prompt)} tokens")
    for step in range(STEPS):
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=torch.long)], dim=1)
        found, cache = call(model, torch.tensor([[steps[step]] for steps in forced]), cache, mask)
        for b in range(len(prompts)):
            assert found.kept[b] == alone[b][1 + step].kept[0], f"kept after step {step}, row {b}"
            same(found.logits[b], alone[b][1 + step].logits[0], f"step {step} of row {b}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming", "prulong"])
def test_p2_through_generate(name, backend, tmp_path):
    """generate() with left padding makes its own positions; the tokens are those of each prompt alone."""
    sample = LIBRARY[name](Sizes())
    model = random_model("llama64")
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **sample.options(tmp_path))
    prompts = [tokens(n, seed=40 + n) for n in (33, 9, 21)]
    ids, mask = padded(prompts, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for b, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert together[b, -8:].tolist() == alone[0, -8:].tolist(), f"row {b}"


def test_the_rows_of_a_batch_do_not_touch_each_other():
    """The first row's results are bit for bit those with any other second row of the same length."""
    model = random_model("llama64")
    kvcompile.optimize(model, "adakv", backend="reference", compile="off", budget=12, observe=4)
    first, others = tokens(30, seed=50), [tokens(30, seed=51), tokens(30, seed=52)]
    results = [call(model, torch.tensor([first, other]))[0] for other in others]
    assert results[0].kept[0] == results[1].kept[0]
    assert results[0].kept[1] != results[1].kept[1]
    same(results[0].logits[0], results[1].logits[0], "the first row")
