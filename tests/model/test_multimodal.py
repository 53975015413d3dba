"""Multimodal wrappers: their language model is rewritten and follows its policy as it would alone, on text and on
embeddings that images are merged into; what a causal cache cannot hold is refused by name.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import DynamicCache

import kvcompile
from kvcompile.passes.facts import model_facts
from tests.driving import LIBRARY, Sizes, padded, same
from tests.wrappers import (
    CAUSAL,
    IMAGE,
    INNER,
    REFUSED,
    WRAPPERS,
    random_wrapper,
    with_image,
    words,
    wrapper_config,
    wrapper_model,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}
SIZES = Sizes(budget=8, observe=2, pool=3, chunk=5, sink=1, mask=((1, 0), (0, 1)))  # pieces of 5 part an image of 4
POLICIES = ("snapkv", "h2o", "prulong")


def optimized(model: PreTrainedModel, policy: str, folder) -> PreTrainedModel:
    sample = LIBRARY[policy](SIZES)
    return kvcompile.optimize(model, policy, backend="reference", compile="off", **sample.options(folder))


def alone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The wrapper's language model, its weights copied into a causal model of its own."""
    plain = AutoModelForCausalLM.from_config(model.config.get_text_config()).eval()
    plain.model.load_state_dict(model.get_decoder().state_dict())
    plain.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    return plain


def merged(model: PreTrainedModel, ids: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Embeddings of ids [1, n], those of image tokens replaced by what the wrapper makes of its images."""
    with torch.no_grad():
        found = model.model.get_image_features(**given, return_dict=True).pooler_output
        features = torch.cat([part.flatten(0, -2) for part in found])
        embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == IMAGE] = features
    return embeddings


def run(model: PreTrainedModel, cache=None, mask: Tensor | None = None, **inputs: Tensor):
    with torch.no_grad():
        out = model(attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
    return out.logits, out.past_key_values


def positions(model: PreTrainedModel, cache, row: int = 0) -> list[list[list[int]]]:
    layers = range(model.config.get_text_config().num_hidden_layers)
    return [[head.tolist() for head in cache.positions(layer, row=row)] for layer in layers]


@pytest.mark.parametrize("name", WRAPPERS)
def test_text_gives_the_untouched_models_tokens_and_the_tower_keeps_its_attention(name):
    model, (ids, mask) = wrapper_model(name), padded([words(24), words(9, seed=1)], "left")
    asked = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    untouched, tower = model.generate(**asked), model.config.vision_config._attn_implementation
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    assert model.generate(**asked).tolist() == untouched.tolist()
    assert (model.config.vision_config._attn_implementation, tower) == (tower, "sdpa")


@pytest.mark.parametrize("name", WRAPPERS)
def test_facts_are_of_the_language_model_and_the_same_from_the_configuration(name):
    model = wrapper_model(name)
    facts, decoder = model_facts(model), model.get_decoder()
    assert facts == model_facts(wrapper_config(name))
    assert facts.layers == len(decoder.layers)
    head = model.get_output_embeddings().weight
    read = {p.data_ptr(): p.numel() * 4 for p in (*decoder.parameters(), head)}
    assert facts.weight_bytes == sum(read.values()) < sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_images_give_the_untouched_models_tokens_and_restore_leaves_it_as_it_was(name):
    model = wrapper_model(name)
    text, given = with_image(name)
    other = with_image(name, seed=1)[1]
    ids = torch.tensor([text])
    untouched = model.generate(ids, **given, **GREEDY)
    assert model.generate(ids, **other, **GREEDY).tolist() != untouched.tolist(), "the image does not matter"
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    assert model.generate(ids, **given, **GREEDY).tolist() == untouched.tolist()
    kvcompile.restore(model)
    assert model.generate(ids, **given, **GREEDY).tolist() == untouched.tolist()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CAUSAL)
def test_an_image_prompt_is_kept_as_by_the_language_model_alone_on_the_merged_embeddings(name, policy, tmp_path):
    model = wrapper_model(name)
    text, given = with_image(name)
    ids, embeddings = torch.tensor([text]), merged(model, torch.tensor([text]), given)
    plain = optimized(alone_of(model), policy, tmp_path)
    optimized(model, policy, tmp_path)
    (logits, cache), (expected, truth) = run(model, input_ids=ids, **given), run(plain, inputs_embeds=embeddings)
    same(logits, expected, "the prompt")
    for step, token in enumerate(words(3, seed=5)):
        assert positions(model, cache) == positions(plain, truth), f"kept before step {step}"
        logits, cache = run(model, cache, input_ids=torch.tensor([[token]]))
        expected, truth = run(plain, truth, input_ids=torch.tensor([[token]]))
        same(logits, expected, f"step {step}")
    assert any(len(head) < len(text) for layer in positions(model, cache) for head in layer), "nothing was evicted"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", ["adakv", "prulong"])
@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_p2_a_padded_batch_of_image_prompts_equals_each_alone(name, policy, side, tmp_path):
    model = optimized(wrapper_model(name), policy, tmp_path)
    prompts = [with_image(name, 3, 16, seed=0), with_image(name, 6, 4, seed=1)]
    ids, mask = padded([text for text, _ in prompts], side)
    images = {key: torch.cat([given[key] for _, given in prompts]) for key in prompts[0][1]}
    logits, cache = run(model, mask=mask, input_ids=ids, **images)
    for b, (text, given) in enumerate(prompts):
        alone, own = run(model, input_ids=torch.tensor([text]), **given)
        same(logits[b, mask[b].bool()], alone[0], f"row {b}")
        assert positions(model, cache, b) == positions(model, own), f"kept by row {b}"


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_second_turn_brings_another_image(name):
    model = wrapper_model(name)
    turns = [with_image(name, 2, 6, seed=0), (words(5, seed=3), {}), with_image(name, 4, 7, seed=1)]
    results = []
    for _ in range(2):
        cache = DynamicCache(config=model.config) if not results else None
        results.append([])
        for text, given in turns:
            logits, cache = run(model, cache, input_ids=torch.tensor([text]), **given)
            results[-1].append(logits)
        kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    for turn, (mine, truth) in enumerate(zip(results[1], results[0], strict=True)):
        same(mine, truth, f"turn {turn}")


def test_a_conversation_about_images_goes_on_from_its_cache_in_generate():
    model, found = wrapper_model("llava"), []
    (first, image), (second, another) = with_image("llava", 2, 6, seed=0), with_image("llava", 4, 7, seed=1)
    for _ in range(2):
        one = model.generate(torch.tensor([first]), **image, return_dict_in_generate=True, **GREEDY)
        whole = torch.cat([one.sequences, torch.tensor([second])], 1)
        found.append(model.generate(whole, **another, past_key_values=one.past_key_values, **GREEDY).tolist())
        kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    assert found[0] == found[1]


def test_a_language_model_that_generates_by_itself_is_optimised_by_itself():
    model, ids = random_wrapper(INNER()), torch.tensor([[IMAGE] * 4 + words(9)])
    asked = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), **GREEDY}
    model.language_model.generation_config.eos_token_id = None
    with pytest.raises(kvcompile.KvCompileError, match=r"optimise that one, model\.language_model"):
        kvcompile.optimize(model, "keep_all")
    untouched = model.generate(**asked)
    kvcompile.optimize(model.language_model, "keep_all", backend="reference", compile="off")
    assert model.generate(**asked).tolist() == untouched.tolist()


def test_return_sequences_and_beams_of_an_image_prompt_are_the_untouched_models():
    model = wrapper_model("llava")
    text, given = with_image("llava")
    asked = {"input_ids": torch.tensor([text]), **given, **GREEDY, "num_beams": 3, "num_return_sequences": 2}
    untouched = model.generate(**asked)
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    assert model.generate(**asked).tolist() == untouched.tolist()


def test_labels_give_the_untouched_models_loss():
    model = wrapper_model("llava")
    text, given = with_image("llava")
    asked = {"input_ids": torch.tensor([text]), "labels": torch.tensor([text]), **given}
    with torch.no_grad():
        untouched = model(**asked).loss
        loss = kvcompile.optimize(model, "keep_all", backend="reference", compile="off")(**asked).loss
    torch.testing.assert_close(loss, untouched)


@pytest.mark.slow
def test_graphs_of_a_language_model_do_not_break_on_image_prompts():
    model = wrapper_model("llava")
    kvcompile.optimize(model, "snapkv", backend="cpu", compile="eager", budget=8, observe=2)
    seen = []
    for compiled in (True, False):
        text, given = with_image("llava")
        seen.append(model.generate(torch.tensor([text]), **given, **GREEDY).tolist())
        if compiled:
            report = kvcompile.report(model).to_dict()
            assert (report["graph_breaks"], report["recompiles"]) == (0, 0)
            kvcompile.optimize(model, "snapkv", backend="cpu", compile="off", budget=8, observe=2)
    assert seen[0] == seen[1]


# -- refused ----------------------------------------------------------------------------------------------------------


def test_images_that_are_read_in_both_directions_are_refused_and_leave_nothing_behind():
    model = wrapper_model("gemma3")
    text, given = with_image("gemma3")
    ids = torch.tensor([text])
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    with pytest.raises(kvcompile.KvCompileError, match="reads images in both directions"):
        model.generate(ids, **given, token_type_ids=(ids == IMAGE).long(), **GREEDY)
    ids = torch.tensor([words(20)])
    marked = model.generate(ids, token_type_ids=torch.zeros_like(ids), **GREEDY)
    kvcompile.restore(model)
    assert marked.tolist() == model.generate(ids, token_type_ids=torch.zeros_like(ids), **GREEDY).tolist()


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name.startswith("qwen")])
def test_images_at_positions_of_several_axes_are_refused(name):
    model = kvcompile.optimize(wrapper_model(name), "keep_all", backend="reference", compile="off")
    ids = torch.tensor([words(3) + [IMAGE] * 4 + words(9, seed=1)])
    asked = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    with pytest.raises(kvcompile.KvCompileError, match="positions of several axes"):
        model.generate(**asked, **GREEDY)


def test_what_reaches_the_language_model_beside_its_embeddings_is_refused():
    model = wrapper_model("llava")
    text, given = with_image("llava")
    decoder, inner = model.get_decoder(), model.model

    def deeper(**kwargs):
        return decoder(inputs_embeds=inner.get_input_embeddings()(kwargs["input_ids"]), layer_images=given)

    inner.forward = deeper
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off")
    with pytest.raises(kvcompile.KvCompileError, match="layer_images beside the embeddings"):
        model(input_ids=torch.tensor([text]), **given)
    assert not decoder._forward_pre_hooks


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrapper_that_cannot_be_supported_is_refused_with_its_reason(name):
    config, reason = REFUSED[name]
    model = AutoModelForImageTextToText.from_config(config())
    for ask in (model_facts, lambda it: kvcompile.optimize(it, "keep_all")):
        with pytest.raises(kvcompile.KvCompileError, match=reason):
            ask(model)
