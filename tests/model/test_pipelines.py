"""transformers' pipeline and its streamers with an evicting policy: batches of texts of any lengths give what each
text gives alone, and what is streamed, stopped or returned several times is what generate() gives.
"""

from __future__ import annotations

import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

import kvcompile
from tests.driving import BACKENDS, LIBRARY, Sizes
from tests.models import VOCABULARY, random_model, tokens

GREEDY = {"max_new_tokens": 8, "do_sample": False}
POLICIES = ("keep_all", "snapkv", "h2o", "prulong")
SIZES = Sizes(budget=8, observe=2, chunk=5, sink=1)
WORDS = ("<pad>", "<unk>", *(f"w{i}" for i in range(2, VOCABULARY - 1)), "abcdef")
LENGTHS = (21, 3, 34, 1, 12)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, "w2" to "w254"; the last one is what transformers looks for when it reads stop strings."""
    words = Tokenizer(WordLevel({WORDS[i]: i for i in range(VOCABULARY)}, unk_token=WORDS[1]))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=WORDS[0], unk_token=WORDS[1], padding_side="left")


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def optimized(policy: str, folder, backend: str = "reference"):
    sample = LIBRARY[policy](SIZES)
    return kvcompile.optimize(random_model(), policy, backend=backend, compile="off", **sample.options(folder))


def generated(model, text: str, skip: bool = False) -> str:
    ids = tokenizer()(text, return_tensors="pt").input_ids
    return tokenizer().decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=skip)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_of_texts_gives_what_each_text_gives_alone(policy, backend, tmp_path):
    model = optimized(policy, tmp_path, backend)
    texts = [text_of(tokens(n, seed=n)) for n in LENGTHS]
    alone = [generated(model, text, skip=True) for text in texts]
    for size in (1, 2, len(texts)):  # the last batch of two is not full
        answers = pipeline("text-generation", model=model, tokenizer=tokenizer())(
            texts, batch_size=size, return_full_text=False, **GREEDY
        )
        assert [answer["generated_text"].strip() for (answer,) in answers] == alone, f"in batches of {size}"


def test_several_answers_to_each_text_are_distinct_draws_and_the_same_for_the_same_seed(tmp_path):
    ask = pipeline("text-generation", model=optimized("snapkv", tmp_path), tokenizer=tokenizer())
    texts, found = [text_of(tokens(n, seed=n)) for n in LENGTHS[:3]], []
    for _ in range(2):
        torch.manual_seed(3)
        answers = ask(texts, batch_size=3, num_return_sequences=3, do_sample=True, temperature=3.0, max_new_tokens=8)
        found.append([[one["generated_text"] for one in each] for each in answers])
    assert found[0] == found[1]
    for text, each in zip(texts, found[0], strict=True):
        assert len(set(each)) == 3
        assert all(one.startswith(text) for one in each)


def test_a_text_streamer_prints_what_generate_gives(tmp_path, capsys):
    model, text = optimized("h2o", tmp_path), text_of(tokens(20))
    expected = generated(model, text)
    capsys.readouterr()
    ids = tokenizer()(text, return_tensors="pt").input_ids
    model.generate(ids, streamer=TextStreamer(tokenizer(), skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.split() == expected.split()


def test_an_iterating_streamer_reads_along_while_a_thread_generates_and_the_model_can_be_restored_behind_it(tmp_path):
    model, text = optimized("prulong", tmp_path), text_of(tokens(20))
    expected = generated(model, text)
    ids = tokenizer()(text, return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60.0)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    kvcompile.restore(model)
    thread.join(60.0)
    assert len(pieces) > 2
    assert "".join(pieces).split() == expected.split()


def test_two_streams_of_two_threads_on_one_model_are_each_what_it_is_alone(tmp_path):
    model = optimized("snapkv", tmp_path)
    texts = [text_of(tokens(n, seed=n)) for n in (19, 30)]
    alone, streamers, threads = [generated(model, text) for text in texts], [], []
    for text in texts:
        streamers.append(TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60.0))
        ids = tokenizer()(text, return_tensors="pt").input_ids
        threads.append(
            threading.Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamers[-1], **GREEDY})
        )
        threads[-1].start()
    found = ["".join(streamer).split() for streamer in streamers]
    for thread in threads:
        thread.join(60.0)
    assert found == [text.split() for text in alone]


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_a_row_that_meets_its_stop_string_ends_and_the_others_go_on(policy, tmp_path):
    model = optimized(policy, tmp_path)
    texts = [text_of(tokens(n, seed=n)) for n in (21, 9)]
    alone = [generated(model, text).split() for text in texts]
    stop = next(word for word in alone[0][1:] if not any(word in other for other in alone[1] + alone[0][:1]))
    batch = tokenizer()(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    # transformers fills a finished row with padding only where the model has a token that ends texts.
    out = model.generate(**batch, stop_strings=[stop], tokenizer=tokenizer(), eos_token_id=VOCABULARY - 1, **GREEDY)
    first, second = (tokenizer().decode(row[batch.input_ids.shape[1] :]).split() for row in out)
    end = alone[0].index(stop) + 1
    assert first == alone[0][:end] + ["<pad>"] * (len(first) - end)
    assert second == alone[1]
