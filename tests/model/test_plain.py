"""Plain PyTorch models: what the matcher takes and refuses, and that the policy is carried out as on transformers'."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import FalconConfig, FalconForCausalLM

import kvcompile
from tests import plain_models as plain
from tests.driving import LIBRARY, Sizes, drive, kept, one_by_one, same
from tests.models import random_model, tokens
from tests.plain_models import fed, logits_of, places


def slow(*cases):
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]


POSITIONS = {"positions": "positions"}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def ids_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([tokens(n, seed=seed)])


# -- P8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name"), [(plain.gpt, "pos"), (lambda: plain.llama(layers=1), "positions")], ids=["gpt", "llama"]
)
@pytest.mark.parametrize("backend", ["cpu", *slow("reference")])
def test_p8_keep_all_picks_the_tokens_of_the_untouched_model_run_anew_each_time(build, name, backend):
    model = build()
    ids = ids_of(20)
    for _ in range(12):
        out = logits_of(model(ids, **{name: places(ids)}))
        ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
    kvcompile.optimize(model, "keep_all", backend=backend, positions=name)
    session = kvcompile.session(model)
    mine = ids[:, :20]
    for _ in range(12):
        out = logits_of(session(mine[:, session.length :]))
        mine = torch.cat([mine, out[:, -1:].argmax(-1)], 1)
    assert torch.equal(mine, ids)
    assert session.length == 31


@pytest.mark.parametrize(
    ("repeat", "kv_heads"),
    [(None, 2), (plain.repeat_interleaved, 2), (plain.expanded_early, 2), *slow((plain.expanded, 2), (plain.tiled, 4))],
)
def test_kv_heads_are_those_before_they_are_repeated(repeat, kv_heads):
    """Heads that are tiled instead stand for query heads in another order: all of them are kept."""
    model = plain.llama(layers=1, repeat=repeat)
    ids = ids_of(24)
    truth = model(ids, places(ids))
    kvcompile.optimize(model, "keep_all", backend="reference", **POSITIONS)
    assert kvcompile.inspect(model).plan.facts.kv_heads == kv_heads
    same(model(ids), truth, "a whole prompt")
    same(fed(model, ids, 15), truth[:, 14:], "a prompt and steps")


# -- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", *slow("reference")])
@pytest.mark.parametrize("name", ["snapkv", "prulong", "snapkv_chunked", *slow("h2o", "streaming", "adakv", "tova")])
def test_a_policy_keeps_what_it_keeps_of_the_same_weights_in_transformers(name, backend, tmp_path):
    sample = LIBRARY[name](Sizes(mask=((1, 0), (0, 1))))
    options = sample.options(tmp_path)
    turns = [tokens(37, seed=4), *one_by_one(tokens(4, seed=5)), tokens(11, seed=6), *one_by_one(tokens(2, seed=7))]
    theirs = random_model("llama64", num_hidden_layers=2)
    kvcompile.optimize(theirs, sample.policy, backend="reference", compile="off", **options)
    truth = drive(theirs, *turns)
    model = plain.llama(layers=2)
    kvcompile.optimize(model, sample.policy, backend=backend, **POSITIONS, **options)
    session = kvcompile.session(model)
    for i, (turn, expected) in enumerate(zip(turns, truth, strict=True)):
        logits = session(torch.tensor([turn]))
        assert kept(session.cache, 2) == expected.kept[0], f"call {i}"
        same(logits, expected.logits, f"call {i}")
    mine, other = kvcompile.report(model), kvcompile.report(theirs)
    assert (mine.footprint, mine.peak, mine.lengths) == (other.footprint, other.peak, other.lengths)
    assert (mine.graph_breaks, mine.recompiles) == (0, 0)


def test_a_whole_prompt_is_the_policys_prefill_and_each_call_begins_anew():
    model = plain.llama(layers=1)
    kvcompile.optimize(model, "streaming", backend="cpu", n_sink=2, window=8, **POSITIONS)
    first = model(ids_of(40))
    assert kvcompile.report(model).lengths == [[10, 10]]
    assert torch.equal(model(ids_of(40), places(ids_of(40))), first)
    same(kvcompile.session(model)(ids_of(40)), first, "a session's first call")


def test_a_batch_gives_what_each_sequence_gives_alone():
    model = plain.llama(layers=1)
    kvcompile.optimize(model, "h2o", backend="cpu", heavy="20% of prompt", local="10% of prompt", **POSITIONS)
    ids = torch.cat([ids_of(30, seed=1), ids_of(30, seed=2)])
    both = fed(model, ids, 25)
    for row in (0, 1):
        same(both[row : row + 1], fed(model, ids[row : row + 1], 25), f"row {row}")


def test_p5_no_recompile_over_ten_lengths():
    model = plain.gpt(layers=1)
    kvcompile.optimize(model, "streaming", backend="cpu", n_sink=2, window=8, positions="pos")
    for n in (1, 2, 3, 8, 9, 17, 40, 64, 65, 130):
        fed(model, ids_of(n + 3), n)
    report = kvcompile.report(model)
    assert (report.graph_breaks, report.recompiles) == (0, 0)


def test_the_graph_shows_attention_and_eviction_in_place_of_sdpa():
    model = plain.llama(layers=2)
    kvcompile.optimize(model, "streaming", backend="cpu", n_sink=2, window=8, **POSITIONS)
    fed(model, ids_of(20), 18)
    lines = kvcompile.inspect(model).graph.splitlines()
    gone, new = ([line for line in lines if line.startswith(sign)] for sign in "-+")
    assert sum("scaled_dot_product_attention(" in line for line in gone) == 4  # two layers, prefill and step
    assert sum("= torch.ops.kvc.attend_prefill" in line for line in new) == 2
    assert sum("= torch.ops.kvc.attend_step" in line for line in new) == 2
    assert not any("anchor" in line or "scaled_dot_product_attention(" in line for line in new)


def test_weights_that_are_tied_count_once():
    model = plain.gpt(layers=1)
    kvcompile.optimize(model, "keep_all", backend="reference", positions="pos")
    facts = kvcompile.inspect(model).plan.facts
    assert facts.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert (facts.layers, facts.q_heads, facts.kv_heads, facts.head_dim) == (1, 4, 4, 16)


def sliced(self, ids):
    return self.embed(ids) + self.table[: ids.shape[1]]


def counted(self, ids):
    return self.embed(ids) + self.table[torch.ones_like(ids).cumsum(1) - 1]


def convolved(self, ids):
    return self.conv(F.pad(self.embed(ids).transpose(1, 2), (2, 0))).transpose(1, 2)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (plain.gpt, r"counts positions .*arange\(idx"),
        (lambda: plain.small(enter=sliced), "counts positions .*self.table"),
        (lambda: plain.small(enter=convolved), "a convolution"),
        *slow((lambda: plain.small(enter=counted), "fed piece by piece")),
    ],
    ids=["arange", "a slice", "a convolution", "a cumulative sum"],
)
def test_a_model_that_must_see_its_prompt_as_a_whole_is_prefilled_and_does_not_go_on(build, reason):
    model = build()
    ids = ids_of(24) % 64
    truth = logits_of(model(ids))
    kvcompile.optimize(model, "snapkv_chunked", backend="reference", c=24, observe=4, ratio="100%")
    session = kvcompile.session(model)
    same(logits_of(session(ids)), truth, "the prompt")
    with pytest.raises(kvcompile.KvCompileError, match=f"cannot go on from a cache.*{reason}"):
        session(ids[:, :1])
    with pytest.raises(kvcompile.KvCompileError, match=f"in pieces of 24 tokens.*{reason}"):
        model(ids_of(25) % 64)


def test_options_that_do_not_fit():
    model, theirs = plain.small(), random_model("llama64")
    for options, reason in (
        ({"positions": "place"}, "no such argument.*it has ids"),
        ({"positions": "ids"}, "no such argument"),
        ({"compile": "inductor"}, "only 'eager' is supported"),
    ):
        with pytest.raises(kvcompile.KvCompileError, match=reason):
            kvcompile.optimize(model, "keep_all", **options)
    for policy, reason in (("razor", "measures heads"), ("streaming_compact", "turns keys")):
        with pytest.raises(kvcompile.KvCompileError, match=reason):
            kvcompile.optimize(model, policy, backend="reference")
    with pytest.raises(kvcompile.KvCompileError, match="for plain PyTorch models"):
        kvcompile.optimize(theirs, "keep_all", positions="position_ids")
    kvcompile.optimize(theirs, "keep_all", compile="off")
    with pytest.raises(kvcompile.KvCompileError, match=r"call model.generate\(...\)"):
        kvcompile.session(theirs)


def test_max_bytes_holds_for_all_sessions_and_a_refused_one_can_go_on_later():
    model = plain.small()
    kvcompile.optimize(model, "keep_all", backend="reference", max_bytes="40KiB")
    ids = ids_of(60) % 64  # 60 entries of 4 KV heads, 69 bytes each, and as many fresh keys and values
    first, second = kvcompile.session(model), kvcompile.session(model)
    truth = first(ids)
    with pytest.raises(kvcompile.KvCompileError, match="max_bytes is 40"):
        second(ids)
    del first
    gc.collect()
    same(second(ids), truth, "the same prompt, when there is room")


def test_calls_that_do_not_fit_an_optimised_model():
    model = plain.gpt(layers=1)
    kvcompile.optimize(model, "keep_all", backend="reference", positions="pos")
    ids = ids_of(6)
    for call, reason in (
        (lambda: model(ids, targets=ids), "was given 'targets'"),
        (lambda: model(ids, places(ids) + 1), "position_ids of sequence 0 are not 0 to 5"),
        (lambda: model(ids[0]), "takes token ids"),
        (lambda: model(), "was given no 'idx'"),
        (lambda: copy.deepcopy(model), "cannot be copied"),
    ):
        with pytest.raises(kvcompile.KvCompileError, match=reason):
            call()


def test_without_torch_compile_there_is_nothing_to_rewrite():
    with torch.compiler.set_stance("force_eager"), pytest.raises(kvcompile.KvCompileError, match="is switched off"):
        kvcompile.optimize(plain.small(), "keep_all", backend="reference")


class Wrapped(nn.Module):
    def __init__(self, falcon):
        super().__init__()
        self.falcon = falcon

    def forward(self, ids, pos):
        return self.falcon(input_ids=ids, position_ids=pos, use_cache=False).logits


FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [({}, 1), ({"multi_query": False}, 4), ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4)],
    ids=["one KV head", "as many", "grouped"],
)
def test_a_wrapped_falcon_goes_on_as_the_untouched_one(changes, kv_heads):
    torch.manual_seed(0)
    model = Wrapped(FalconForCausalLM(FalconConfig(**FALCON, **changes, initializer_range=0.3)).eval())
    ids = ids_of(20) % 64
    truth = model(ids, places(ids))
    kvcompile.optimize(model, "keep_all", backend="reference", positions="pos")
    assert kvcompile.inspect(model).plan.facts.kv_heads == kv_heads
    same(fed(model, ids, 14), truth[:, 13:], "a prompt and steps")


@pytest.mark.slow
def test_a_wrapped_falcon_with_alibi_is_refused():
    model = Wrapped(FalconForCausalLM(FalconConfig(**FALCON, alibi=True)).eval())
    with pytest.raises(kvcompile.KvCompileError, match="its mask is not the causal mask"):
        kvcompile.optimize(model, "keep_all", backend="reference", positions="pos")


def test_restore_gives_the_model_back_and_ends_its_sessions():
    model = plain.gpt(layers=1)
    ids, before = ids_of(30), set(vars(model))
    truth = model(ids)[0]
    with kvcompile.use(model, "streaming", backend="cpu", n_sink=2, window=8, positions="pos"):
        session = kvcompile.session(model)
        session(ids[:, :29])
        assert (session(ids[:, 29:])[0] - truth).abs().max() > 1e-3
    assert set(vars(model)) == before
    assert torch.equal(model(ids)[0], truth)
    with pytest.raises(kvcompile.KvCompileError, match="begin a new session"):
        session(ids[:, :1])


def test_a_policy_that_is_refused_leaves_the_model_with_the_one_that_it_had():
    model = plain.small()
    kvcompile.optimize(model, "streaming", backend="reference", n_sink=1, window=4)
    session, ids = kvcompile.session(model), ids_of(12) % 64
    session(ids)
    with pytest.raises(kvcompile.KvCompileError), kvcompile.use(model, "razor", backend="reference"):
        pass
    session(ids[:, :1])
    assert kvcompile.report(model).policy == "streaming"


def test_a_cache_that_is_collected_while_a_graph_is_traced_leaves_its_figures_and_then_its_memory():
    """Garbage is collected at any time, also under the tracer's stand-ins for tensors."""
    model = plain.small()
    kvcompile.optimize(model, "keep_all", backend="reference")
    session = kvcompile.session(model)
    session(ids_of(10) % 64)
    with FakeTensorMode():
        del session
        gc.collect()
    run = model.forward.run
    assert kvcompile.report(model).lengths == [[10, 10, 10, 10]] and hasattr(run, "store")
    kvcompile.session(model)(ids_of(3) % 64)
    gc.collect()
    assert not hasattr(run, "store")
