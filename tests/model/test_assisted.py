"""Assisted decoding: token for token what the same policy decodes alone, or refused by name."""

import pytest
import torch

import kvcompile
from tests.driving import LIBRARY, Sizes, call, kept, some_slow
from tests.models import random_model, tokens

ALLOWED = ["keep_all", "snapkv", "pyramidkv", "adakv", "snapkv_chunked"]
PLAIN = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
PROMPTS = [tokens(37, seed=1), (tokens(9, seed=2) * 5)[:40]]  # the second repeats itself, so lookups are accepted


def model_of(name, layout="extents", compile="off"):
    sample = LIBRARY[name](Sizes())
    model = sample.model()
    backend = "cpu" if layout == "extents" else "reference"
    kvcompile.optimize(model, sample.policy, backend=backend, compile=compile, **sample.params)
    model.forward.engine.paged = layout == "pages"
    return model


def assistants():
    return {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "smaller": {"assistant_model": random_model("llama64", num_hidden_layers=1)},
        "equal": {"assistant_model": random_model("llama64")},  # under keep_all every candidate is accepted
    }


@pytest.mark.parametrize(
    ("name", "how"),
    some_slow(
        ALLOWED,
        ["lookup", "smaller", "equal"],
        [("keep_all", "equal"), ("snapkv", "lookup"), ("adakv", "smaller"), ("snapkv_chunked", "lookup")],
    ),
)
def test_assisted_is_plain_decoding_token_for_token(name, how):
    model = model_of(name)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        plain, made = model.generate(ids, **PLAIN), model.generate(ids, **assistants()[how], **PLAIN)
        assert torch.equal(made.sequences, plain.sequences)
        assert kept(made.past_key_values, 3) == kept(plain.past_key_values, 3)
        assert made.past_key_values.run.tokens == plain.past_key_values.run.tokens


@pytest.mark.parametrize(("layout", "compile"), some_slow(["pages", "extents"], ["off", "eager"], [("pages", "off")]))
def test_on_pages_and_in_graphs(layout, compile):
    model = model_of("snapkv", layout, compile)
    ids = torch.tensor([PROMPTS[1]])
    plain, made = model.generate(ids, **PLAIN), model.generate(ids, prompt_lookup_num_tokens=3, **PLAIN)
    assert torch.equal(made.sequences, plain.sequences)
    assert kvcompile.report(model).to_dict()["graph_breaks"] == 0


def test_candidates_are_steps_and_no_prompt():
    """snapkv would decide at the end of a prompt: one of several forwards is, the prompt's own."""
    model = model_of("snapkv")
    ends, original = [], model.forward._run

    def watched(tokens, positions, pieces, phase, *rest):
        ends.append((phase, pieces[0].new))
        return original(tokens, positions, pieces, phase, *rest)

    model.forward._run = watched
    model.generate(torch.tensor([PROMPTS[1]]), prompt_lookup_num_tokens=3, **PLAIN)
    assert [n for phase, n in ends if phase == "prefill.end"] == [40]
    assert any(phase == "chunk" and n > 1 for phase, n in ends)


def test_scores_and_logits_of_assisted_decoding_are_those_of_plain():
    model = model_of("snapkv")
    ids, wanted = torch.tensor([PROMPTS[1]]), {"output_logits": True, "output_scores": True}
    plain = model.generate(ids, **wanted, **PLAIN)
    made = model.generate(ids, prompt_lookup_num_tokens=3, **wanted, **PLAIN)
    for key in ("logits", "scores"):
        for mine, truth in zip(made[key], plain[key], strict=True):
            torch.testing.assert_close(mine, truth, atol=1e-4, rtol=1e-5)


def test_the_next_turn_decides_by_the_queries_of_accepted_tokens():
    """Rejected candidates have been queries, too: the ring of newest ones is what it is without them."""
    model = model_of("snapkv")
    ids, turn = torch.tensor([PROMPTS[1]]), torch.tensor([tokens(1, seed=5) + tokens(1, seed=6)])
    found = []
    for how in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = model.generate(ids, **how, **PLAIN).past_key_values
        found.append(call(model, turn, cache)[0])
    assert found[0].kept == found[1].kept


@pytest.mark.parametrize("name", ["keep_all", "snapkv"])
def test_an_optimised_model_assists_another(name):
    large, ids = random_model("llama64"), torch.tensor([PROMPTS[0]])
    assert torch.equal(
        large.generate(ids, assistant_model=model_of(name), **PLAIN).sequences, large.generate(ids, **PLAIN).sequences
    )


def test_a_model_assists_itself():
    model, ids = model_of("snapkv"), torch.tensor([PROMPTS[0]])
    plain = model.generate(ids, **PLAIN).sequences
    assert torch.equal(model.generate(ids, assistant_model=model, **PLAIN).sequences, plain)


@pytest.mark.parametrize(
    ("name", "why"), [("streaming", "evicts while it decodes"), ("h2o", "evicts"), ("tova", "evicts")]
)
@pytest.mark.parametrize("role", ["lookup", "main", "assistant"])
def test_policies_that_decide_in_steps_are_refused_in_every_role(name, why, role):
    model, other, ids = model_of(name), random_model("llama64"), torch.tensor([PROMPTS[0]])
    with pytest.raises(kvcompile.KvCompileError, match=why):
        if role == "lookup":
            model.generate(ids, prompt_lookup_num_tokens=3, **PLAIN)
        elif role == "main":
            model.generate(ids, assistant_model=other, **PLAIN)
        else:
            other.generate(ids, assistant_model=model, **PLAIN)


def test_states_that_reads_change_are_refused_even_without_evictions_in_steps():
    text = """
policy prompt_only():
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep recent(4) | top(8) by acc per head
    at prefill.end
"""
    model = kvcompile.optimize(random_model("llama64"), text, compile="off")
    with pytest.raises(kvcompile.KvCompileError, match="states that every read changes"):
        model.generate(torch.tensor([PROMPTS[0]]), prompt_lookup_num_tokens=3, **PLAIN)


def test_a_filled_cache_is_refused():
    model, ids = model_of("keep_all"), torch.tensor([PROMPTS[0]])
    first = model.generate(ids, **PLAIN)
    with pytest.raises(kvcompile.KvCompileError, match="filled cache"):
        model.generate(
            first.sequences, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3, max_new_tokens=2
        )
