"""P1, P2, P3, P5, P8 of the systems that choose what queries read, each from its policy file.

Truth is tests/oracle_reads.py, and of trained gates tests/oracle_gates.py: the published sets as plain loops.
"""

from dataclasses import replace

import pytest
import torch

import kvcompile
from kvcompile.dsl import library
from tests import oracle_gates as trained
from tests import oracle_policies as rules
from tests import oracle_reads as reads
from tests.driving import BACKENDS, call, drive, one_by_one, padded, same
from tests.following import policy
from tests.models import random_model, tokens
from tests.oracle import Oracle
from tests.reading import BLOCK_GATES, CASES, LIBRARY, NEAR_READ, QUERY_GATES, TEXTS, TURNS, Case, agrees, some

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, [n for n in LIBRARY if n != "llmdrop"], BACKENDS))
def test_p1_reads_of_the_library_equal_the_oracle(name, backend):
    agrees(LIBRARY[name], backend)


@pytest.mark.parametrize(("text", "backend"), some(TEXTS, TEXTS, ["reference"]))
def test_p1_reads_of_texts_equal_the_oracle(text, backend):
    agrees(TEXTS[text], backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama128", "qwen64", "qwen128"])
@pytest.mark.parametrize("name", [n for n in CASES if n != "llmdrop" and "tidal" not in n])
def test_p1_reads_of_other_models_equal_the_oracle(name, family, backend):
    agrees(CASES[name], backend, family=family)


@pytest.mark.parametrize(("name", "backend"), some(["infllm_v2"]))
def test_p1_of_reads_beyond_a_window_of_2048(name, backend):
    """Choices begin where the library's sink and window leave a block out: after 2048 + 64 tokens."""
    case = replace(LIBRARY[name], changes={"num_hidden_layers": 1, "hidden_size": 64})
    agrees(case, backend, first=2200, steps=3)


LONG = {
    "powerattention": ({"size": 16, "n_sink": 5, "window": 40}, reads.PowerAttention(size=16, sink=5, window=40)),
    "sparse_transformer": ({"size": 32}, reads.Fixed(size=32, start=1)),
    "quest": ({"page": 16, "budget": 64}, reads.Quest(page=16, budget=64)),
    "moba": ({"size": 32, "n": 3}, reads.MoBA(size=32, n=3)),
    "seerattention": ({"size": 16, "tau": 0.05}, reads.Seer(size=16, tau=0.05), reads.Dense()),
    "seerattention_r": ({"size": 16, "budget": 64}, reads.SeerR(size=16, budget=64)),
    "seerattention_gated": (
        {"size": 16, "tau": 0.05},
        trained.Threshold(gates=replace(BLOCK_GATES, size=16), tau=0.05),
        reads.Dense(),
    ),
    "seerattention_r_gated": ({"size": 16, "budget": 64}, trained.Best(gates=replace(QUERY_GATES, size=16), budget=64)),
}


@pytest.mark.parametrize(("name", "backend"), some(LONG, ["moba"]))
def test_p1_reads_of_a_prompt_of_many_tiles_equal_the_oracle(name, backend):
    """300 tokens, of pages as large as published ones nearly are: more than a tile of queries, keys or units."""
    params, *readings = LONG[name]
    first = 2 if name == "quest" else 0
    layers = {"num_hidden_layers": 3 if name == "quest" else 1}
    gates = getattr(readings[0], "gates", None)
    case = Case(name, lambda: reads.in_layers(first, *readings), params, changes=layers, gates=gates)
    agrees(case, backend, first=300, steps=20)


def batch(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """Three prompts and four steps for each, in which no choice is a near tie."""
    for seed in range(0, 600, 100):
        prompts = [tokens(n, seed=seed + n) for n in (case.prompt - 8, 8, 17)]
        steps = [tokens(4, seed=seed + b) for b in range(3)]
        truths = [case.oracle() for _ in prompts]
        for truth, prompt, mine in zip(truths, prompts, steps, strict=True):
            truth.run(prompt, mine)
        if min(truth.closest for truth in truths) > NEAR_READ:
            return prompts, steps
    raise AssertionError("a near tie, whatever the tokens")


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["quest", "moba"]))
def test_p2_reads_of_a_padded_batch_are_those_of_each_alone(name, backend):
    case = LIBRARY[name]
    prompts, steps = batch(case)
    model = case.optimized(backend)
    alone = [drive(model, prompt, *one_by_one(mine)) for prompt, mine in zip(prompts, steps, strict=True)]
    ids, mask = padded(prompts, "left")
    found, cache = call(model, ids, mask=mask)
    for step in range(5):
        for b in range(3):
            logits = found.logits[b, mask[b].bool()] if step == 0 else found.logits[b]
            same(logits, alone[b][step].logits[0], f"row {b}, call {step}")
        if step < 4:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            found, cache = call(model, torch.tensor([[mine[step]] for mine in steps]), cache, mask)


ALONE = [
    "powerattention",
    "sparse_transformer",
    "bigbird",
    "quest",
    "tidal",
    "moba",
    "infllm_v2",
    "seerattention",
    "seerattention_r",
    "seerattention_gated",
    "seerattention_r_gated",
]


@pytest.mark.parametrize(("name", "backend"), some(ALONE, ["moba"]))
def test_p3_the_cut_of_a_prompt_matters_to_no_query_that_chooses_alone(name, backend):
    """Pieces of 5 by a `keep all` that fires with every piece. What fires never or with chunks fires so here, too. A
    gate that pools a block's queries chooses by those of one piece: pieces of whole blocks."""
    case = LIBRARY[name]
    text = library.read(name)
    head = next(line for line in text.splitlines() if line.startswith("policy"))
    body = text.split(head)[1].split("\nlearn ")[0]
    body += "" if "\n    at " in body else "    at chunk, step\n"
    size = 2 * case.gates.size if case.gates is not None and case.gates.pooled else 5
    cut = f"{head}{body}    keep all\n    at chunk({size})\n"
    agrees(replace(case, policy=cut), backend)


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["quest"]))
def test_p5_reads_break_no_graph_and_make_none_anew(name, backend):
    model = LIBRARY[name].optimized(backend, compile="eager")
    for seed, (length, steps) in enumerate(((3, 4), (40, 6), (17, 20), (2, 5), (64, 6))):
        ids = torch.tensor([tokens(length, seed=seed)])
        model.generate(ids, max_new_tokens=steps, do_sample=False)
    said = kvcompile.report(model).to_dict()
    assert said["graph_breaks"] == 0
    assert said["recompiles"] <= 2


@pytest.mark.parametrize(("name", "backend"), some(LIBRARY, ["moba"]))
def test_compiled_reads_are_those_without_a_graph(name, backend):
    whole = drive(LIBRARY[name].optimized(backend), *TURNS[:6])
    graph = drive(LIBRARY[name].optimized(backend, compile="eager"), *TURNS[:6])
    for i, (mine, theirs) in enumerate(zip(graph, whole, strict=True)):
        same(mine.logits[0], theirs.logits[0], f"call {i}")


ATTEND_ALL = {
    "alone": policy("attend all"),
    "at steps": policy("attend all", "at step"),
    "a set with all": policy("attend all | recent(3)", "at chunk, step"),
    "beside regions at chunks": policy("attend all", "at step", "attend all | sink(2)", "at chunk"),
    "of some layers": policy("layers 1..last: attend all", "at step"),
}


@pytest.mark.parametrize(("text", "backend"), some(ATTEND_ALL, ATTEND_ALL))
def test_p8_attend_all_generates_the_tokens_of_the_untouched_model(text, backend):
    prompt = torch.tensor([tokens(33, seed=5), tokens(33, seed=6)])
    theirs = random_model().generate(prompt, **GREEDY)
    model = kvcompile.optimize(random_model(), ATTEND_ALL[text], backend=backend, compile="off")
    assert model.generate(prompt, **GREEDY).tolist() == theirs.tolist()


DENSE = {
    "powerattention": {"window": 4096},
    "bigbird": {},
    "quest": {"page": 4, "budget": 4096},
    "tidal": {"n": 4096},
    "moba": {"size": 4, "n": 4096},
    "infllm_v2": {},
    "sampleattention": {"mass": "100%", "rows": "100%"},
    "seerattention": {"size": 4, "tau": -1},
    "seerattention_r": {"size": 4, "budget": 4096},
    "seerattention_gated": {"size": 4, "tau": -1},
    "seerattention_r_gated": {"size": 4, "budget": 4096},
    "sparse_transformer": {"size": 4096},
    "vertical": {"n": 4096, "observe": 8},
}


@pytest.mark.parametrize(("name", "backend"), some(DENSE, ["quest", "moba"]))
def test_p8_a_budget_as_large_as_the_context_is_dense_attention(name, backend):
    case = replace(LIBRARY[name], params=DENSE[name])
    truth = Oracle(case.model(), rules.KeepAll())
    model = case.optimized(backend)
    for i, (found, turn) in enumerate(zip(drive(model, *TURNS), TURNS, strict=True)):
        off = (found.logits[0] - truth.feed(turn)).abs().max().item()
        assert off <= 1e-5 * max(1.0, found.logits.abs().max().item()), f"call {i}: off by {off:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unit_larger_than_the_prompt_reads_all(backend):
    turns = [tokens(30, seed=7), *one_by_one(tokens(4, seed=8))]
    truth = Oracle(random_model(), rules.KeepAll())
    logits = [truth.feed(turn) for turn in turns]
    for name, size in (("quest", {"page": 64, "budget": 64}), ("moba", {"size": 64, "n": 1})):
        model = kvcompile.optimize(random_model(), name, backend=backend, compile="off", **size)
        for i, found in enumerate(drive(model, *turns)):
            same(found.logits[0], logits[i], f"{name}, call {i}")


def test_reads_keep_every_entry_and_the_footprint_stays_one():
    model = LIBRARY["quest"].optimized("cpu")
    seen = drive(model, *TURNS[:8])
    assert all(p == tuple(range(44)) for layer in seen[-1].kept[0] for p in layer)
    told = kvcompile.report(model).to_dict()
    assert told["footprint"] == 1.0
    assert told["evictions"] == 0
