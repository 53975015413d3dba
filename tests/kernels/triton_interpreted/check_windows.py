"""Models with sliding windows, soft-caps and sinks on the interpreter: what a window has left goes, after steps and
pieces; whole models run as under the reference, without it, and a step reads nothing on the host."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

import kvcompile
from kvcompile.cuda_graphs import StepGraphs
from kvcompile.kernels import contexts, judge
from kvcompile.kernels.choose import decode_spec, evict_spec
from kvcompile.kernels.plan import Region, Selection, StatePlan
from kvcompile.kernels.triton_backend.attend import variant
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.evict import EvictStep
from tests.driving import LIBRARY, Sizes, drive, examples, one_by_one
from tests.kernels.triton_interpreted.check_step import Watched
from tests.kernels.triton_interpreted.plans import (
    ACC,
    H2O,
    Pools,
    attn,
    binary,
    const,
    module,
    named,
    plan,
    reduce,
    shuffled,
    sliding,
    varied,
)
from tests.kernels.triton_interpreted.watching import fallbacks, listed
from tests.models import VOCABULARY, tokens

CPU = torch.device("cpu")
LEN = named("scalar", "len")
NEWEST = Region("recent", 0)
KEEPS: dict[str, tuple[Region | Selection, ...]] = {
    "regions": (Region("sink", 1), NEWEST),
    "all": (Region("all"),),
    "length": (NEWEST, Selection("top", binary("-", binary("*", ACC, LEN), named("field", "pos")), 1)),
    "across": (NEWEST, Selection("top", ACC, 1, scope="across", floor=Fraction(1, 5))),
    "part": (NEWEST, Selection("top", ACC, fraction=Fraction(2, 5))),
    "shared": (NEWEST, Selection("bottom", ACC, 1, scope="shared")),
}


def best(scored: list[tuple[float, int, int]], n: int) -> list[tuple[float, int, int]]:
    return sorted(scored, key=lambda x: (-x[0], x[1], x[2]))[:n]


def wanted(kind: str, rows: list[list[Any]], here: int, oldest: int, recent: int, heavy: int) -> list[set[int]]:
    """Positions that each row of a layer and sequence keeps, of entries as `Pools.entries` gives them."""
    near = [[e for e in row if e[0] >= oldest] for row in rows]
    held = [{e[0] for e in row if e[0] > here - recent} for row in near]
    if kind == "all":
        return [{e[0] for e in row} for row in near]
    if kind == "regions":
        return [kept | {e[0] for e in row if e[0] < heavy} for kept, row in zip(held, near, strict=True)]
    lengths = [len(row) for row in near]
    weight, older = (lengths, 1) if kind == "length" else ([1] * len(rows), 0)
    open_ = [
        [(e[4][0] * weight[h] - e[0] * older, e[0], h) for e in row if e[0] not in held[h]]
        for h, row in enumerate(near)
    ]
    if kind == "shared":
        means = [(-sum(pair[0] for pair in pairs) / len(pairs), pairs[0][1], 0) for pairs in zip(*open_, strict=True)]
        return [kept | {at for _, at, _ in best(means, heavy)} for kept in held]
    if kind == "across":
        total = heavy * len(rows)
        sure = [best(row, total // (5 * len(rows))) for row in open_]
        rest = [x for row, taken in zip(open_, sure, strict=True) for x in row if x not in taken]
        won = [x for taken in sure for x in taken] + best(rest, total - sum(map(len, sure)))
        return [kept | {at for _, at, h in won if h == j} for j, kept in enumerate(held)]
    counts = [len(row) * 2 // 5 if kind == "part" else heavy for row in open_]
    return [kept | {at for _, at, _ in best(row, n)} for kept, row, n in zip(held, open_, counts, strict=True)]


@pytest.mark.parametrize("kind", KEEPS)
def test_what_a_window_has_left_goes_and_competes_for_nothing(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    @examples(2)
    @given(seed=st.integers(0, 10**6), recent=st.integers(0, 9), heavy=st.integers(0, 20), ordered=st.booleans())
    def drawn(seed: int, recent: int, heavy: int, ordered: bool) -> None:
        dice = random.Random(seed)
        windows = (dice.randint(1, 40), dice.randint(1, 60), 500)
        p = sliding(plan(KEEPS[kind], (H2O,), layers=3, kv_heads=2, head_dim=16, by_position=ordered), windows)
        pools = Pools(18, 8, 16, seed=seed, spare=72)
        now, fires = [dice.randint(50, 70) for _ in range(3)], [1, judge.SLIDES + dice.randint(0, 1), 0]
        dice.shuffle(fires)
        for row in range(18):
            of = row if kind != "shared" else row // 2  # heads that share are aligned
            own = random.Random(seed + of)
            places = own.sample(range(now[row // 2 % 3] + 1), own.choice([0, 1, 16, own.randrange(50)]))
            pools.fill(row, sorted(places) if ordered else places, ties=True)
        before = [pools.entries(row) for row in range(18)]
        step = EvictStep.prepare(module(p, evict_spec(p, 0), tmp_path_factory.mktemp("k")), p, 0, 3, 128, CPU)
        numbers = torch.tensor([recent, heavy])[None, :, None].expand(3, 2, 3)
        step(pools, numbers.contiguous(), torch.tensor(fires, dtype=torch.uint8), torch.tensor(now),
             torch.tensor(now), None, torch.tensor(windows, dtype=torch.int32))  # fmt: skip
        for first in range(0, 18, 2):
            b, window, was = first // 2 % 3, windows[first // 6], before[first : first + 2]
            want = [{e[0] for e in row} for row in was]
            if fires[b]:
                asked = kind if fires[b] != judge.SLIDES else "all"
                want = wanted(asked, was, now[b], now[b] + 2 - window, recent, heavy)
            for row, keep in zip((first, first + 1), want, strict=True):
                got = pools.entries(row)
                assert {e[0] for e in got} == keep and len(got) == len(keep)
                kept = [e for e in before[row] if e[0] in keep]
                assert sorted(e[2:] for e in got) == sorted(e[2:] for e in kept)
                if ordered:
                    assert [e[0] for e in got] == sorted(keep)
        pools.assert_pages_conserved()

    drawn()


def test_a_state_grows_by_what_later_queries_can_read_of_a_row(tmp_path: Path) -> None:
    """`len` under a window counts what has not left it, in a score and in a state; without one, all."""
    grown = StatePlan("acc", const(0), reduce("mean", "g", binary("/", reduce("sum", "q", attn()), LEN)))
    score = reduce("mean", "g", binary("*", reduce("sum", "q", attn("last", 1)), LEN))
    p = plan((NEWEST, Selection("top", score, 1)), (grown,), layers=2, kv_heads=1, head_dim=16)
    p = varied(p, cap=3.0, sinks=True, windows=(20, 0))
    pools = Pools(4, 8, 16, spare=30)
    for row in range(4):
        pools.fill(row, shuffled(33 + row, row))
    site = SimpleNamespace(sink=torch.randn(2, 2, generator=pools.noise), reach=torch.tensor([20, 0]).int())
    step = DecodeStep.prepare(module(p, decode_spec(p), tmp_path), 2, 2, 128, CPU)
    assert step.score is not None
    now = torch.tensor([40, 44])
    for layer, reach in enumerate((20, 0)):
        rows = [2 * layer, 2 * layer + 1]
        before = [pools.state[0, pools.slots(row)] for row in rows]
        q, k, v = pools.randn(2, 2, 16), pools.randn(2, 1, 16), pools.randn(2, 1, 16)
        yes = torch.ones(2, dtype=torch.int64)
        step(q, k, v, pools, now, yes, torch.tensor([layer]), 0.25, **variant(p, site))  # type: ignore[arg-type]
        for b, row in enumerate(rows):
            at = pools.slots(row)
            logits = 3 * torch.tanh(q[b].double() @ pools.k[at].double().T * 0.25 / 3)
            seen = pools.pos[at] > now[b] - (reach or 1000)
            logits = torch.cat([logits.masked_fill(~seen, -torch.inf), site.sink[layer][:, None].double()], 1)
            probability = logits.softmax(1)[:, :-1].mean(0)
            length = int((pools.pos[at] > now[b] + 1 - (reach or 1000)).sum())
            assert length < len(at) or not reach
            state = torch.cat([before[b].double(), torch.zeros(1)]) + probability / length
            assert (pools.state[0, at].double() - state).abs().max() < 1e-6
            assert (step.score[row, : len(at)].double() - probability * length).abs().max() < 1e-5


def test_the_bit_of_a_window_is_the_one_that_the_host_sets() -> None:
    assert int(contexts.SLIDES) == judge.SLIDES


# -- whole models ------------------------------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "sliding_window": 11,
    "pad_token_id": 0,
}  # fmt: skip
POLICIES: dict[str, dict[str, object]] = {
    "keep_all": {},
    "snapkv": {"budget": 14, "observe": 4},
    "h2o": {"heavy": 5, "local": 5},
}


def model(family: str) -> Any:
    """Weights large enough that soft-cap, sinks and windows change what is said."""
    torch.manual_seed(1)
    made: Any
    if family == "gemma2":
        made = Gemma2ForCausalLM(Gemma2Config(**SHAPE, attn_logit_softcapping=3.0, query_pre_attn_scalar=16))
    else:
        made = GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.mul_(4) if weight.ndim > 1 and "embed" not in name else weight.normal_() if "sinks" in name else None
    return made.eval().requires_grad_(False)


def generate(made: Any) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Tokens, logits and kept positions of a padded batch."""
    ids = torch.tensor([tokens(17), tokens(17, seed=3)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    done = made.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        eos_token_id=None,
    )  # fmt: skip
    cache = done.past_key_values
    kept = [p.tolist() for layer in range(2) for b in range(2) for p in cache.positions(layer, b)]
    return done.sequences, torch.stack(done.logits), kept


OFTEN = [("gemma2", "h2o"), ("gpt_oss", "snapkv")]  # the interpreter takes seconds for each
ALL = [(family, policy) for family in ("gemma2", "gpt_oss") for policy in POLICIES]


@pytest.mark.parametrize(
    ("family", "policy"), [pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow) for pair in ALL]
)
def test_a_model_with_windows_runs_as_under_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, policy: str
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    made = model(family)
    truth = made.generate(torch.tensor([tokens(17)]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    kvcompile.optimize(made, policy, backend="reference", compile="off", **POLICIES[policy])
    said, logits, kept = generate(made)
    kvcompile.restore(made)
    kvcompile.optimize(made, policy, backend="triton", compile="off", **POLICIES[policy])
    with fallbacks() as taken:
        got_said, got, got_kept = generate(made)
    assert got_kept == kept
    assert torch.equal(got_said, said)
    assert (got - logits).abs().max() < 1e-4
    assert not taken, "the reference stood in"
    assert max(map(len, kept[:4])) <= 11 < max(map(len, kept[4:])) or policy == "h2o", "the first layer has a window"
    if policy == "keep_all":
        assert torch.equal(got_said[:1], truth)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv_chunked", "prulong", "tova", "adakv", "keyformer"])
def test_turns_in_pieces_run_as_under_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    sample = LIBRARY[name](Sizes(budget=14, mask=((1, 0), (0, 1)), chunk=7))
    made, options = model("gemma2"), sample.options(tmp_path)
    turns = [tokens(23, seed=1), *one_by_one(tokens(3, seed=2)), tokens(6, seed=3), *one_by_one(tokens(2, seed=4))]
    kvcompile.optimize(made, sample.policy, backend="reference", compile="off", **options)
    truth = drive(made, *turns)
    kvcompile.restore(made)
    kvcompile.optimize(made, sample.policy, backend="triton", compile="off", **options)
    with fallbacks() as taken:
        found = drive(made, *turns)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.kept == theirs.kept
        assert (ours.logits - theirs.logits).abs().max() < 1e-4
    assert not taken - listed(kvcompile.inspect(made).unprintable), "the reference stood in where nothing says so"


@pytest.mark.parametrize("policy", ["snapkv", pytest.param("h2o", marks=pytest.mark.slow)])
def test_a_captured_step_of_layers_with_windows_reads_nothing_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    made = model("gemma2")
    kvcompile.optimize(made, policy, backend="triton", compile="eager", **POLICIES[policy])
    turns = [tokens(13), *one_by_one(tokens(3, seed=2))]
    expected = drive(made, *turns)
    graphs = made.forward.engine.graphs = StepGraphs(Watched())
    for ours, theirs in zip(drive(made, *turns), expected, strict=True):
        assert ours.kept == theirs.kept
        assert torch.equal(ours.logits, theirs.logits)
    assert graphs.replayed >= 1
