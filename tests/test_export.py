"""`export` with torch-mlir: linalg that runs and equals the reference, StableHLO, the rewritten layer, files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config

import kvcompile
from kvcompile import KvCompileError
from kvcompile.cli import main
from kvcompile.kernels.decomposed import DecomposedLayer
from kvcompile.passes import compile_policy
from kvcompile.passes.facts import model_facts
from tests.export_cases import LAYER, differences, inputs_of, watched
from tests.export_engine import run
from tests.models import random_model

pytest.importorskip("torch_mlir")
RECALL = str(Path(__file__).parents[1] / "examples" / "recall_model")
PROMPT, STEPS = 20, 3
POLICIES = {
    "keep_all": {},
    "streaming": {"n_sink": 2, "window": 8},
    "knorm": {"budget": 9},
    "snapkv": {"budget": 9, "observe": 3, "pool": 3},
    "h2o": {"heavy": "30% of prompt"},
    "tova": {"budget": 9},
}
CASES = [(policy, "prefill") for policy in POLICIES] + [("streaming", "step"), ("h2o", "step"), ("tova", "step")]


@pytest.mark.parametrize(("policy", "phase"), CASES)
def test_linalg_runs_on_the_cpu_and_equals_the_reference(policy, phase):
    step = watched(policy, phase, PROMPT, STEPS, **POLICIES[policy])
    length = PROMPT + (STEPS if phase == "step" else 0)
    found = kvcompile.export(
        random_model(), policy, to="linalg", layer=LAYER, phase=phase, length=length, **POLICIES[policy]
    )
    layer = DecomposedLayer(step.plan, LAYER, phase, length, step.scale)  # for the ports' counts alone
    assert layer.inputs == found.inputs
    inputs = inputs_of(step, layer, length)
    made = run(found.text, inputs, [torch.zeros(port.shape, dtype=port.dtype) for port in found.outputs])
    errors = differences(step, layer, inputs, made)
    assert errors["kept"] and errors["out"] < 1e-5 and errors["states"] < 1e-5
    assert bool(errors["dropped"]) == (policy != "keep_all")


def test_linalg_of_capped_logits_equals_torch():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma2Config(**sizes, num_hidden_layers=2, vocab_size=64, attn_logit_softcapping=2.0, dtype="float32")
    layer = config.layer_types.index("full_attention")
    plan = compile_policy("h2o", model_facts(config), heavy=5, local=3).plan
    found = kvcompile.export(config, "h2o", to="linalg", layer=layer, length=PROMPT, heavy=5, local=3)
    scale = config.query_pre_attn_scalar**-0.5
    module, dice = DecomposedLayer(plan, layer, "step", PROMPT, scale), torch.Generator().manual_seed(1)
    given = {port.name: torch.randn(port.shape, generator=dice) * 3 for port in found.inputs}
    given |= {"pos": torch.arange(PROMPT).expand(plan.facts.kv_heads, -1), "at": torch.tensor([PROMPT - 1])}
    given["resident"] = torch.ones(plan.facts.kv_heads, PROMPT)
    inputs = [given[port.name].to(port.dtype) for port in found.inputs]
    made, truth = run(found.text, inputs, module(*inputs)), module(*inputs)
    assert plan.facts.softcap and "math.tanh" in found.text
    for a, b in zip(made, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["linalg", "stablehlo"])
def test_a_decomposed_layer_is_tensor_math_alone_and_says_what_it_takes(to):
    config = random_model().config  # no weights
    first, again = (kvcompile.export(config, "h2o", to=to, phase="prefill", length=16) for _ in range(2))
    assert first.text == again.text
    body = "\n".join(line for line in first.text.splitlines() if not line.startswith("//"))
    assert f"{to}." in body and "torch." not in body and "call" not in body
    arguments = re.search(r"func.func @policy_step\((.*?)\) ->", body)[1].split(", %")
    named = re.findall(r"^//   %arg(\d+) (\w+) (\w+)\[([\dx]*)\]", first.text, re.M)
    assert [name for _, name, _, _ in named] == [port.name for port in first.inputs]
    for (number, _, kind, shape), argument in zip(named, arguments, strict=True):
        assert argument.removeprefix("%") == f"arg{number}: tensor<{shape}x{kind}>"


def test_the_rewritten_layer_keeps_its_operators_where_the_graph_pass_put_them():
    model = random_model()
    prefill, step = (kvcompile.export(model, "h2o", layer=1, phase=phase, length=12) for phase in ("prefill", "step"))
    assert kvc(prefill.text) == ["attend_prefill_v1", "observe_v2", "evict_prefill_v1"]
    assert kvc(step.text) == ["attend_step_v1", "evict_step_v1"]
    assert step.text.index("evict_step_v1") > step.text.index("func.func @after_last_layer")
    assert "dense_resource" not in prefill.text + step.text  # weights are arguments
    assert kvcompile.export(model, "h2o", layer=1, phase="step", length=12).text == step.text


def kvc(text: str) -> list[str]:
    return re.findall(r'torch.operator "torch.kvc.(\w+)"', text)


def test_the_rewritten_layer_parses_and_verifies():
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    text = kvcompile.export(random_model(), "snapkv", phase="prefill", length=12, budget=9, observe=3).text
    with ir.Context() as context:
        torch_dialect.register_dialect(context)
        module = ir.Module.parse(text)
        assert module.operation.verify()
        (function,) = module.body
        named = re.findall(r"^//   %arg\d+", text, re.M)
        assert len(function.regions[0].blocks[0].arguments) == len(named)


def test_heads_found_by_a_probe_need_the_weights():
    with pytest.raises(KvCompileError, match="probe, which needs the weights"):
        kvcompile.export(random_model().config, "razor", to="linalg")


def test_the_command_writes_a_file_or_says_everything_as_json(tmp_path, capsys):
    path = tmp_path / "step.mlir"
    asked = ["export", "streaming", "--model", RECALL, "--to", "stablehlo", "--length", "8", "--set", "window=4"]
    assert main([*asked, "--out", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"] == path.read_text() and facts["to"] == "stablehlo"
    assert facts["outputs"][1].startswith("keep i1[4x8]")
    assert main(asked) == 0
    assert capsys.readouterr().out == facts["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--to", "tosa"], 2, "none of torch, linalg, stablehlo"),
        (["--phase", "chunk"], 2, "none of step, prefill"),
        (["--set", "layer=2"], 2, "an option of export"),
        (["--to", "linalg", "--layer", "7"], 1, "the model has layers 0 to 2"),
        (["--out", "/nowhere/at/all"], 1, "--out /nowhere/at/all: cannot write there (No such file"),
        (["--out", "/tmp"], 2, "/tmp is a folder; name a file in it"),
        (["--length", "100000"], 1, "positions"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, code, says, capsys):
    assert main(["export", "tova", "--model", RECALL, *arguments]) == code
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert says in told and "Traceback" not in told


def test_what_does_not_lower_is_refused_by_name(capsys):
    assert main(["export", "keyformer", "--model", RECALL, "--to", "linalg", "--phase", "prefill"]) == 1
    told = capsys.readouterr().err
    assert "policy keyformer, layer 0, phase prefill: no form with fixed shapes for linalg yet: noise" in told
