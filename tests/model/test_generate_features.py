"""What generate() can be asked for: each line of the table in docs/generating.md is run here, or refused here."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import kvcompile
from tests.models import random_model, tokens

PAGE = Path(__file__).parents[2] / "docs" / "generating.md"
IDS = torch.tensor([tokens(17, seed=1), tokens(17, seed=2)])
GREEDY = {"max_new_tokens": 6, "do_sample": False}
SAMPLED = {"max_new_tokens": 6, "do_sample": True}


class Streamed(BaseStreamer):
    """Collects what is streamed; equal to another that got the same."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def streamed(model):
    streamer = Streamed()
    model.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert streamer.got[-1] == "end"
    return streamer.got


def from_embeddings(model):
    return model.generate(inputs_embeds=model.get_input_embeddings()(IDS).detach(), **GREEDY)


def several_calls(model):
    """A second request with the first one's cache and the whole text."""
    first = model.generate(IDS[:1], return_dict_in_generate=True, **GREEDY)
    return model.generate(torch.cat([first.sequences, IDS[1:]], 1), past_key_values=first.past_key_values, **GREEDY)


def with_logits(model):
    out = model.generate(IDS, return_dict_in_generate=True, output_logits=True, output_scores=True, **GREEDY)
    return torch.stack([*out.logits, *out.scores])


def hidden(model):
    out = model.generate(IDS, return_dict_in_generate=True, output_hidden_states=True, **GREEDY)
    return torch.stack([layer[:, -1] for step in out.hidden_states for layer in step])


def piped(model):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1")
    tokenizer.padding_side = "left"
    texts = ["w5 w9 w200 w31", "w77 w4"]
    found = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, batch_size=2, **GREEDY)
    return [answer["generated_text"] for (answer,) in found]


def kept_logits(model):
    with torch.no_grad():
        return [model(IDS, logits_to_keep=n).logits.shape for n in (0, 1, 3)]


def chunked(model):
    return model.generate(IDS, prefill_chunk_size=5, **GREEDY)


# What keep_all does as the untouched model does it: the same answer, whatever is random in it.
WORKS = {
    "greedy": lambda m: m.generate(IDS, **GREEDY),
    "sampling": lambda m: m.generate(IDS, temperature=2.0, top_k=50, top_p=0.9, **SAMPLED),
    "num_return_sequences": lambda m: m.generate(IDS, num_return_sequences=3, **SAMPLED),
    "num_beams": lambda m: m.generate(IDS, num_beams=3, **GREEDY),
    "num_beams with do_sample": lambda m: m.generate(IDS, num_beams=3, **SAMPLED),
    "prompt_lookup_num_tokens": lambda m: m.generate(IDS[:1], prompt_lookup_num_tokens=2, **GREEDY),
    "assistant_model": lambda m: m.generate(IDS[:1], assistant_model=random_model(num_hidden_layers=1), **GREEDY),
    "streamer": streamed,
    "stopping_criteria": lambda m: m.generate(
        IDS, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(20)]), **GREEDY
    ),
    "max_time": lambda m: m.generate(IDS, max_time=0.0, **GREEDY),
    "eos_token_id": lambda m: m.generate(IDS, eos_token_id=list(range(128)), pad_token_id=0, **GREEDY),
    "logits processors": lambda m: m.generate(IDS, repetition_penalty=1.7, no_repeat_ngram_size=2, **GREEDY),
    "guidance_scale": lambda m: m.generate(IDS, guidance_scale=1.5, **GREEDY),
    "output_logits, output_scores": with_logits,
    "output_hidden_states": hidden,
    "past_key_values": several_calls,
    "inputs_embeds": from_embeddings,
    "no prompt": lambda m: m.generate(**GREEDY),
    "one-token prompt": lambda m: m.generate(IDS[:, :1], **GREEDY),
    "logits_to_keep": kept_logits,
    "prefill_chunk_size": chunked,
    "pipeline": piped,
}
REFUSED = {  # what is asked for, and words that its message has
    "use_cache=False": ({"use_cache": False}, "use_cache=False"),
    "cache_implementation": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
    "num_beam_groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search"),
    "force_words_ids": ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained beam search"),
    "dola_layers": ({"dola_layers": "low"}, "DoLa"),
    "assistant_early_exit": ({"assistant_early_exit": 1}, "early exit"),
    "use_mtp": ({"use_mtp": True}, "use_mtp"),
}


@pytest.mark.parametrize("name", WORKS)
def test_it_gives_what_the_untouched_model_gives(name):
    model, found = random_model(), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(WORKS[name](model))
        kvcompile.optimize(model, "keep_all", compile="off")
    truth, made = found
    if torch.is_tensor(truth):
        torch.testing.assert_close(made, truth, atol=1e-4, rtol=1e-5)
    else:
        assert made == truth


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_before_anything_runs(name):
    model = kvcompile.optimize(random_model(), "keep_all", compile="off")
    request, words = REFUSED[name]
    with pytest.raises(kvcompile.KvCompileError, match=words):
        model.generate(IDS, **request, **GREEDY)
    assert model.forward.run is None


def test_what_is_refused_may_stand_in_a_configuration_too():
    model = kvcompile.optimize(random_model(), "keep_all", compile="off")
    config = GenerationConfig(penalty_alpha=0.6, top_k=4, max_new_tokens=3)
    with pytest.raises(kvcompile.KvCompileError, match="contrastive"):
        model.generate(IDS, config)


def test_pieces_of_transformers_are_those_of_a_policy_that_cuts_alike():
    """Each would be a prompt of its own; a policy that cuts into as many tokens cuts by itself instead."""
    model = kvcompile.optimize(random_model(), "snapkv_chunked", compile="off", ratio="50%", observe=4, c=5)
    truth = model.generate(IDS, **GREEDY)
    config = GenerationConfig(prefill_chunk_size=5, pad_token_id=0, **GREEDY)
    for made in (chunked(model), model.generate(IDS, generation_config=config), model.generate(IDS, config)):
        assert torch.equal(made, truth)
    for name, params in (("snapkv", {}), ("streaming", {}), ("snapkv_chunked", {"c": 8})):
        kvcompile.optimize(model, name, compile="off", **params)
        with pytest.raises(kvcompile.KvCompileError, match="prefill_chunk_size=5"):
            chunked(model)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming", "adakv", "lagkv"])
def test_prompts_shorter_than_any_window_are_the_untouched_models(name):
    model, ids = random_model(), torch.tensor([[7]])
    truth = model.generate(ids, max_new_tokens=3, do_sample=False)
    params = {"heavy": 8, "local": 8} if name == "h2o" else {}
    kvcompile.optimize(model, name, compile="off", **params)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), truth)


def test_the_page_lists_what_is_tested():
    lines = re.findall(r"^\| `?([^|`]+)`? +\| (works|refused)\b", PAGE.read_text(encoding="utf-8"), re.M)
    assert dict(lines) == dict.fromkeys(WORKS, "works") | dict.fromkeys(REFUSED, "refused")


@pytest.mark.parametrize("compile", ["off", "eager"])
def test_under_autocast_attention_is_exact_and_the_rest_as_the_untouched_model(compile):
    model, ids = random_model(), torch.tensor([tokens(20)])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        truth = model(ids).logits[:, -4:].float()
        found = []
        for backend in ("cpu", "reference"):
            kvcompile.optimize(model, "keep_all", backend=backend, compile=compile)
            out = model(ids[:, :17])
            parts = [out.logits[:, -1:]]
            for at in range(17, 20):
                out = model(ids[:, at : at + 1], past_key_values=out.past_key_values)
                parts.append(out.logits)
            found.append(torch.cat(parts, 1).float())
    largest = truth.abs().max()
    assert (found[0] - truth).abs().max() / largest < 3e-2  # bfloat16 has 8 bits
    assert (found[0] - found[1]).abs().max() / largest < 1e-2  # rounded alike, but for ties
