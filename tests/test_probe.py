"""Head probes: scores equal to plain loops over captured attention, and models that are left as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import kvcompile
from kvcompile import probe
from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.sites import find_sites
from kvcompile.probe import run_probes
from tests.models import FAMILIES, random_model

TOKENS = 9
ECHO = {"echo": ("echo", TOKENS)}


def captured(model, ids: list[int]) -> list[Tensor]:
    """Attention of each layer, [query heads, n, n], as transformers computes it eagerly."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [a[0] for a in model(torch.tensor([ids]), output_attentions=True).attentions]


def by_loops(attention: list[Tensor], kv_heads: int, tokens: int) -> dict[str, list[list[float]]]:
    out: dict[str, list[list[float]]] = {"echo": [], "induction": []}
    for layer in attention:
        queries = range(tokens, 4 * tokens)
        for kind, shift in (("echo", 0), ("induction", 1)):
            heads = [sum(float(a[t, t - tokens + shift]) for t in queries) / len(queries) for a in layer]
            group = len(heads) // kv_heads
            out[kind].append([max(heads[h * group : (h + 1) * group]) for h in range(kv_heads)])
    return out


@pytest.mark.parametrize("wide", [1 << 24, 3000, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_loops(family: str, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WIDE", wide)
    model = random_model(family)
    found = run_probes(model, find_sites(model), {"echo": ("echo", TOKENS), "induction": ("induction", TOKENS)})
    ids = probe.random_tokens(model, TOKENS).tolist() * 4
    assert len(set(ids)) == TOKENS
    truth = by_loops(captured(random_model(family), ids), model.config.num_key_value_heads, TOKENS)
    for kind, scores in truth.items():
        assert torch.allclose(torch.tensor(found[kind]), torch.tensor(scores), atol=1e-5), kind


def test_tokens_are_random_but_always_the_same_and_none_is_special() -> None:
    model = random_model()
    ids = probe.random_tokens(model, 600)
    assert torch.equal(ids, probe.random_tokens(model, 600))
    assert not {0, 1} & set(ids.tolist())  # pad, begin
    assert len(set(ids.tolist())) == 254  # every other token of the vocabulary
    assert ids[:254].tolist() != sorted(ids[:254].tolist())


def test_the_prompt_fits_the_model() -> None:
    model = random_model(max_position_embeddings=40)
    assert probe._length(model, None) == 10
    assert probe._length(model, 6) == 6
    assert probe._length(random_model(max_position_embeddings=1 << 17), None) == 2500
    with pytest.raises(KvCompileError, match="2 tokens or more"):
        probe._length(random_model(max_position_embeddings=7), None)
    found = run_probes(model, find_sites(model), {"echo": ("echo", None), "echo:500": ("echo", 500)})
    assert found["echo"] == found["echo:500"]


@pytest.mark.parametrize("shared", [True, False])
def test_the_model_is_left_as_it_was(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(), torch.tensor([[5, 6, 7, 8]])
    config = model.config
    other = type(model)(config).eval() if shared else None
    with torch.no_grad():
        before = model(ids).logits
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    run_probes(model, find_sites(model), ECHO)
    assert model.config is config and config._attn_implementation == "sdpa"
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
        if other is not None:
            other(ids)

    def broken(*args: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(probe._Record, "note", broken)
    with pytest.raises(RuntimeError, match="stop"):
        run_probes(model, find_sites(model), ECHO)
    assert model.config is config and config._attn_implementation == "sdpa"


FAR = """
heads far = probe("induction", top=50%, tokens=9) | probe("echo", top=20%, tokens=9)

policy far_only():
    far: keep all
    rest: keep sink(1) | recent(2)
    at prefill.end, step
"""


def test_a_policy_keeps_all_on_the_heads_that_its_probes_find() -> None:
    model, plain = random_model(), random_model()
    found = by_loops(captured(plain, probe.random_tokens(plain, TOKENS).tolist() * 4), 2, TOKENS)
    far: set[tuple[int, int]] = set()
    for kind, number in (("induction", 3), ("echo", 1)):  # of 3 layers with 2 KV heads, truncated
        order = sorted((-score, layer, head) for layer, row in enumerate(found[kind]) for head, score in enumerate(row))
        far |= {(layer, head) for _, layer, head in order[:number]}
    kvcompile.optimize(model, FAR, compile="off")
    with torch.no_grad():
        cache = model(torch.tensor([list(range(5, 25))])).past_key_values
    for layer in range(3):
        for head, positions in enumerate(cache.positions(layer)):
            assert positions.tolist() == (list(range(20)) if (layer, head) in far else [0, 18, 19])


def test_a_policy_with_mistakes_or_without_probes_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("probed")

    monkeypatch.setattr("kvcompile.building.run_probes", never)
    model = random_model()
    kvcompile.optimize(model, "streaming", compile="off")
    with pytest.raises(kvcompile.PolicyError):
        kvcompile.optimize(model, FAR.replace("recent(2)", "resent(2)"), compile="off")
    with pytest.raises(AssertionError, match="probed"):
        kvcompile.optimize(model, FAR, compile="off")


def test_an_optimised_model_is_measured_without_its_policy() -> None:
    model = random_model()
    plain = run_probes(model, find_sites(model), ECHO)
    kvcompile.optimize(model, "streaming", n_sink=1, window=2, compile="off")
    config, ids = copy.deepcopy(model.config), torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        before = model(ids).past_key_values.positions(0)
    assert run_probes(model, find_sites(model), ECHO) == plain
    assert model.config.to_dict() == config.to_dict()
    with torch.no_grad():
        after = model(ids).past_key_values.positions(0)
    assert [p.tolist() for p in after] == [p.tolist() for p in before] == [[0, 4, 5]] * 2
