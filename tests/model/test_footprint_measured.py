"""P6: report() counts the footprint and peak that the oracle counts, and explain() where a policy is static."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvcompile
from tests.driving import BACKENDS, LIBRARY, Sizes, drive, examples, one_by_one, sizes
from tests.models import tokens
from tests.oracle import Oracle

# What these keep follows from lengths alone; of some others only bounds are known before they run.
STATIC = ("keep_all", "streaming", "prulong", "duo", "h2o", "snapkv", "tova", "pyramidkv", "knorm", "keydiff")


def by_head(truth: Oracle) -> list[list[float]]:
    """The footprint of each [layer][KV head], from the entries that stood in its row before each forward."""
    total = sum(f.piece.tokens for f in truth.forwards)
    found = [[0.0] * truth.heads for _ in range(truth.layers)]
    for f in truth.forwards:
        n = f.piece.tokens + f.piece.peeked
        for layer, row in enumerate(f.before):
            for head, past in enumerate(row):
                found[layer][head] += (n * (n + 1) / 2 + n * past) / (total * (total + 1) / 2)
    return found


def numbers(nested: list[list[float]]) -> torch.Tensor:
    return torch.tensor(nested, dtype=torch.float64)


@pytest.mark.parametrize("name", LIBRARY)
@examples(3)
@given(data=st.data())
def test_p6_report_counts_what_the_oracle_counts(name, data, tmp_path_factory):
    backend = data.draw(st.sampled_from(BACKENDS), "backend")
    size = data.draw(sizes(3), "sizes")
    prompt, steps = data.draw(st.integers(2, 48), "prompt"), data.draw(st.integers(0, 12), "steps")
    sample = LIBRARY[name](size)
    options = sample.options(tmp_path_factory.mktemp("mask"))
    truth = Oracle(sample.model(), sample.rule())
    truth.run(tokens(prompt, seed=1), tokens(steps, seed=2))

    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend=backend, compile="off", **options)
    drive(model, tokens(prompt, seed=1), *one_by_one(tokens(steps, seed=2)))
    report = kvcompile.report(model).to_dict()
    assert report["footprint"] == pytest.approx(truth.footprint(), abs=1e-9)
    assert report["peak"] == pytest.approx(truth.peak(), abs=1e-9)
    torch.testing.assert_close(numbers(report["footprint_by_head"]), numbers(by_head(truth)), atol=1e-9, rtol=0)
    lengths = [n for layer in truth.lengths() for n in layer]
    assert report["kept"] == pytest.approx(sum(lengths) / (len(lengths) * (prompt + steps)), abs=1e-9)
    plan = kvcompile.explain(sample.policy, model.config, prompt=prompt, generate=steps, **options).to_dict()
    planned = sum(layer["entries"] for layer in plan["by_layer"])
    assert plan["exact"] or name not in STATIC
    assert plan["footprint"] >= truth.footprint() - 1e-9
    assert plan["peak"] >= truth.peak() - 1e-9
    assert planned >= sum(lengths)
    if plan["exact"]:
        assert plan["footprint"] == pytest.approx(truth.footprint(), abs=1e-9)
        assert plan["peak"] == pytest.approx(truth.peak(), abs=1e-9)
    if plan["exact_entries"]:
        assert planned == sum(lengths)
    for layer, spent in zip(plan["by_layer"], by_head(truth), strict=True):
        mean = sum(spent) / len(spent)
        assert layer["footprint"] >= mean - 1e-9
        assert all(bound >= one - 1e-9 for bound, one in zip(layer["footprint_by_head"], spent, strict=True))
        assert not layer["exact"] or layer["footprint"] == pytest.approx(mean, abs=1e-9)
        assert not layer["exact_by_head"] or layer["footprint_by_head"] == pytest.approx(spent, abs=1e-9)


@pytest.mark.parametrize("name", LIBRARY)
def test_p6_generate_counts_one_forward_less_than_its_new_tokens(name, tmp_path):
    sample = LIBRARY[name](Sizes())
    options = sample.options(tmp_path)
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend="reference", compile="off", **options)
    prompt = tokens(37, seed=3)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, 37:].tolist()
    truth = Oracle(sample.model(), sample.rule())
    truth.run(prompt, made[:-1])
    report = kvcompile.report(model).to_dict()
    assert report["footprint"] == pytest.approx(truth.footprint(), abs=1e-9)
    assert report["peak"] == pytest.approx(truth.peak(), abs=1e-9)
    assert torch.tensor(report["lengths"]).reshape(-1, 2).tolist() == truth.lengths()


def test_the_papers_setting_before_running(tmp_path):
    """Prompt 131072, answer 100, pieces of 32768, sink 128, window 1024, half of 32 x 8 heads local."""
    from transformers import LlamaConfig

    mask = tmp_path / "mask.tsv"
    mask.write_text("\n".join("\t".join("1" if h < 4 else "0" for h in range(8)) for _ in range(32)) + "\n")
    config = LlamaConfig(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, head_dim=128
    )
    plan = kvcompile.explain("prulong", config, prompt=131072, generate=100, tables={"retrieval": str(mask)}).to_dict()
    assert plan["footprint"] == pytest.approx(0.6314007, abs=1e-6)
    assert plan["peak"] == pytest.approx(0.6289147, abs=1e-6)
    assert {name: c["heads"] for name, c in plan["classes"].items()} == {"retrieval": 128, "local": 128}
