"""Answering: alone and in a padded batch the same, later turns on one cache, text scored as it is read, costs."""

from dataclasses import replace

import pytest
import torch

import kvcompile
from kvcompile.evaluation.answering import answer
from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.kernels.errors import KvCompileError
from tests.evaluation.shipped import Ragged, shipped

POLICIES = {
    "keep_all": {},
    "streaming": {"n_sink": 4, "window": 30},
    "h2o": {"heavy": 20, "local": 20},
    "snapkv_chunked": {"c": 32, "observe": 8},
}


def outcome(policy, options, samples, batch):
    model, tokenizer = shipped()
    if policy is None:
        return answer(model, tokenizer, Ragged(), samples, batch=batch)
    with kvcompile.use(model, policy, **options):
        return answer(model, tokenizer, Ragged(), samples, batch=batch)


@pytest.fixture(scope="module")
def samples():
    return Ragged().samples(5, 130, 0, shipped()[1])


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_a_batch_gives_what_each_sample_gives_alone(policy, samples):
    alone, together = (outcome(policy, POLICIES.get(policy, {}), samples, batch) for batch in (1, 4))
    assert together.produced == alone.produced
    assert together.scores == alone.scores
    for key in ("footprint", "peak", "kept", "bytes_full"):
        assert getattr(together, key) == pytest.approx(getattr(alone, key), rel=1e-12), key
    for mine, other in zip(together.nll, alone.nll, strict=True):
        assert [x is None for x in mine] == [x is None for x in other]
        assert [x for x in mine if x is not None] == pytest.approx([x for x in other if x is not None], abs=1e-4)


def test_keep_all_is_the_untouched_model(samples):
    untouched, kept = outcome(None, {}, samples, 4), outcome("keep_all", {}, samples, 4)
    assert kept.produced == untouched.produced and kept.scores == untouched.scores
    assert (kept.footprint, kept.peak, kept.kept) == (1.0, 1.0, 1.0)
    assert (untouched.footprint, untouched.peak, untouched.kept) == (1.0, 1.0, 1.0)
    assert untouched.bytes_full == untouched.bytes_resident == kept.bytes_full
    assert kept.score >= 0.9


def test_what_a_policy_dropped_is_missed_and_counted(samples):
    found = outcome("streaming", {"n_sink": 4, "window": 12}, samples, 4)
    questions = [s for turns, sample in zip(found.scores, samples, strict=True)
                 for s, turn in zip(turns, sample.turns, strict=True) if turn.kind == "answer"]  # fmt: skip
    assert sum(questions) / len(questions) < 0.5
    assert found.footprint < 1 and found.kept < 0.2
    assert found.bytes_resident < found.bytes_full / 3
    chunked = outcome("snapkv_chunked", POLICIES["snapkv_chunked"], samples, 4)
    assert chunked.footprint < found.footprint and chunked.peak < found.peak


def test_turns_are_what_generate_makes_of_the_same_ids():
    """Two questions by hand: generate() on the whole ids so far, with the cache of the turn before."""
    model, tokenizer = shipped()
    sample = Ragged().samples(2, 130, 3, tokenizer)[1]
    sample = replace(sample, turns=tuple(replace(turn, tokens=3) for turn in sample.turns[:2]))
    request = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with kvcompile.use(model, "h2o", heavy=20, local=20):
        ids = tokenizer(sample.prompt)["input_ids"]
        # answer() feeds the prompt alone, then the question: so does this.
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
        wanted = []
        for turn in sample.turns:
            ids += tokenizer(turn.ask, add_special_tokens=False)["input_ids"]
            out = model.generate(torch.tensor([ids]), past_key_values=cache, **request)
            wanted.append(tokenizer.decode(out.sequences[0, len(ids) :]))
            ids, cache = out.sequences[0].tolist(), out.past_key_values
        report = kvcompile.report(model).to_dict()
        found = answer(model, tokenizer, Ragged(), [sample], batch=1)
    assert list(found.produced[0]) == wanted
    assert found.footprint == pytest.approx(report["footprint"], rel=1e-12)
    assert found.peak == pytest.approx(report["peak"], rel=1e-12)


def test_text_is_scored_as_one_dense_forward_would():
    model, tokenizer = shipped()
    text = "barks . the cat sleeps ."
    sample = Sample(
        "red suits alice . the dog", (Turn("", text, kind="text"), Turn("colour of alice", "red", tokens=1))
    )
    found = outcome(None, {}, [sample], 1)
    start, ids = (tokenizer(t, add_special_tokens=s)["input_ids"] for t, s in ((sample.prompt, True), (text, False)))
    with torch.no_grad():
        rows = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
    assert found.nll[0][0] == pytest.approx(float(torch.nn.functional.cross_entropy(rows, torch.tensor(ids))), abs=1e-5)
    assert found.scores[0][0] == (rows.argmax(-1) == torch.tensor(ids)).double().mean()
    assert found.produced[0][0] == tokenizer.decode(rows.argmax(-1))
    assert found.nll[0][1] is None


def test_an_answer_ends_at_the_token_that_ends_texts():
    model, tokenizer = shipped()
    sample = Sample("red suits alice . the old cat", (Turn("", "", tokens=9),))
    free = outcome(None, {}, [sample], 1).produced[0][0].split()
    assert len(free) == 9
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(free[2])
    try:
        ended = outcome(None, {}, [sample], 1).produced[0][0].split()
    finally:
        model.generation_config.eos_token_id = before
    first = free.index(free[2])
    assert ended == free[: first + 1]


def test_a_prompt_may_be_fed_in_pieces(samples):
    """Each a prefill of its own: what judges at its end judges after every piece; full attention does not notice."""
    model, tokenizer = shipped()

    def fed(policy, size, batch=2, **options):
        with kvcompile.use(model, policy, **options):
            return answer(model, tokenizer, Ragged(), samples, batch=batch, fed=size)

    whole, cut = fed("keep_all", None), fed("keep_all", 32)
    assert cut.produced == whole.produced and cut.footprint == 1.0
    cheap, dear = (fed("snapkv", size, budget=24, observe=8) for size in (32, None))
    assert cheap.footprint < 0.7 * dear.footprint and cheap.peak < 0.7 * dear.peak
    alone = fed("snapkv", 32, batch=1, budget=24, observe=8)
    assert (alone.produced, alone.scores) == (cheap.produced, cheap.scores)
    assert alone.footprint == pytest.approx(cheap.footprint, rel=1e-12)


def test_refusals_say_the_way_out(samples):
    model, tokenizer = shipped()
    long = Sample("the cat sleeps . " * 300, (Turn("", "x"),))
    with pytest.raises(KvCompileError, match="1024 positions: ask for shorter prompts"):
        answer(model, tokenizer, Ragged(), [long], batch=1)
    with pytest.raises(KvCompileError, match="no sample"):
        answer(model, tokenizer, Ragged(), [], batch=1)
    with pytest.raises(KvCompileError, match="has no turn"):
        answer(model, tokenizer, Ragged(), [Sample("the cat", ())], batch=1)
    with pytest.raises(KvCompileError, match="text without text"):
        answer(model, tokenizer, Ragged(), [Sample("the cat", (Turn("", "", kind="text"),))], batch=1)
    with pytest.raises(KvCompileError, match="a batch of 0"):
        answer(model, tokenizer, Ragged(), samples, batch=0)
