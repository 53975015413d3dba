"""The graph behind `export --to torch`, and the command without torch-mlir: neither needs it installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvcompile
from kvcompile import exporting
from kvcompile.cli import main
from kvcompile.exporting_graph import layer_graphs
from tests.models import random_model, tokens

RECALL = str(Path(__file__).parents[1] / "examples" / "recall_model")
MASK = "1\t0\n0\t1\n0\t0\n"


def operators(graph: torch.fx.Graph) -> list[str]:
    return [n.target.__name__ for n in graph.nodes if n.op == "call_function" and n.target.namespace == "kvc"]


@pytest.mark.parametrize(
    ("policy", "phase", "expected"),
    [
        ("keep_all", "step", [["attend_step_v1.default"]]),
        ("tova", "step", [["attend_step_v1.default"], ["evict_step_v1.default"]]),
        ("tova", "prefill", [["attend_prefill_v1.default", "evict_prefill_v1.default"]]),
        ("keep_all", "prefill", [["attend_prefill_v1.default", "insert_v1.default"]]),
    ],
)
def test_the_layer_holds_what_the_graph_pass_puts_there(policy, phase, expected):
    _, graphs = layer_graphs(random_model(), policy, 1, phase, 12, {})
    assert [operators(graph.graph) for graph in graphs] == expected
    for graph in graphs:
        placeholders = graph.graph.find_nodes(op="placeholder")
        assert [tuple(node.meta["val"].shape) for node in placeholders] == [port.shape for port in graph.inputs]
        assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")


def test_each_head_class_evicts_on_its_own(tmp_path):
    (tmp_path / "mask.tsv").write_text(MASK)
    tables = {"retrieval": str(tmp_path / "mask.tsv")}
    options = {"tables": tables, "n_sink": 2, "window": 4, "c": 64}
    _, (graph,) = layer_graphs(random_model(), "prulong", 0, "prefill", 12, options)
    assert operators(graph.graph) == ["attend_prefill_v1.default", "insert_v1.default", "evict_prefill_v1.default"]


def test_the_traced_layer_says_what_it_takes():
    _, (graph, _) = layer_graphs(random_model(), "h2o", 1, "step", 12, {})
    names = [port.name for port in graph.inputs]
    assert {"self_attn.q_proj.weight", "hidden_states", "position_embeddings.0", "store.clock"} <= set(names)
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]


def test_the_model_is_left_as_it_was():
    model = random_model()
    ids = torch.tensor([tokens(12)])
    before = model(ids).logits
    layer_graphs(model, "tova", 0, "step", 12, {"budget": 4})
    assert torch.equal(model(ids).logits, before) and "forward" not in vars(model)
    kvcompile.optimize(model, "streaming", window=4)
    layer_graphs(model, "tova", 0, "step", 12, {"budget": 4})
    assert kvcompile.inspect(model).plan.name == "streaming"


def test_without_torch_mlir_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    assert main(["export", "tova", "--model", RECALL]) == 1
    assert "pip install 'kvcompile[mlir]'" in capsys.readouterr().err
