"""P1, P3 and P7: an evicted cache is what the policy means, whatever the sizes, the cuts and the turns.

Truth is tests/oracle.py, which masks and never drops anything.
"""

import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import kvcompile
from tests import oracle_policies as rules
from tests import oracle_states as stateful
from tests.driving import BACKENDS, LIBRARY, NEAR_TIE, Sample, Sizes, drive, examples, one_by_one, same, sizes
from tests.models import FAMILIES, random_model, tokens
from tests.oracle import Oracle

# head_dim 64 and 128, Llama and Qwen3, each pair of family and policy seen at least once
FAMILY = st.sampled_from(FAMILIES)


def check(sample: Sample, family: str, backend: str, turns: list[list[int]]) -> Oracle:
    """Runs product and oracle over the same turns; logits and kept positions must agree after each."""
    truth = Oracle(sample.model(family), sample.rule())
    expected = []
    for turn in turns:
        logits = truth.feed(turn)
        expected.append((logits, truth.kept()))
    assume(truth.closest > NEAR_TIE)
    with tempfile.TemporaryDirectory() as folder:
        model = sample.model(family)
        options = sample.options(Path(folder), family)
        kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options)
        seen = drive(model, *turns)
    for i, (found, (logits, positions)) in enumerate(zip(seen, expected, strict=True)):
        assert found.kept[0] == positions, f"kept positions after call {i} of {len(turns)}"
        same(found.logits[0], logits, f"call {i} of {len(turns)}")
    return truth


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
@examples(5)
@given(data=st.data())
def test_p1_equals_the_oracle(name, backend, data):
    family = data.draw(FAMILY, "family")
    size = data.draw(sizes(random_model(family).config.num_hidden_layers), "sizes")
    prompt = tokens(data.draw(st.integers(1, 56), "prompt"), seed=data.draw(st.integers(0, 9), "seed"))
    forced = tokens(data.draw(st.integers(0, 4), "steps"), seed=91)
    check(LIBRARY[name](size), family, backend, [prompt, *one_by_one(forced)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
@examples(2)
@given(data=st.data())
def test_p1_over_several_turns(name, backend, data):
    """A second prompt on the same cache is a prefill again: its length counts as prompt, its end fires the triggers."""
    size = data.draw(sizes(3), "sizes")
    first, second = data.draw(st.integers(2, 30), "first"), data.draw(st.integers(2, 20), "second")
    turns = [
        tokens(first, seed=1),
        *one_by_one(tokens(2, seed=2)),
        tokens(second, seed=3),
        *one_by_one(tokens(2, seed=4)),
    ]
    check(LIBRARY[name](size), "llama64", backend, turns)


CUT = """
heads retrieval = table("mask.tsv")
heads local = rest

policy cut(c=8):
{declared}
    retrieval: keep all
    at chunk(c)
    local: {keep}
    at prefill.end
"""
CUT_SNAPKV = CUT.format(
    declared="    score s = maxpool(mean[g] sum[q in last(4)] attn, 3)", keep="keep recent(4) | top(9) by s per head"
)
CUT_H2O = CUT.format(
    declared="    state acc = 0\n    on attend: acc += mean[g] sum[q] attn",
    keep="keep recent(20% of prompt) | top(25% of prompt) by acc per head",
)


CUT_KEYFORMER = CUT.format(
    declared="    state acc = 0\n    on attend: acc += sum[q] softmax[i]((logit + gumbel(3)) / (1 + 0.01 * step))",
    keep="keep recent(20% of prompt) | top(25% of prompt) by acc per head",
)
CUT_LAZY = CUT.format(
    declared="""    state seen = now, gap = 1
    on attend where max[g] attn > 0.05: gap = max(gap, now - seen), seen = now
    score s = sigmoid(-(now - seen) / gap) + sigmoid(-1 / gap)""",
    keep="keep recent(4) | top(9) by s per head",
)


class H2OAtPrefillEnd(rules.H2O):
    """The local class of CUT_H2O: judged when the prompt is done, never in decode."""

    def decide(self, oracle, layer, heads, piece):
        if piece.fires("prefill.end"):
            rules.H2O.decide(self, oracle, layer, heads, piece)


class KeyformerAtPrefillEnd(stateful.Keyformer):
    """The same of CUT_KEYFORMER."""

    def decide(self, oracle, layer, heads, piece):
        if piece.fires("prefill.end"):
            stateful.Keyformer.decide(self, oracle, layer, heads, piece)


class LazyAtPrefillEnd(stateful.Lazy):
    """The local class of CUT_LAZY: its states are sequential, each query's update follows from the one before."""

    def decide(self, oracle, layer, heads, piece):
        if piece.fires("prefill.end"):
            for head in heads:
                row = oracle.rows[layer][head]
                rules.keep_set(row, self.due(oracle, row, piece))


JUDGES = {
    "snapkv": (CUT_SNAPKV, rules.SnapKV(budget=13, observe=4, pool=3)),
    "h2o": (CUT_H2O, H2OAtPrefillEnd(heavy=Fraction(1, 4), local=Fraction(1, 5))),
    "keyformer": (CUT_KEYFORMER, KeyformerAtPrefillEnd(heavy=Fraction(1, 4), local=Fraction(1, 5), seed=3)),
    "lazy": (CUT_LAZY, LazyAtPrefillEnd(budget=13, window=4, alpha=0.05)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("judge", JUDGES)
@examples(4)
@given(data=st.data())
def test_p3_the_cut_does_not_matter_where_the_meaning_says_so(judge, backend, data):
    """Retrieval heads force pieces of c; local heads are judged once, by queries that may lie in several pieces."""
    text, local = JUDGES[judge]
    mask = data.draw(st.sampled_from([((1, 0), (0, 1), (0, 0)), ((0, 0), (1, 1), (0, 1))]), "mask")
    prompt = tokens(data.draw(st.integers(5, 40), "prompt"), seed=5)
    turns = [prompt, *one_by_one(tokens(2, seed=6))]

    def cut_by(c):
        rule = rules.Classes(mask=mask, one=rules.KeepAll(chunk=c), zero=local)
        return check(Sample(text, {"c": c}, lambda: rule, mask), "llama64", backend, turns)

    pieces, whole = cut_by(data.draw(st.integers(1, 12), "c")), cut_by(len(prompt) + 3)
    assert pieces.kept() == whole.kept()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LIBRARY)
def test_p7_protected_entries_and_unique_positions_through_a_long_decode(name, backend, tmp_path):
    """48 steps: far more than a page; every row holds its regions, each position once, and the newest entry."""
    size = Sizes(budget=14, sink=3, chunk=8, percent=25, mask=((1, 0), (0, 1), (0, 0)))
    sample = LIBRARY[name](size)
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **sample.options(tmp_path))
    prompt = tokens(40, seed=7)
    seen = drive(model, prompt, *one_by_one(tokens(48, seed=8)))
    for step, found in enumerate(seen[1:]):
        now = len(prompt) + step
        for layer, heads in enumerate(found.kept[0]):
            for head, positions in enumerate(heads):
                assert len(set(positions)) == len(positions)
                assert positions == tuple(sorted(positions))
                assert positions[-1] <= now
                assert set(protected(name, size, now, layer, head, len(prompt))) <= set(positions), (step, layer, head)


def protected(name, size, now, layer, head, prompt) -> set[int]:
    """Positions that the policy's regions name, written from the policy's text."""

    def newest(n: int) -> set[int]:
        return set(range(max(0, now + 1 - n), now + 1))

    sink = set(range(size.sink))
    match name:
        case "h2o" | "keyformer":
            return newest(prompt // 10)
        case "tova":
            return set()
        case "lagkv":
            full = (now + 1 - size.sink) // size.chunk
            return sink | set(range(size.sink + (full - 1) * size.chunk, now + 1))
        case "lazy" | "r_kv" | "freqkv":
            return newest({"lazy": 3, "r_kv": size.observe, "freqkv": 8}[name]) | (sink if name == "freqkv" else set())
        case "elastic" | "razor":
            return sink | newest(size.observe if name == "elastic" else max(size.observe + 2, now // 5))
        case "d2o":
            return newest(now + 1) if layer in (0, 1, 4) else sink
        case "streaming" | "streaming_compact" | "prulong" | "duo":
            everything = name in ("prulong", "duo") and size.mask[layer][head]
            return newest(now + 1) if everything else sink | newest(size.budget)
    return set(range(prompt, now + 1))  # decided in the prompt: what is generated stays


AGAIN = [(name, "cpu") for name in LIBRARY]
AGAIN += [(name, "reference") for name in ("streaming", "h2o", "snapkv", "adakv", "snapkv_chunked", "lagkv", "lazy")]


@pytest.mark.parametrize(("name", "backend"), AGAIN)
def test_p7_pools_do_not_leak(name, backend, tmp_path):
    """The same prompt again and again on one model: the pools stay as large as after the second time."""
    sample = LIBRARY[name](Sizes())
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **sample.options(tmp_path))
    turns = [tokens(50, seed=9), *one_by_one(tokens(3, seed=10))]
    sizes_seen, first = [], None
    for _ in range(6):
        seen = drive(model, *turns)
        first = first or seen
        assert seen[-1].kept == first[-1].kept
        same(seen[-1].logits, first[-1].logits, "the same prompt again")
        sizes_seen.append(kvcompile.report(model).to_dict()["bytes_allocated"])
    assert len(set(sizes_seen[1:])) == 1, sizes_seen
