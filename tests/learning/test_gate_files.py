"""Files of trained gates: they come back as they were, and what does not fit is refused with file and reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvcompile.dsl.diagnostics import PolicyError
from kvcompile.gate_files import gate_bytes
from kvcompile.kernels.expr import Expr
from kvcompile.kernels.gates import OWN, gate_of
from kvcompile.kernels.plan import ClassPlan, ModelFacts, PolicyPlan, ReadPlan, ReadRule
from kvcompile.kernels.terms import Region, Selection, UnitPlan
from kvcompile.passes.masks import PROVENANCE
from kvcompile.passes.trained_gates import Trained, check_gates, gates_in
from kvcompile.weights import load_weights

FACTS = ModelFacts(3, 4, 2, 8)
TRAINED = Trained(4, 0, "pooled", "raw.k", ("max", "mean"))
CPU = torch.device("cpu")


def plan_of(fns: tuple[str, ...] = ("max", "mean"), field: str = "raw.k", size: int = 4, stride: int = 0) -> PolicyPlan:
    """Layers 1 and 2 read by a gate, the first two heads of it."""
    marks = tuple((fn, Expr("reduce", (Expr("field", (), field, "id"),), (fn, "i"), "ud")) for fn in dict.fromkeys(fns))
    unit = UnitPlan("block", size, 0, marks, stride)
    named = (Expr("landmark", (), ("block", fn), "ud") for fn in fns)
    score = Expr("learned", (Expr("queries", (), OWN, "gqd"), *named), "live", "gu")
    term = Selection("top", Expr("reduce", (score,), ("softmax", "u"), "gu"), 0, whole="block")
    every = ClassPlan("all", (Region("all"),), ())
    return PolicyPlan(
        "test", "0" * 16, FACTS, (every,), ((0, 0),) * 3, units=(unit,), reads=(ReadPlan("all", (ReadRule((term,)),)),),
        read_of=((-1, -1), (0, 0), (0, -1)),
    )  # fmt: skip


def tensors(width: int = 6, joined: bool = False, layers: tuple[int, ...] = (1, 2), marks: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q = (2, 16, width) if joined else (4, 8, width)
    out = {"rope": torch.rand(width // 2, generator=generator)}
    for layer in layers:
        out[f"layers.{layer}.q"] = torch.randn(*q, generator=generator)
        out[f"layers.{layer}.k"] = torch.randn(2, 8 * marks, width, generator=generator)
    return out


def written(folder: Path, weights: dict[str, Any] | None = None, trained: Trained = TRAINED, **told: Any) -> Path:
    path = folder / "gates.safetensors"
    path.write_bytes(gate_bytes(tensors() if weights is None else weights, trained, {"model": "other/model", **told}))
    return path


def load(path: Path, plan: PolicyPlan | None = None) -> dict[str, torch.Tensor]:
    return load_weights(plan or plan_of(), {"live": path}, CPU)


def refused(path: Path, plan: PolicyPlan | None = None) -> tuple[str, str]:
    with pytest.raises(PolicyError) as caught:
        load(path, plan)
    (found,) = caught.value.diagnostics
    assert path.name in str(found) and "hint:" in str(found)
    return found.code, found.message


@pytest.mark.parametrize("joined", [False, True])
def test_gates_come_back_as_they_were_saved(tmp_path: Path, joined: bool) -> None:
    given = tensors(joined=joined)
    found = load(written(tmp_path, given))
    assert set(found) == {f"live:{name}" for name in given} | {"live:pooled", "live:raw"}
    assert all(torch.equal(found[f"live:{name}"], tensor) for name, tensor in given.items())
    assert gate_of(found, "live", 2).joins(FACTS.group, FACTS.head_dim) is joined
    assert gates_in(plan_of())["live"][1] == {1, 2}


def test_equal_gates_are_equal_files(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    assert written(tmp_path, dict(reversed(tensors().items()))).read_bytes() == data


def test_gates_may_have_norms_no_rotation_no_map_of_queries_and_more_layers(tmp_path: Path) -> None:
    given = {f"layers.{layer}.k": torch.randn(4, 16, 8) for layer in range(3)}
    given |= {"layers.1.k_norm": torch.ones(8), "layers.2.q_norm": torch.ones(8)}
    found = load(written(tmp_path, given, replace(TRAINED, queries="each", keys="k")), plan_of(field="k"))
    assert set(found) == {f"live:{name}" for name in given}


def changed(name: str, value: Any) -> dict[str, Any]:
    found = tensors()
    if value is None:
        del found[name]
    else:
        found[name] = value
    return found


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (changed("layers.1.k", None), "`layers.1.k` is missing"),
        (changed("layers.2.q", torch.zeros(5, 8, 6)), r"`layers.2.q` is F32 [5, 8, 6] where [4, 8, 6] floats"),
        (changed("layers.2.k", torch.zeros(2, 24, 6)), r"`layers.2.k` is F32 [2, 24, 6] where [2, 16, 6] floats"),
        (changed("layers.2.k", torch.zeros(2, 16, 4)), r"where [2, 16, 6] floats"),
        (changed("layers.1.k", torch.zeros(16, 6)), "width 0"),
        (changed("rope", torch.zeros(2)), r"`rope` is F32 [2] where [3] floats"),
        (changed("layers.2.q", None), "`layers.2.q` is missing, and the width 6 is not the heads' 8"),
        (changed("layers.1.q", torch.full((4, 8, 6), float("nan"))), "`layers.1.q` holds NaN"),
        (changed("layers.7.q", torch.zeros(4, 8, 6)), "there is `layers.7.q`, which no layer of this model reads"),
        (changed("layers.0.q", torch.zeros(4, 8, 6)), "there is `layers.0.q`"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, weights: dict[str, Any], reason: str) -> None:
    code, message = refused(written(tmp_path, weights))
    assert code == "K616" and reason in message


def test_what_gates_were_trained_on_must_be_what_the_policy_says(tmp_path: Path) -> None:
    path = written(tmp_path)
    for plan, reason in (
        (plan_of(size=8), "trained on units of 4 tokens, the policy has units of 8 tokens (trained on other/model)"),
        (plan_of(field="k"), "trained on landmarks of `raw.k`, the policy has landmarks of `k`"),
        (plan_of(fns=("mean", "max")), "trained on landmarks max, mean, the policy has landmarks mean, max"),
        (plan_of(stride=2), "units of `block` overlap"),
        (replace(plan_of(), compact=True), "`positions compact`"),
    ):
        code, message = refused(path, plan)
        assert code == "K616" and reason in message
        with pytest.raises(PolicyError) as by_header:
            check_gates(plan, {"live": path})
        assert by_header.value.diagnostics[0].message == message
    check_gates(plan_of(), {"live": path})


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "does not say what its gates were trained on"),
        ("{", "does not say"),
        ("[" * 100_000, "does not say"),
        ('{"format": "kvcompile head scores"}', "does not say"),
        ({"version": 2}, "version is 2"),
        ({"unit": "4"}, "odd ones"),
        ({"unit": True}, "odd ones"),
        ({"offset": -1}, "odd ones"),
        ({"queries": "some"}, "odd ones"),
        ({"keys": ["k"]}, "odd ones"),
        ({"landmarks": []}, "odd ones"),
        ({"landmarks": ["max"] * 99}, "odd ones"),
        ({"landmarks": [{}]}, "odd ones"),
    ],
)
def test_metadata_that_is_missing_or_odd_is_refused(tmp_path: Path, told: Any, reason: str) -> None:
    path = written(tmp_path)
    if isinstance(told, dict):
        header = path.read_bytes()
        size = int.from_bytes(header[:8], "little")
        about = json.loads(json.loads(header[8 : 8 + size])["__metadata__"][PROVENANCE])
        told = json.dumps({**about, **told})
    save_file(tensors(), path, None if told is None else {PROVENANCE: told})
    code, message = refused(path)
    assert code == "K616" and reason in message


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    assert refused(path)[0] == "K615"
    path.write_bytes(b"\xff" * 100)
    assert refused(path)[0] == "K615"
    path.unlink()
    path.mkdir()
    assert refused(path)[0] == "K615"
