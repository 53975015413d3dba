"""P5, P8 and the ways into generate(): the untouched model's tokens, graph breaks, restore, caches, turns."""

import gc

import pytest
import torch
from torch._dynamo.utils import counters

import kvcompile
from kvcompile.api import optimized
from tests.driving import BACKENDS, LIBRARY, Sizes, call, drive, one_by_one, padded, same
from tests.models import FAMILIES, random_model, tokens
from tests.oracle import Oracle

COMPILED = ["off", "eager"]


def options_of(name, folder, **changes):
    sample = LIBRARY[name](Sizes(**changes))
    return sample, sample.options(folder)


# -- P8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(1,), (40,), (17, 5, 29)], ids=str)
def test_p8_keep_all_is_the_untouched_model_token_for_token(family, backend, lengths):
    model = random_model(family)
    ids, mask = padded([tokens(n, seed=n) for n in lengths], "left")
    request = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    untouched = model.generate(ids, **request)
    kvcompile.optimize(model, "keep_all", backend=backend, compile="off")
    assert torch.equal(model.generate(ids, **request), untouched)


def test_p8_sampling_and_output_options_go_through():
    model = random_model("llama64")
    ids = torch.tensor([tokens(20, seed=1)])
    request = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}

    def sample():
        torch.manual_seed(3)
        return model.generate(ids, do_sample=True, top_k=20, **request)

    untouched = sample()
    kvcompile.optimize(model, "keep_all", compile="off")
    made = sample()
    assert torch.equal(made.sequences, untouched.sequences)
    for mine, truth in zip(made.logits, untouched.logits, strict=True):
        same(mine, truth, "generate's logits")
    assert isinstance(made.past_key_values, kvcompile.KvCache)


@pytest.mark.parametrize("name", LIBRARY)
def test_generate_gives_the_oracles_logits(name, tmp_path):
    """The tokens that generate() picked are forced on the oracle, which must give the same logits for each."""
    sample, options = options_of(name, tmp_path)
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend="cpu", compile="off", **options)
    prompt = tokens(37, seed=2)
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    chosen = made.sequences[0, len(prompt) :].tolist()
    truth = Oracle(sample.model(), sample.rule())
    logits = truth.run(prompt, chosen[:-1])
    assert truth.closest > 1e-6
    for step, (mine, expected) in enumerate(zip(made.logits, logits, strict=True)):
        same(mine[0], expected[-1], f"token {step}")
    cache = made.past_key_values
    expected = [[list(head) for head in layer] for layer in truth.kept()]
    assert [[p.tolist() for p in cache.positions(layer)] for layer in range(len(expected))] == expected


# -- the graph pass and P5 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "cpu"])
@pytest.mark.parametrize("name", LIBRARY)
def test_logits_with_and_without_the_graph_pass(name, backend, tmp_path):
    sample, options = options_of(name, tmp_path)
    turns = [tokens(37, seed=4), *one_by_one(tokens(4, seed=5)), tokens(11, seed=6), *one_by_one(tokens(2, seed=7))]
    seen = {}
    for way in COMPILED:
        model = sample.model()
        kvcompile.optimize(model, sample.policy, backend=backend, compile=way, **options)
        seen[way] = drive(model, *turns)
    for i, (plain, compiled) in enumerate(zip(seen["off"], seen["eager"], strict=True)):
        assert plain.kept == compiled.kept, f"call {i}"
        off = (plain.logits - compiled.logits).abs().max().item()
        assert off <= 1e-5 * max(1.0, plain.logits.abs().max().item()), f"call {i}: {off:.2e}"


def test_the_graph_diff_shows_what_was_inserted():
    """Anchors go, attention and eviction come; in a step the evictions of all layers are one launch after the last."""
    model = random_model("llama64")
    kvcompile.optimize(model, "h2o", backend="cpu", compile="eager", heavy="20% of prompt", local="10% of prompt")
    model.generate(torch.tensor([tokens(40, seed=1)]), max_new_tokens=4, do_sample=False)
    lines = kvcompile.inspect(model).graph.splitlines()
    gone = [line for line in lines if line.startswith("-") and "anchor" in line]
    new = [line for line in lines if line.startswith("+")]
    assert gone
    assert not any("anchor" in line for line in new)
    assert any("attend" in line for line in new)
    assert any("evict" in line for line in new)
    after_the_last_layer = [line for line in lines if line[:1] not in "+-@" and "evict" in line and "(" in line]
    assert len(after_the_last_layer) == 1, after_the_last_layer


@pytest.mark.parametrize("name", LIBRARY)
def test_p5_no_break_and_no_recompile_over_five_prompts(name, tmp_path):
    five_prompts(name, tmp_path, new_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_p5_no_break_and_no_recompile_over_512_tokens(name, tmp_path):
    five_prompts(name, tmp_path, new_tokens=512)


def five_prompts(name, folder, new_tokens):
    """The report's counts, and torch's own: the first prompt makes the graphs, two or, where it is cut, three."""
    sample, options = options_of(name, folder)
    torch.compiler.reset()
    counters.clear()
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend="cpu", compile="eager", **options)
    graphs = []
    for n in (40, 57, 96, 33, 70):
        ids = torch.tensor([tokens(n, seed=n)])
        assert model.generate(ids, max_new_tokens=new_tokens, do_sample=False).shape == (1, n + new_tokens)
        graphs.append(counters["stats"]["unique_graphs"])
    report = kvcompile.report(model).to_dict()
    assert report["graph_breaks"] == 0
    assert report["recompiles"] == 0
    assert not counters["graph_break"]
    cut = name in ("snapkv_chunked", "prulong", "duo", "locret")
    assert graphs == [3 if cut else 2] * 5


# -- undo, again, for a while -----------------------------------------------------------------------------------------


def test_restore_leaves_the_model_as_it_was():
    model = random_model("qwen64")
    ids = torch.tensor([tokens(25, seed=1)])
    before = (set(model.__dict__), model.config._attn_implementation, type(model), model.forward.__func__)
    untouched = model.generate(ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(ids).logits
    for way in COMPILED:
        assert kvcompile.optimize(model, "streaming", compile=way, n_sink=2, window=6) is model
        changed = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert changed.shape == untouched.shape
        kvcompile.restore(model)
        assert (set(model.__dict__), model.config._attn_implementation, type(model), model.forward.__func__) == before
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), untouched)


def test_the_last_optimize_counts_and_one_restore_undoes_all():
    model = random_model("llama64")
    prompt, untouched = tokens(30, seed=2), None
    with torch.no_grad():
        untouched = model(torch.tensor([prompt])).logits
    kvcompile.optimize(model, "snapkv", compile="off", budget=10, observe=4)
    drive(model, prompt)
    kvcompile.optimize(model, "streaming", compile="off", n_sink=1, window=3)
    assert drive(model, prompt)[0].kept[0][0][0] == (0, 27, 28, 29)
    assert kvcompile.report(model).to_dict()["policy"].startswith("streaming")
    kvcompile.restore(model)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([prompt])).logits, untouched)


def test_use_is_optimize_for_a_block():
    model = random_model("llama64")
    prompt = tokens(30, seed=3)
    with torch.no_grad():
        untouched = model(torch.tensor([prompt])).logits
    with pytest.raises(ZeroDivisionError), kvcompile.use(model, "streaming", compile="off", n_sink=1, window=3):
        assert drive(model, prompt)[0].kept[0][0][0] == (0, 27, 28, 29)
        raise ZeroDivisionError
    assert "forward" not in model.__dict__
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([prompt])).logits, untouched)


def test_two_models_do_not_share_anything():
    """Optimising one leaves another of the same class, made before, as it was; two optimised ones keep apart."""
    first, second = random_model("llama64"), random_model("llama64")
    prompt = tokens(30, seed=4)
    with torch.no_grad():
        untouched = second(torch.tensor([prompt])).logits
    kvcompile.optimize(first, "streaming", compile="off", n_sink=1, window=3)
    drive(first, prompt)
    with torch.no_grad():
        assert torch.equal(second(torch.tensor([prompt])).logits, untouched)
    kvcompile.optimize(second, "knorm", compile="off", budget=7)
    assert {len(head) for layer in drive(second, prompt)[0].kept[0] for head in layer} == {7}
    assert {len(head) for layer in drive(first, prompt)[0].kept[0] for head in layer} == {4}


# -- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["streaming", "h2o", "adakv", "lagkv"])
def test_several_live_caches_take_turns(name, backend, tmp_path):
    sample, options = options_of(name, tmp_path)
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options)
    prompts = [tokens(40, seed=1), tokens(23, seed=2)]
    forced = [tokens(5, seed=3), tokens(5, seed=4)]
    alone = [drive(model, p, *one_by_one(f)) for p, f in zip(prompts, forced, strict=True)]
    caches = [None, None]
    for turn in range(6):
        for b in range(2):
            fed = prompts[b] if turn == 0 else [forced[b][turn - 1]]
            found, caches[b] = call(model, torch.tensor([fed]), caches[b])
            assert found.kept == alone[b][turn].kept
            same(found.logits, alone[b][turn].logits, f"cache {b}, turn {turn}")


def test_a_dropped_cache_gives_its_memory_back():
    """Two caches at once need more than one; after they are collected, one fits into what is there already."""
    model = random_model("llama64")
    kvcompile.optimize(model, "keep_all", compile="off")
    prompt = torch.tensor([tokens(60, seed=1)])
    held = [call(model, prompt)[1] for _ in range(3)]
    most = kvcompile.report(model).to_dict()["bytes_allocated"]
    del held
    gc.collect()
    for _ in range(4):
        call(model, prompt)
        assert kvcompile.report(model).to_dict()["bytes_allocated"] <= most


@pytest.mark.parametrize("name", ["keep_all", "streaming", "h2o", "snapkv_chunked", "lagkv"])
def test_a_conversation_goes_on_from_its_cache(name, tmp_path):
    """generate(past_key_values=...) with the whole text so far: only what the cache has not seen is fed."""
    sample, options = options_of(name, tmp_path)
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend="cpu", compile="off", **options)
    first, second = tokens(24, seed=5), tokens(9, seed=6)
    request = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one = model.generate(torch.tensor([first]), **request)
    text = one.sequences[0].tolist() + second
    two = model.generate(torch.tensor([text]), past_key_values=one.past_key_values, **request)
    truth = Oracle(random_model("llama64"), sample.rule())
    truth.run(first, one.sequences[0, 24:-1].tolist())
    # The last token of the first answer was never fed: it opens the second turn.
    logits = [
        truth.feed([text[28], *second])[-1],
        *(truth.feed([t])[0] for t in two.sequences[0, len(text) : -1].tolist()),
    ]
    assert truth.closest > 1e-6
    for step, (mine, expected) in enumerate(zip(two.logits, logits, strict=True)):
        same(mine[0], expected, f"second answer, token {step}")


def test_the_logical_length_is_what_the_model_has_seen():
    model = random_model("llama64")
    kvcompile.optimize(model, "streaming", compile="off", n_sink=1, window=3)
    _, cache = call(model, torch.tensor([tokens(20, seed=7)]))
    assert cache.get_seq_length() == 20
    _, cache = call(model, torch.tensor([[5]]), cache)
    assert cache.get_seq_length() == 21
    assert cache.nbytes() > 0
    assert cache.stats()


# -- compile time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 9])
def test_one_graph_serves_all_layers(layers):
    """A layer kind is compiled once per phase, however deep the model is, so compile time does not grow with depth."""
    model = random_model("llama64", num_hidden_layers=layers)
    kvcompile.optimize(model, "snapkv", backend="cpu", compile="eager", budget=16, observe=4)
    model.generate(torch.tensor([tokens(40, seed=1)]), max_new_tokens=3, do_sample=False)
    records = optimized(model).forward.engine.layers.records
    assert sorted(record.phase for record in records) == ["prefill.end", "step"]
    assert kvcompile.report(model).to_dict()["graph_breaks"] == 0
