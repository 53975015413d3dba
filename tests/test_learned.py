"""Trained scores: files that do not fit are refused with their place, and scores reach the policy."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AttentionInterface

import kvcompile
from kvcompile.dsl.diagnostics import PolicyError
from kvcompile.kernels.plan import ClassPlan, Expr, ModelFacts, PolicyPlan, QuerySource, Region, StatePlan, Update
from kvcompile.passes import trained_gates
from kvcompile.weights import load_weights
from tests.models import random_model, tokens

FACTS = ModelFacts(2, 4, 2, 8)
QUERIES, KEYS, VALUES = Expr("queries", (), QuerySource("last", 1)), Expr("field", (), "k"), Expr("field", (), "v")
SCORE = Expr("learned", (QUERIES, KEYS, VALUES), "cis")
CPU = torch.device("cpu")
IN, HIDDEN = (4 + 2 + 2) * 8, 5


def plan_of(init: Expr = SCORE, updates: tuple[Update, ...] = ()) -> PolicyPlan:
    every = ClassPlan("all", (Region("all"),), ())
    return PolicyPlan(
        "test", "0" * 16, FACTS, (every,), ((0, 0),) * 2, states=(StatePlan("s", init, None),), updates=updates
    )


def tensors_of(width: int = IN, layers: int = 2) -> dict[str, torch.Tensor]:
    shapes = {"w1": (HIDDEN, width), "b1": (HIDDEN,), "w2": (2, HIDDEN), "b2": (2,)}
    generator = torch.Generator().manual_seed(1)
    return {
        f"layers.{layer}.{n}": torch.randn(*s, generator=generator)
        for layer in range(layers)
        for n, s in shapes.items()
    }


def load(path: Path, plan: PolicyPlan | None = None) -> dict[str, torch.Tensor]:
    return load_weights(plan or plan_of(), {"cis": path}, CPU)


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "cis.safetensors")
    return folder / "cis.safetensors"


def refused(path: Path, plan: PolicyPlan | None = None) -> tuple[str, str]:
    """(code, message) of the one finding; its text names the file and says a way out."""
    with pytest.raises(PolicyError) as caught:
        load(path, plan)
    (found,) = caught.value.diagnostics
    assert path.name in str(found) and "hint:" in str(found)
    return found.code, found.message


def catch(module, query, key, value, attention_mask, scaling=None, caught=None, **kwargs):
    """An attention that notes what it is given."""
    caught.append((query[0], key[0], value[0]))
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (key, value))
    read = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    return read.transpose(1, 2), None


AttentionInterface.register("test_catch", catch)

TRAINED = """
policy trained(budget=9, c=100):
    state cis = learned("{}", q, v)
    keep recent(3) | top(budget - 3) by cis per head
    at chunk(c), step
"""


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("given", [True, False])
def test_a_policy_keeps_what_its_trained_heads_want(tmp_path: Path, backend: str, given: bool) -> None:
    """The file is named by the caller or by the policy, whose folder its path counts from."""
    plain, model, ids = random_model(), random_model(), torch.tensor([tokens(30)])
    plain.set_attn_implementation("test_catch")
    caught: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        plain(ids, caught=caught)
    width = (4 + 2) * 64
    weights = {name: t / 8 for name, t in tensors_of(width, layers=3).items()}
    path = saved(tmp_path, weights)
    policy = tmp_path / "trained.kvp"
    policy.write_text(TRAINED.format("elsewhere.safetensors" if given else path.name))
    tables = {"cis": str(path)} if given else None
    kvcompile.optimize(model, str(policy), backend=backend, compile="off", tables=tables)
    with torch.no_grad():
        cache = model(ids).past_key_values
        for layer, (q, _, v) in enumerate(caught):
            w1, b1, w2, b2 = (weights[f"layers.{layer}.{name}"] for name in ("w1", "b1", "w2", "b2"))
            scores = []
            for t in range(30):
                inner = w1 @ torch.cat([q[:, t].flatten(), v[:, t].flatten()]) + b1
                scores.append(w2 @ (inner * inner.sigmoid()) + b2)
            for head, kept in enumerate(cache.positions(layer)):
                best = sorted(range(27), key=lambda t: -float(scores[t][head]))[:6]
                assert kept.tolist() == sorted([*best, 27, 28, 29])
        cache = model(torch.tensor([[9]]), past_key_values=cache).past_key_values
    assert all(len(kept) == 9 and kept[-3:].tolist() == [28, 29, 30] for kept in cache.positions(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_come_in_float32_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    given = {name: t.to(dtype) for name, t in tensors_of().items()}
    found = load(saved(tmp_path, given))
    assert set(found) == {f"cis:{name}" for name in given}
    for name, tensor in given.items():
        assert found[f"cis:{name}"].dtype == torch.float32
        assert torch.equal(found[f"cis:{name}"], tensor.float())


def test_biases_may_be_missing_and_hidden_sizes_differ(tmp_path: Path) -> None:
    given = {name: t for name, t in tensors_of().items() if "b" not in name.rsplit(".", 1)[1]}
    given["layers.1.w1"], given["layers.1.w2"] = torch.zeros(9, IN), torch.zeros(2, 9)
    assert set(load(saved(tmp_path, given))) == {f"cis:{name}" for name in given}


def test_only_the_fields_that_are_read_make_the_input(tmp_path: Path) -> None:
    keys_only = plan_of(Expr("const", (), Fraction(0)), (Update("insert", (("s", replace(SCORE, args=(KEYS,))),)),))
    path = saved(tmp_path, tensors_of(width=2 * 8))
    assert len(load(path, keys_only)) == 8
    code, message = refused(path)
    assert code == "K616" and "layers.0.w1" in message


def test_a_policy_without_trained_scores_reads_no_file() -> None:
    assert load_weights(plan_of(Expr("const", (), Fraction(0))), {}, CPU) == {}


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The right tensors with some replaced or, where None, left out; `__` stands for a dot."""
    after = tensors_of() | {name.replace("__", "."): t for name, t in changes.items()}
    return {name: t for name, t in after.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (changed(layers__1__w1=None), "`layers.1.w1` is missing"),
        (changed(layers__0__w2=None), "`layers.0.w2` is missing"),
        (changed(layers__0__w1=torch.zeros(HIDDEN, IN + 1)), "`layers.0.w1` is F32 [5, 65]"),
        (changed(layers__0__w1=torch.zeros(IN)), "`layers.0.w1` is F32 [64]"),
        (changed(layers__0__w1=torch.zeros(())), "`layers.0.w1` is F32 []"),
        (changed(layers__1__w2=torch.zeros(4, HIDDEN)), "`layers.1.w2` is F32 [4, 5]"),
        (changed(layers__1__b1=torch.zeros(HIDDEN + 1)), "`layers.1.b1` is F32 [6]"),
        (changed(layers__1__b2=torch.zeros(2, dtype=torch.int64)), "`layers.1.b2` is I64 [2]"),
        (changed(layers__0__w2=torch.full((2, HIDDEN), torch.nan)), "`layers.0.w2` holds NaN"),
        (changed(layers__0__bias=torch.zeros(2)), "`layers.0.bias`, which no layer"),
        (tensors_of(layers=3), "`layers.2.b1`, which no layer"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    code, message = refused(saved(tmp_path, tensors))
    assert code == "K616" and says in message


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(tmp_path / "none.safetensors") == ("K615", "cannot read the trained scores: there is no such file")
    assert refused(tmp_path)[1].endswith("it is a directory")
    good = saved(tmp_path, tensors_of()).read_bytes()
    for bad in (b"", b"x", b"\xff" * 400, good[: len(good) // 2], good[:8] + b"{" + good[9:40], good[1:]):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(bad)
        assert refused(path)[0] == "K615"
    monkeypatch.setattr(trained_gates, "MAX_WEIGHTS", 100)
    assert "larger than 100 bytes" in refused(saved(tmp_path, tensors_of()))[1]
