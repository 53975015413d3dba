"""Layers whose attention is off: the branch adds nothing, none of it runs, nothing of it is held, all of it comes back.

The oracle is the untouched model with a hook behind the attention of these layers that makes its output 0.
"""

from __future__ import annotations

import copy

import pytest
import torch

import kvcompile
from kvcompile import KvCache
from kvcompile.api import optimized
from kvcompile.off import refuse_off
from kvcompile.pages import PagedStore
from kvcompile.passes.sites import find_sites
from tests.driving import call, padded, same
from tests.families import FAMILIES, family_model, prompt
from tests.models import random_model, tokens
from tests.plain_models import llama

QUICK = ("llama", "gemma2", "phi", "stablelm", "gpt_neox", "glm4", "olmo2", "opt", "gpt2", "cohere")
STEPS = 4
VARIANTS = {
    "a norm behind the residual": ("opt", {"do_layer_norm_before": False}),
    "attention beside the feed-forward part": ("stablelm", {"use_parallel_residual": True}),
    "attention before the feed-forward part": ("gpt_neox", {"use_parallel_residual": False}),
}


def without(layers: str, keep: str = "") -> str:
    return f"policy part():\n    layers {layers}: off\n" + keep


def silenced(model, off):
    """The untouched model, the attention of these layers hooked to give 0."""
    for site in find_sites(model):
        if site.index in off:
            site.attention.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]))
    return model


def logits_of(model, ids, **options):
    """Of the prompt's last token and each decoded one: [steps, vocabulary]."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.cat(out.logits), out


def agrees(make, off, backend="cpu", compile="off"):
    ids = torch.tensor([prompt(14)])
    truth, _ = logits_of(silenced(make(), off), ids)
    model = kvcompile.optimize(make(), without(", ".join(map(str, off))), backend=backend, compile=compile)
    mine, out = logits_of(model, ids)
    same(mine, truth, f"layers {off} off")
    return model, out.past_key_values


@pytest.mark.parametrize("family", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_an_off_layer_is_a_layer_whose_attention_gives_zero(family):
    last = family_model(family).config.num_hidden_layers - 1
    agrees(lambda: family_model(family), (0,))
    agrees(lambda: family_model(family), (last,), backend="reference")


@pytest.mark.parametrize("which", VARIANTS)
def test_layers_of_the_same_class_may_use_their_norms_differently(which):
    family, changes = VARIANTS[which]
    agrees(lambda: family_model(family, **changes), (1,))


def test_no_part_of_an_off_attention_runs():
    model = kvcompile.optimize(random_model(), without("1"), backend="cpu", compile="off")
    layers, ran = model.model.layers, []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            module.register_forward_hook(lambda *_, at=(index, name): ran.append(at))
    model.generate(torch.tensor([tokens(9)]), max_new_tokens=2, do_sample=False)
    names = {index: {name for at, name in ran if at == index} for index in range(3)}
    assert {"self_attn.q_proj", "self_attn.o_proj", "input_layernorm"} <= names[0] == names[2]
    assert not {name for name in names[1] if "proj" in name and "mlp" not in name}
    assert {"mlp.down_proj", "post_attention_layernorm"} <= names[1]
    assert layers[1].input_layernorm(hidden := torch.ones(1, 2, 128)) is hidden


def test_graphs_of_off_layers_have_no_projection_and_no_anchor():
    model, _ = agrees(random_model, (1,), compile="eager")
    records = optimized(model).forward.engine.layers.records
    assert {(r.phase, r.anchors) for r in records} == {(p, n) for p in ("prefill.end", "step") for n in (0, 1)}
    for record in records:
        assert ("q_proj" in record.before) == ("o_proj" in record.before) == bool(record.anchors)
        assert "down_proj" in record.before


@pytest.mark.parametrize("compile", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_p5_no_graph_breaks_and_none_is_made_anew(compile):
    model = kvcompile.optimize(random_model(), without("0, 2"), backend="cpu", compile=compile)
    for seed, length in enumerate((5, 30, 17)):
        model.generate(torch.tensor([tokens(length, seed=seed)]), max_new_tokens=6, do_sample=False)
    said = kvcompile.report(model).to_dict()
    assert said["graph_breaks"] == said["recompiles"] == 0
    assert len(optimized(model).forward.engine.layers.records) == 4  # two kinds of layer, two phases


def test_an_off_layer_holds_nothing_and_counts_nothing():
    full = logits_of(kvcompile.optimize(random_model(), "keep_all", backend="cpu"), torch.tensor([prompt(14)]))[1]
    full = full.past_key_values
    model, cache = agrees(random_model, (1,))
    assert [len(p) for p in cache.positions(1)] == [0, 0]
    assert cache.stats()["lengths"] == [[17, 17], [0, 0], [17, 17]]
    assert cache.nbytes() * 3 == full.nbytes() * 2
    assert cache.store.pools[1].nbytes == 0
    assert [pool.slots for pool in cache.store.pools[::2]] == [pool.slots for pool in full.store.pools[::2]]
    said = kvcompile.report(model).to_dict()
    assert said["footprint"] == pytest.approx(2 / 3) == said["peak"] == said["kept"]
    assert cache.stats()["footprint_by_head"] == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert said["evictions"] == 0


def test_what_explain_says_is_what_is_measured():
    text = without("1", "    keep sink(2) | recent(5)\n    at prefill.end\n")
    model = random_model()
    told = kvcompile.explain(text, model, prompt=14, generate=STEPS - 1).to_dict()
    logits_of(kvcompile.optimize(model, text, backend="cpu", compile="off"), torch.tensor([prompt(14)]))
    said = kvcompile.report(model).to_dict()
    assert (told["footprint"], told["peak"]) == (pytest.approx(said["footprint"]), pytest.approx(said["peak"]))
    assert (told["bytes"], told["off"]) == (said["bytes_resident"], [1])
    assert said["bytes_peak"] <= told["bytes_peak"]


def test_the_ring_of_newest_queries_has_no_line_for_an_off_layer():
    text = without("1", "    keep recent(4) | top(4) by sum[q in last(4)] attn\n    at prefill.end\n")
    model = kvcompile.optimize(random_model(), text, backend="cpu", compile="off")
    cache = call(model, torch.tensor([tokens(12)]))[1]
    assert cache.store.ring.shape[:2] == (2, 1)
    assert [len(p) for p in cache.positions(0)] == [8, 8]


def test_pages_are_reserved_for_layers_that_run_alone():
    stores = []
    for off in ("1", "0..1"):
        plan = optimized(kvcompile.optimize(random_model(), without(off), backend="reference")).compiled.plan
        store = PagedStore(plan, 2, torch.float32, torch.device("cpu"))
        for layer in range(3):
            store.reserve(layer, [40] * 4)
        store.commit()
        store.reserve_more([100, 3])
        store.reserve_step(torch.tensor([True, True]))
        stores.append(store)
    assert stores[0].free.shape[0] == 2 * stores[1].free.shape[0]


REGIONS = "    keep sink(2) | recent(5)\n    at chunk(6), step\n"
STATES = """    state acc = 0
    on attend: acc += sum[q] attn
    keep recent(3) | top(4) by acc
    at prefill.end, step
"""


@pytest.mark.parametrize("way", ["extents", "pages", "graphs"])
@pytest.mark.parametrize("keep", [REGIONS, STATES], ids=["regions", "states"])
def test_other_layers_evict_as_they_would(keep, way):
    runs = []
    for text, model, compile in (
        (f"policy part():\n{keep}", silenced(random_model(), (1,)), "off"),  # graphs would leave hooks out
        (without("1", keep), random_model(), "eager" if way == "graphs" else "off"),
    ):
        kvcompile.optimize(model, text, backend="reference" if way == "pages" else "cpu", compile=compile)
        model.forward.engine.paged = way == "pages"
        logits, out = logits_of(model, torch.tensor([tokens(15)]))
        runs.append((logits, out.past_key_values))
    (truth, theirs), (mine, cache) = runs
    same(mine, truth, way)
    for layer in (0, 2):
        assert [p.tolist() for p in cache.positions(layer)] == [p.tolist() for p in theirs.positions(layer)]
    assert not any(len(p) for p in cache.positions(1))


def test_layers_that_compete_share_what_the_layers_that_run_have():
    keep = "    keep top(5) by norm(k) per head across layers\n    at prefill.end\n"
    model = kvcompile.optimize(random_model(), without("1", keep), backend="cpu", compile="off")
    cache = call(model, torch.tensor([tokens(20)]))[1]
    held = [[len(p) for p in cache.positions(layer)] for layer in range(3)]
    assert held[1] == [0, 0]
    assert [sum(head) for head in zip(*held, strict=True)] == [10, 10]


def test_padded_batches_and_moved_sequences_are_what_each_is_alone(tmp_path):
    model = kvcompile.optimize(random_model(), without("0", REGIONS), backend="cpu", compile="off")
    texts = [tokens(13, seed=1), tokens(8, seed=2)]
    ids, mask = padded(texts, "left")
    seen, cache = call(model, ids, mask=mask)
    for b, text in enumerate(texts):
        alone, single = call(model, torch.tensor([text]))
        same(seen.logits[b, -1], alone.logits[0, -1], "prompt")
        cache_of = copy.deepcopy(cache)
        cache_of.select([b])
        kvcompile.save_cache(model, KvCache.join([cache_of, single]), tmp_path / "two")
        both = kvcompile.load_cache(model, tmp_path / "two")
        step, _ = call(model, torch.tensor([[9], [9]]), both)
        same(step.logits[0], step.logits[1], "step")
        assert step.kept[0] == step.kept[1] and step.kept[0][0] == ((), ())


def test_tokens_can_be_taken_back():
    model = kvcompile.optimize(random_model(), without("2"), backend="cpu", compile="off")
    cache = call(model, torch.tensor([tokens(11)]))[1]
    truth, _ = call(model, torch.tensor([[7]]), cache.clone())
    call(model, torch.tensor([[5]]), cache)
    cache.crop(-1)
    same(call(model, torch.tensor([[7]]), cache)[0].logits, truth.logits, "cropped")


@pytest.mark.parametrize("policy", ["layers 1: off", 'attend span("self")'])
def test_a_plain_pytorch_model_is_refused(policy):
    with pytest.raises(kvcompile.KvCompileError, match="transformers model"):
        kvcompile.optimize(llama(layers=2), f"policy part():\n    {policy}\n", backend="cpu", positions="positions")


def test_restore_brings_everything_back():
    model, ids = random_model(), torch.tensor([tokens(10)])
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    for _ in range(2):
        kvcompile.optimize(model, without("0..1"), backend="cpu")
        assert [name for name, _ in model.named_parameters()] == names
        assert not torch.equal(model(ids).logits, before)
    kvcompile.optimize(model, "keep_all", backend="cpu", compile="off")
    same(model(ids).logits, before, "another policy")
    kvcompile.restore(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, before)


def test_a_forward_of_someone_elses_stays_where_it_was():
    model = random_model()
    attention = model.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = theirs = lambda *args, **kwargs: plain(*args, **kwargs)
    with kvcompile.use(model, without("1"), backend="cpu"):
        assert attention.forward is not theirs
    assert attention.forward is theirs


def test_a_layer_of_unknown_make_is_refused_by_name():
    model = random_model()
    Odd = type("OddDecoderLayer", (type(model.model.layers[1]),), {})
    model.model.layers[1].__class__ = Odd
    with pytest.raises(kvcompile.KvCompileError, match="layer 1 cannot be off: what of a OddDecoderLayer"):
        kvcompile.optimize(model, without("1"), backend="cpu")
    assert "_kvcompile" not in vars(model)
    kvcompile.optimize(model, without("2"), backend="cpu", compile="off")


def test_a_model_without_any_attention_is_refused():
    with pytest.raises(kvcompile.KvCompileError, match="every layer is off"):
        refuse_off(find_sites(random_model()), (0, 1, 2))
