"""P1, P2 and P8 for every supported model family: an evicted cache is what the policy means, under the model's own
windows, soft-caps, sinks and scales; batches are what each prompt is alone; `keep all` changes no token.

Truth is tests/oracle_families.py, which computes attention by transformers' own eager code, and the untouched model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvcompile
from kvcompile.passes.facts import model_facts
from tests.driving import BACKENDS, LIBRARY, NEAR_TIE, Sample, Sizes, call, drive, one_by_one, padded, same
from tests.families import FAMILIES, family_model, prompt, without
from tests.oracle_families import FamilyOracle, windows_of

POLICIES = ("keep_all", "snapkv", "h2o", "prulong", "adakv")
PROMPT, STEPS = 26, 4
# A batch shares its rotary angles where they follow from its longest sequence, in the untouched model, too.
SHORT = {"llama_dynamic": {"max_position_embeddings": 512}}


def sample_of(policy: str, name: str) -> Sample:
    """The policy with a small budget; retrieval heads as many as the family has KV heads."""
    facts = model_facts(family_model(name))
    mask = tuple(tuple(int((layer + head) % 2 == 0) for head in range(facts.kv_heads)) for layer in range(facts.layers))
    return LIBRARY[policy](Sizes(budget=12, observe=3, pool=3, chunk=512, sink=2, percent=25, mask=mask))


def options_of(sample: Sample, folder: Path) -> dict[str, object]:
    """Keyword arguments for `optimize`; writes the mask as a table."""
    if sample.mask is None:
        return dict(sample.params)
    path = folder / "mask.tsv"
    path.write_text("\n".join("\t".join(map(str, row)) for row in sample.mask) + "\n")
    return {**sample.params, "tables": {"retrieval": str(path)}}


def optimized(name: str, policy: str, folder: Path, backend: str, **changes: object):
    model, sample = family_model(name, **changes), sample_of(policy, name)
    return kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options_of(sample, folder))


def turns_without_ties(name: str, policy: str) -> tuple[list[list[int]], FamilyOracle, list]:
    """A prompt and forced tokens of which no decision is a matter of rounding, and what the oracle says to them."""
    for seed in range(8):
        turns = [prompt(PROMPT, seed=seed), *one_by_one(prompt(STEPS, seed=90 + seed))]
        truth = FamilyOracle(family_model(name), sample_of(policy, name).rule(), windows_of(name))
        seen = [(truth.feed(turn), truth.kept()) for turn in turns]
        if truth.closest > NEAR_TIE:
            return turns, truth, seen
    raise AssertionError(f"{policy} on {name}: every prompt has a near tie")


def check_p1(name: str, policy: str, backend: str, folder: Path) -> None:
    turns, truth, expected = turns_without_ties(name, policy)
    seen = drive(optimized(name, policy, folder, backend), *turns)
    length = 0
    for turn, found, (logits, kept) in zip(turns, seen, expected, strict=True):
        length += len(turn)
        readable = truth.readable(found.kept[0], length)
        assert readable == truth.readable(kept, length), f"kept after {length} tokens"
        same(found.logits[0], logits, f"{policy} on {name} after {length} tokens")
    if policy != "keep_all":
        assert any(len(head) < length for heads in truth.kept() for head in heads), "nothing was evicted"


def check_p2(name: str, policy: str, backend: str, folder: Path, sides: tuple[str, ...] = ("left", "right")) -> None:
    model = optimized(name, policy, folder, backend, **SHORT.get(name, {}))
    prompts, forced = [prompt(n, seed=20 + n) for n in (25, 7, 16)], [prompt(STEPS, seed=30 + b) for b in range(3)]
    alone = [drive(model, first, *one_by_one(steps)) for first, steps in zip(prompts, forced, strict=True)]
    for side in sides:
        ids, mask = padded(prompts, side)
        found, cache = call(model, ids, mask=mask)
        for b in range(3):
            same(found.logits[b, mask[b].bool()], alone[b][0].logits[0], f"prompt of row {b}, padded on the {side}")
        for step in range(STEPS):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            found, cache = call(model, torch.tensor([[steps[step]] for steps in forced]), cache, mask)
            for b in range(3):
                assert found.kept[b] == alone[b][1 + step].kept[0], f"kept after step {step}, row {b}"
                same(found.logits[b], alone[b][1 + step].logits[0], f"step {step} of row {b}, padded on the {side}")


def check_p8(name: str, backend: str) -> None:
    ids = torch.tensor([prompt(30)])
    untouched = family_model(name).generate(ids, max_new_tokens=12, do_sample=False)
    model = kvcompile.optimize(family_model(name), "keep_all", backend=backend, compile="off")
    assert model.generate(ids, max_new_tokens=12, do_sample=False).tolist() == untouched.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_evicts_as_the_policy_means_alone_and_in_batches_and_keeps_its_tokens(name, tmp_path):
    """The quick form of what the tests below hold for every policy."""
    check_p1(name, "h2o", "reference", tmp_path)
    check_p2(name, "adakv", "reference", tmp_path, sides=("right",))
    check_p8(name, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_p1_a_family_equals_the_oracle(family, policy, backend, tmp_path):
    check_p1(family, policy, backend, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_p2_a_padded_batch_of_a_family_equals_each_prompt_alone(family, policy, backend, tmp_path):
    check_p2(family, policy, backend, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["keep_all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_p8_keep_all_changes_no_token_of_a_family(family, policy, backend):
    check_p8(family, backend)


@pytest.mark.parametrize(("family", "feature"), [(n, f) for n, each in FAMILIES.items() for f in each.features])
def test_each_feature_of_a_family_matters_under_its_weights(family, feature):
    ids = torch.tensor([prompt(PROMPT)])
    with torch.no_grad():
        whole, less = family_model(family)(ids).logits, without(family, feature)(ids).logits
    assert (whole - less).abs().max() > 0.05 * whole.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_of_a_configuration_are_those_of_its_model(name):
    model = family_model(name)
    assert model_facts(model.config) == model_facts(model)
