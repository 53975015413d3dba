"""The oracle against what is known without it: the untouched model, dense masks, golden values, closed forms."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from transformers import DynamicCache

from tests import oracle_policies as rules
from tests import oracle_states as stateful
from tests.models import FAMILIES, random_model, tokens
from tests.oracle import Oracle


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 7])
def test_keep_all_is_the_untouched_model(family, chunk):
    model = random_model(family)
    prompt, forced = tokens(23, seed=1), tokens(4, seed=2)
    mine = Oracle(model, rules.KeepAll(chunk=chunk)).run(prompt, forced)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt]), past_key_values=cache).logits[0]]
        theirs += [model(torch.tensor([[t]]), past_key_values=cache).logits[0] for t in forced]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_streaming_is_a_dense_mask():
    model = random_model("llama64")
    prompt, forced = tokens(20, seed=3), tokens(6, seed=4)
    run = Oracle(model, rules.Streaming(sink=2, window=6))
    mine = torch.cat(run.run(prompt, forced))
    n = len(prompt) + len(forced)
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    # In the prompt every earlier token is read; a later query reads what the forward before it left, and itself.
    left = (key < 2) | (key > query - 1 - 6)
    readable = (key <= query) & ((query < len(prompt)) | left)
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("sdpa")
    with torch.no_grad():
        theirs = dense(torch.tensor([prompt + forced]), attention_mask=readable[None, None], use_cache=False).logits[0]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert run.kept()[1][0] == (0, 1, *range(n - 6, n))


def test_snapkv_keeps_the_published_set():
    """Golden set of the authors' cluster: window 4, average pooling 5, capacity 16, group of 2, seed 0, head 0."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
    run = Oracle(random_model("llama64"), rules.KeepAll())
    run.scaling = 8**-0.5
    row = run.rows[0][0]
    row.keys, row.queries, row.resident = keys[0, 0], queries[0, :2], torch.ones(64, dtype=torch.bool)
    total = run.last_reads(row, 4).sum(1).mean(0)[:60].tolist()
    scores = rules.pooled(total, 5, "avg")
    chosen = sorted(p for p, _ in run.best([(s, p, 0) for p, s in enumerate(scores)], 12))
    assert [*chosen, 60, 61, 62, 63] == [26, 27, 28, 29, 30, 31, 34, 52, 53, 55, 56, 57, 60, 61, 62, 63]


def test_pyramid_budgets():
    assert rules.pyramid(12, 4, 20, 64, 4) == [24, 16, 8, 0]
    assert rules.pyramid(36, 4, 20, 64, 4) == [36, 36, 36, 36]  # short prompt: uniform, as published
    for total, layers, prompt in [(20, 4, 64), (20, 3, 41), (7, 5, 16), (31, 6, 500)]:
        budgets = rules.pyramid(total, layers, 20, prompt, 4)
        assert sum(budgets) == total * layers
        assert budgets == sorted(budgets, reverse=True)
        assert max(budgets) <= max(total, prompt - 4)


@pytest.mark.parametrize(("prompt", "answer", "chunk", "sink", "window"), [(50, 5, 16, 2, 8), (33, 4, 33, 4, 9)])
def test_footprint_is_the_published_closed_form(prompt, answer, chunk, sink, window):
    """Half of the heads local: area and peak summed by the formula of the metric's authors."""
    model = random_model("llama64")
    mask = ((1, 0),) * model.config.num_hidden_layers
    run = Oracle(model, rules.prulong(mask, sink, window, chunk))
    run.run(tokens(prompt, seed=5), tokens(answer, seed=6))
    total, area, peaks = prompt + answer, 0, []
    for first in range(0, prompt, chunk):
        n = min(chunk, prompt - first)
        held = min(first, window) + min(first - min(first, window), sink)
        area += n * (n + 1) // 2 + n * held
        peaks.append((n + held + first + n) / 2)
    area += answer * (1 + sink + window)
    peaks.append((1 + sink + window + total) / 2)
    full = total * (total + 1) / 2
    assert run.footprint() == pytest.approx((area + full) / 2 / full, abs=1e-12)
    assert run.peak() == pytest.approx(max(peaks) / total, abs=1e-12)


def test_ties_and_nan():
    run = Oracle(random_model("llama64"), rules.KeepAll())
    nan = float("nan")
    assert run.best([(1.0, 5, 0), (1.0, 2, 1), (1.0, 2, 0), (nan, 0, 0), (0.0, 1, 0)], 3) == [(2, 0), (2, 1), (5, 0)]
    assert run.best([(nan, 0, 0), (0.0, 9, 0)], 2) == [(9, 0), (0, 0)]
    assert run.best([(1.0, 0, 0)], -3) == []


def test_lag_score_of_a_flat_channel_counts_as_nothing():
    own, following = torch.randn(4, 3), torch.randn(4, 3)
    following[:, 1] = 2.0
    assert torch.isfinite(rules.lag_score(own, following)).all()


def test_a_row_never_regains_what_it_lost():
    model = random_model("qwen128")
    run = Oracle(model, rules.H2O(heavy=Fraction(1, 4), local=Fraction(1, 4)))
    run.run(tokens(24, seed=7), tokens(5, seed=8))
    for before, after in zip(run.forwards, run.forwards[1:], strict=False):
        for old, new in zip(before.kept[0], after.kept[0], strict=True):
            assert set(new) - set(old) <= {after.piece.start}
            assert len(new) == 12


def test_noise_is_gumbel_and_belongs_to_its_place():
    noise = torch.tensor([stateful.gumbel(3, 1, head, 40, p) for head in range(4) for p in range(1500)])
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.15)
    assert len({stateful.hashed(0, *place) for place in [(0, 1), (1, 0), (0, 0), (1, 1)]}) == 4
    assert stateful.hashed(2**32 + 5, 7) == stateful.hashed(5, 7)
    inverse = pow(0x846CA68B, -1, 2**32)  # the mixer loses nothing: each of its steps can be undone
    x = stateful.mixed(12345)
    x = (x ^ (x >> 16)) * inverse % 2**32
    x = (x ^ (x >> 15) ^ (x >> 30)) * pow(0x7FEB352D, -1, 2**32) % 2**32
    assert x ^ (x >> 16) == 12345


def test_keyformer_without_noise_is_h2o(monkeypatch):
    """In the prompt nothing is flattened either."""
    monkeypatch.setattr(stateful, "gumbel", lambda *place: 0.0)
    model, share = random_model("llama64"), {"heavy": Fraction(1, 4), "local": Fraction(1, 8)}
    noiseless, plain = Oracle(model, stateful.Keyformer(**share)), Oracle(model, rules.H2O(**share))
    for run in (noiseless, plain):
        run.feed(tokens(30, seed=9))
    assert noiseless.kept() == plain.kept()


def test_keyformer_flattens_with_each_step():
    """One entry gets what a softmax at the published temperature gives: 1 + step / 100."""
    run = Oracle(random_model("llama64"), stateful.Keyformer(heavy=Fraction(1), seed=4))
    run.feed(tokens(6, seed=10))
    before = run.rows[1][1].states["noisy"].clone()
    run.feed([77])
    row = run.rows[1][1]
    wanted = torch.zeros(7)
    for g in range(2):
        logits = [(row.keys[p] @ row.queries[g, 6]).item() * run.scaling for p in range(7)]
        noisy = [math.exp((x + stateful.gumbel(4, 1, 2 + g, 6, p)) / 1.01) for p, x in enumerate(logits)]
        wanted += torch.tensor([x / sum(noisy) / 2 for x in noisy])
    torch.testing.assert_close(row.states["noisy"][:6] - before, wanted[:6], atol=1e-5, rtol=1e-4)


def test_lazy_waits_are_the_gaps_between_reads():
    """Entry 0 is read by queries 0, 1, 4 and 5: the longest wait is 3, and the last read was at 5."""
    run = Oracle(random_model("llama64"), stateful.Lazy(alpha=0.3))
    row = run.rows[0][0]
    run.scaling, dim = 1.0, 64
    row.keys = torch.zeros(6, dim)
    row.keys[0, 0] = 1.0
    row.queries = torch.zeros(2, 6, dim)
    row.queries[0, [1, 4, 5], 0], row.queries[:, [2, 3], 0] = 9.0, -9.0
    row.states = {"seen": torch.arange(6.0), "gap": torch.ones(6)}
    for place in range(6):
        row.resident = torch.ones(place + 1, dtype=torch.bool)
        run.rule.on_query(run, 0, 0, place)
    assert row.states["seen"][0] == 5
    assert row.states["gap"][0] == 3


def test_likeness_of_r_kv_is_the_mean_cosine_with_all_keys():
    keys = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    directions = torch.nn.functional.normalize(keys, dim=1)
    pairs = [[torch.cosine_similarity(a, b, dim=0).item() for b in keys] for a in keys]
    torch.testing.assert_close(directions @ directions.mean(0), torch.tensor(pairs).mean(1))


def test_expected_attention_is_the_mean_over_normal_queries():
    """E[exp(q k)] of many normal queries, against mean and variance of logits."""
    generator = torch.Generator().manual_seed(2)
    queries = 0.5 + 0.7 * torch.randn(200_000, 3, generator=generator)
    keys = torch.randn(4, 3, generator=generator)
    logits = queries @ keys.T
    mean_of_exp = logits.double().exp().mean(0)
    expected = torch.softmax(logits.mean(0) + logits.var(0) / 2, 0)
    torch.testing.assert_close(expected.double(), mean_of_exp / mean_of_exp.sum(), atol=5e-3, rtol=2e-2)


def test_cover_takes_the_entry_that_crosses():
    run = Oracle(random_model("llama64"), rules.KeepAll())
    scored = [(3.0, 0, 0), (1.0, 1, 0), (4.0, 2, 0), (-5.0, 3, 0), (float("nan"), 4, 0), (2.0, 5, 0)]
    part = [(2, 0), (0, 0), (5, 0), (1, 0)]
    for percent, n in [(0, 0), (1, 1), (39, 1), (41, 2), (69, 2), (71, 3), (89, 3), (91, 4)]:
        assert stateful.covered(run, scored, Fraction(percent, 100)) == part[:n]
    assert stateful.covered(run, [(1.0, 4, 1), (1.0, 4, 0), (1.0, 2, 1)], Fraction(1, 2)) == [(2, 1), (4, 0)]
    assert stateful.covered(run, [(-1.0, 0, 0), (0.0, 1, 0)], Fraction(1, 2)) == []


def test_random_is_fair_and_independent_of_what_is_there():
    run = Oracle(random_model("llama64"), rules.KeepAll())
    run.feed(tokens(40, seed=3))
    piece = run.piece
    few, more = (stateful.drawn(run, 0, 1, piece, n, seed=7) for n in (5, 12))
    assert few < more
    assert len(more) == 12
    assert more != stateful.drawn(run, 0, 0, piece, 12, seed=7)
    times = [sum(p in stateful.drawn(run, 0, 0, piece, 10, seed) for seed in range(400)) for p in range(40)]
    assert min(times) > 60
    assert max(times) < 145
