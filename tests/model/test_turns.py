"""Turns: a cache goes on over several calls, each prompt one of its own; positions, sets and tokens stay right."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvcompile
from tests.driving import BACKENDS, LIBRARY, NEAR_TIE, Sizes, call, drive, examples, kept, one_by_one, padded, same
from tests.models import random_model, tokens
from tests.oracle import Oracle, Piece
from tests.oracle_policies import KeepAll, keep_only

NAMES = ["keep_all", "snapkv", "h2o", "streaming", "adakv", "prulong"]
GREEDY = {"do_sample": False, "return_dict_in_generate": True}


def ready(policy, backend="cpu", **options):
    return kvcompile.optimize(random_model("llama64"), policy, backend=backend, compile="off", **options)


def conversation(*lengths):
    """Turns of so many tokens each, three forced tokens of an answer after each."""
    turns = []
    for i, n in enumerate(lengths):
        turns += [tokens(n, seed=10 + i), *one_by_one(tokens(3, seed=20 + i))]
    return turns


def follows(truth, model, turns):
    """The model gives the oracle's logits and kept positions after each call."""
    expected = []
    for turn in turns:
        logits = truth.feed(turn)
        expected.append((logits, truth.kept()))
    assert truth.closest > NEAR_TIE
    for i, (found, (logits, positions)) in enumerate(zip(drive(model, *turns), expected, strict=True)):
        assert found.kept[0] == positions, f"kept after call {i}"
        same(found.logits[0], logits, f"call {i}, {len(turns[i])} tokens")


# -- each turn's prompt is a prompt of its own ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_three_turns_and_their_answers_follow_the_oracle(name, backend, tmp_path):
    """The third turn is shorter than any window; a turn of one token is a step and decides as one."""
    sample = LIBRARY[name](Sizes())
    model = ready(sample.policy, backend, **sample.options(tmp_path))
    turns = [*conversation(26, 9, 2), tokens(1, seed=40), tokens(12, seed=41)]
    follows(Oracle(random_model("llama64"), sample.rule()), model, turns)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
@examples(10)
@given(data=st.data())
def test_drawn_conversations_follow_the_oracle(name, data, tmp_path_factory):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=4), "lengths")
    sample = LIBRARY[name](Sizes())
    turns = conversation(*lengths)
    truth = Oracle(sample.model(), sample.rule())
    for turn in turns:
        truth.feed(turn)
    assume(truth.closest > NEAR_TIE)
    options = sample.options(tmp_path_factory.mktemp("table"))
    model = kvcompile.optimize(sample.model(), sample.policy, backend="cpu", compile="off", **options)
    follows(Oracle(sample.model(), sample.rule()), model, turns)


# -- a second turn and the same tokens in one -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_turns_of_keep_all_equal_one_turn(backend):
    turns = conversation(17, 6, 1)
    model = ready("keep_all", backend)
    whole = drive(model, [t for turn in turns for t in turn])[0]
    parts = drive(model, *turns)
    same(torch.cat([part.logits for part in parts], 1), whole.logits, "all tokens")
    assert parts[-1].kept == whole.kept


REGIONS = {
    "sink and window": "sink(3) | recent(7)",
    "strides": "sink(1) | recent(4) | stride(8)",
    "at random": "recent(5) | random(6, 1)",
}


@pytest.mark.parametrize("regions", REGIONS)
@examples(4)
@given(data=st.data())
def test_a_set_of_regions_is_the_same_after_several_turns_as_after_one(regions, data):
    """Which entries stay follows from positions and `now`: once they have gone they would not come back."""
    model = ready(f"policy p():\n    keep {REGIONS[regions]}\n    at chunk, step\n", "reference")
    turns = conversation(*data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=3), "lengths"))
    assert drive(model, *turns)[-1].kept == drive(model, [t for turn in turns for t in turn])[0].kept


@pytest.mark.parametrize("regions", REGIONS)
@examples(2)
@given(cuts=st.lists(st.integers(1, 3), min_size=2, max_size=4), rest=st.integers(1, 8))
def test_turns_that_end_where_pieces_do_equal_one_turn(regions, cuts, rest):
    """With chunk(8), a prompt of whole pieces and the next one are read in the same pieces as both together."""
    model = ready(f"policy p():\n    keep {REGIONS[regions]}\n    at chunk(8), step\n")
    turns = [tokens(8 * n, seed=i) for i, n in enumerate(cuts)] + [tokens(max(2, rest), seed=9)]
    whole = drive(model, [t for turn in turns for t in turn])[0]
    parts = drive(model, *turns)
    same(torch.cat([part.logits for part in parts], 1), whole.logits, "all tokens")
    assert parts[-1].kept == whole.kept


# -- generate() -------------------------------------------------------------------------------------------------------


def chat(model, turns, new=4):
    """A conversation through generate(): each turn a batch of token lists; its answers, and at last the cache."""
    text, mask, cache, answers = None, None, None, []
    for turn in turns:
        ids, more = padded(turn, "left")
        text = ids if text is None else torch.cat([text, ids], 1)
        mask = more if mask is None else torch.cat([mask, more], 1)
        made = model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **GREEDY)
        answers.append(made.sequences[:, text.shape[1] :].tolist())
        text, cache = made.sequences, made.past_key_values
        mask = torch.cat([mask, torch.ones(len(mask), new, dtype=torch.long)], 1)
    return answers, cache


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_turns_of_different_lengths_equal_each_conversation_alone(name, backend, tmp_path):
    sample = LIBRARY[name](Sizes())
    model = ready(sample.policy, backend, **sample.options(tmp_path))
    lengths = [(21, 9, 14), (8, 13, 1), (2, 3, 6)]
    turns = [[tokens(n, seed=30 + 3 * t + b) for b, n in enumerate(turn)] for t, turn in enumerate(lengths)]
    answers, cache = chat(model, turns)
    for b in range(3):
        alone, one = chat(model, [[turn[b]] for turn in turns])
        assert [answer[b] for answer in answers] == [answer[0] for answer in alone], f"answers of row {b}"
        assert kept(cache, 3, b) == kept(one, 3), f"kept of row {b}"


def test_generate_gives_what_the_whole_conversation_gives_without_a_cache():
    model = ready("keep_all")
    turns = [[tokens(n, seed=n)] for n in (14, 1, 5)]
    answers, _ = chat(model, turns)
    text = []
    for turn, answer in zip(turns, answers, strict=True):
        text += turn[0]
        made = model.generate(torch.tensor([text]), max_new_tokens=4, do_sample=False)
        assert made[0, len(text) :].tolist() == answer[0]
        text += answer[0]


def test_padding_behind_an_answer_that_ended_early_counts_as_tokens():
    model = ready("keep_all")
    ids = torch.tensor([tokens(8), tokens(8, seed=3)])
    end = int(model.generate(ids, max_new_tokens=3, **GREEDY).sequences[0, -1])
    made = model.generate(ids, max_new_tokens=6, eos_token_id=end, pad_token_id=0, **GREEDY)
    assert made.sequences[0, -1] == 0 != made.sequences[1, -1]
    text = torch.cat([made.sequences, torch.tensor([tokens(5, seed=b) for b in (5, 6)])], 1)
    told = dict(past_key_values=made.past_key_values, max_new_tokens=3, **GREEDY)
    with pytest.raises(kvcompile.KvCompileError, match="padding behind a finished answer included"):
        model.generate(text, attention_mask=(text != 0).long(), **told)
    again = model.generate(text, attention_mask=torch.ones_like(text), **told)
    alone = model.generate(text[1:], attention_mask=torch.ones_like(text[1:]), max_new_tokens=3, **GREEDY)
    assert torch.equal(again.sequences[1:], alone.sequences)


def test_an_answer_may_go_on_without_a_word_of_the_user():
    """The text as generate() returned it: its last token is what the cache has not seen, so it is a step."""
    model = ready("h2o", heavy="30% of prompt")
    prompt = torch.tensor([tokens(18, seed=3)])
    whole = model.generate(prompt, max_new_tokens=9, **GREEDY)
    first = model.generate(prompt, max_new_tokens=4, **GREEDY)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **GREEDY)
    assert torch.equal(rest.sequences, whole.sequences)
    assert kept(rest.past_key_values, 3) == kept(whole.past_key_values, 3)


def test_a_text_that_the_cache_has_seen_to_its_end_is_refused_and_the_cache_goes_on():
    model = ready("streaming", n_sink=1, window=6)
    made = model.generate(torch.tensor([tokens(18, seed=3)]), max_new_tokens=4, **GREEDY)
    before, cache = kept(made.past_key_values, 3), made.past_key_values
    for text in (made.sequences[:, :-1], made.sequences[:, :5], torch.tensor([tokens(3, seed=4)])):
        with pytest.raises(kvcompile.KvCompileError, match="at least one new token"):
            model.generate(text, past_key_values=cache, max_new_tokens=4)
    assert (cache.get_seq_length(), kept(cache, 3)) == (21, before)
    again = model.generate(made.sequences, past_key_values=cache, max_new_tokens=3, **GREEDY)
    truth = model.generate(torch.tensor([tokens(18, seed=3)]), max_new_tokens=7, **GREEDY)
    assert torch.equal(again.sequences, truth.sequences)


def test_a_sequence_without_a_new_token_stays_as_it_is_while_others_go_on():
    model = ready("h2o", heavy="30% of prompt")
    prompts = [tokens(20, seed=1), tokens(13, seed=2)]
    ids, mask = padded(prompts, "left")
    _, cache = call(model, ids, mask=mask)
    ids, more = padded([tokens(6, seed=3), []], "left")
    found, cache = call(model, ids, cache, torch.cat([mask, more], 1))
    alone = drive(model, prompts[0], tokens(6, seed=3))
    assert found.kept == (alone[1].kept[0], drive(model, prompts[1])[0].kept[0])
    same(found.logits[0], alone[1].logits[0], "the sequence that goes on")
    found, cache = call(model, torch.tensor([[7], [8]]), cache)
    same(found.logits[1], drive(model, prompts[1], [8])[1].logits[0], "the one that had nothing to say")


# -- `prompt` in later turns ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class KeepPrompt(KeepAll):
    """`keep prompt | recent(w) at step`: `prompt` ends where the latest prompt ended, earlier answers within it."""

    window: int = 4

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if piece.fires("step"):
            for head in heads:
                keep_only(oracle.rows[layer][head], lambda p: p < piece.prompt or p > piece.now - self.window)


KEEP_PROMPT = "policy p(window=4):\n    keep prompt | recent(window)\n    at step\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompt_is_all_up_to_the_end_of_the_latest_prompt(backend):
    turns = [tokens(10, seed=1), *one_by_one(tokens(8, seed=2)), tokens(5, seed=3), *one_by_one(tokens(7, seed=4))]
    model = ready(KEEP_PROMPT, backend)
    follows(Oracle(random_model("llama64"), KeepPrompt(window=4)), model, turns)
    # 18 and 29 tokens; of the first answer, what was in memory when the second prompt came stays from then on.
    first, second = drive(model, *turns[:9])[-1], drive(model, *turns)[-1]
    assert first.kept[0][0][0] == (*range(10), 14, 15, 16, 17)
    assert second.kept[0][0][0] == (*range(10), *range(14, 23), 26, 27, 28, 29)


def test_a_system_prompt_is_kept_by_its_length_over_all_turns():
    """`sink(n)` names its tokens in every turn; what users and answers said goes with the window."""
    model = ready("policy p(system=6, window=5):\n    keep sink(system) | recent(window)\n    at prefill.end, step\n")
    for found in drive(model, tokens(6, seed=1), *conversation(9, 4, 12)):
        rows = [row for layer in found.kept[0] for row in layer]
        assert all(row[:6] == tuple(range(6)) and len(row) <= 11 for row in rows)


# -- one prefix, many continuations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("name", ["keep_all", "snapkv", "h2o", "streaming"])
def test_a_prefix_computed_once_serves_chats_that_go_on_apart(name, paged, tmp_path):
    sample = LIBRARY[name](Sizes())
    model = ready(sample.policy, "reference", **sample.options(tmp_path))
    model.forward.engine.paged = paged
    prefix, questions = tokens(25, seed=1), [tokens(n, seed=50 + n) for n in (7, 1, 4)]
    _, cache = call(model, torch.tensor([prefix]))
    cache.select([0] * 3)
    ids, mask = padded(questions, "left")
    text = torch.cat([torch.tensor([prefix] * 3), ids], 1)
    mask = torch.cat([torch.ones(3, 25, dtype=torch.long), mask], 1)
    made = model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **GREEDY)
    for b, question in enumerate(questions):
        _, one = call(model, torch.tensor([prefix]))
        alone = model.generate(torch.tensor([prefix + question]), past_key_values=one, max_new_tokens=4, **GREEDY)
        assert made.sequences[b, -4:].tolist() == alone.sequences[0, -4:].tolist(), f"row {b}"
        assert kept(made.past_key_values, 3, b) == kept(alone.past_key_values, 3), f"row {b}"
