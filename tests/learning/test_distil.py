"""Distillation of block gates as a whole: what it finds, that it goes on where it was, that policies read by it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface

import kvcompile
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gates import Gate
from kvcompile.kernels.rotary import rotate
from kvcompile.learning import distil as module
from kvcompile.learning.block_gates import LearnedGates
from kvcompile.learning.data import Sequence
from kvcompile.learning.targets import Text, asked_in, gate_logits, units_of
from kvcompile.passes.facts import model_facts
from kvcompile.passes.learning import DistilPlan, compile_learn
from kvcompile.passes.sites import find_sites
from kvcompile.rotary import RopeTable
from tests.learning.small import small_model
from tests.models import tokens

SIZE = 4
POLICY = """
policy gated(size=4, n=2):
    unit block(size) with hi = max[i] raw.k, c = mean[i] raw.k
    score live = softmax[u] learned("gates.safetensors", q, hi, c)
    attend own block | top(n) blocks by live {scope}
    at chunk, step

learn live for gated:
    gate z = {gate}(width=8) {scope}
    loss attention_kl
    freeze weights
"""
KINDS = [(gate, scope) for gate in ("block_gate", "query_gate") for scope in ("per head", "per query_head")]


def policy(gate: str = "block_gate", scope: str = "per query_head") -> str:
    return POLICY.format(gate=gate, scope=scope)


def texts(count: int = 6) -> list[Sequence]:
    return [Sequence(tokens(50 + 5 * i, seed=i)) for i in range(count)]


def run(text: str | None = None, *, model: Any = None, data: Any = None, **options: Any) -> LearnedGates:
    given = {"steps": 6, "batch": 2, "lr": 0.02, **options}
    found = kvcompile.learn(small_model() if model is None else model, text or policy(), data or texts(), **given)
    assert isinstance(found, LearnedGates)
    return found


# ---------------------------------------------------------------- what it finds


@pytest.mark.parametrize(("gate", "scope"), KINDS)
def test_the_loss_falls_and_more_of_the_best_units_are_found(gate: str, scope: str) -> None:
    history = run(policy(gate, scope), steps=30).history
    assert [entry["step"] for entry in history] == list(range(1, 31))
    assert set(history[0]) == {"step", "loss", "recall", "grad_norm"}
    first, last = (
        {name: sum(h[name] for h in part) / len(part) for name in ("loss", "recall")}
        for part in (history[:3], history[-3:])
    )
    assert last["loss"] < 0.7 * first["loss"] and last["recall"] > first["recall"]


def test_the_figures_are_the_mean_over_all_texts_heads_and_layers() -> None:
    """Two texts a step give the mean of what each gives alone, weighed by its queries, and so do the gradients."""
    data, model = texts(2), small_model()
    together = run(model=model, data=data, steps=1)
    alone = [run(model=model, data=[one], steps=1, batch=1).history[0]["loss"] for one in data]
    units = [(len(one.ids) - 1) // SIZE for one in data]
    mean = sum(n * loss for n, loss in zip(units, alone, strict=True)) / sum(units)
    assert together.history[0]["loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("gate", "scope"), KINDS)
def test_gradients_are_those_of_the_loss_by_finite_differences(gate: str, scope: str) -> None:
    model = small_model()
    plan, sites = compile_learn(policy(gate, scope), model_facts(model)), find_sites(model)
    assert isinstance(plan, DistilPlan)
    rope = RopeTable(model, sites)
    gates, texts_ = module.first_gates(plan, rope, model, 0), [torch.tensor(one.ids) for one in texts(2)]
    teacher = module._Teacher(plan, sites, rope, gates)

    def loss() -> float:
        teacher.begin([len(ids) for ids in texts_])
        module.observe(model, texts_, teacher)
        return teacher.figures()["loss"]

    loss()
    slopes = [weight.grad.clone() for weight in gates.parameters() if weight.grad is not None]
    weights, generator = list(gates.parameters()), torch.Generator().manual_seed(0)
    assert len(slopes) == len(weights) and all(weight.grad is None for weight in model.parameters())
    for weight, slope in zip(weights, slopes, strict=True):
        way = torch.nn.functional.normalize(torch.randn(weight.shape, generator=generator).flatten(), dim=0)
        found = []
        for far in (0.02, -0.02):
            with torch.no_grad():
                weight += far * way.view_as(weight)
                found.append(loss())
                weight -= far * way.view_as(weight)
        assert (found[0] - found[1]) / 0.04 == pytest.approx(float(way @ slope.flatten()), rel=0.01, abs=1e-4)


def test_gates_follow_from_the_seed_alone_and_the_model_stays_as_it_was() -> None:
    model = small_model().train()
    before = copy.deepcopy(model.state_dict())
    first, again, other = (run(model=model, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not torch.equal(first.tensors["layers.0.q"], other.tensors["layers.0.q"])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_gates_turn_as_the_model_does_where_they_are_as_wide_as_its_heads() -> None:
    model = small_model()
    inv_freq = model.model.rotary_emb.inv_freq
    assert torch.equal(run(model=model, steps=1).tensors["rope"], inv_freq)
    narrow = run(policy().replace("width=8", "width=4"), model=model, steps=1).tensors["rope"]
    assert torch.allclose(narrow, 10000.0 ** -torch.tensor([0.0, 0.5]))
    assert "rope" not in run(policy().replace("raw.k", "k"), model=model, steps=1).tensors


def test_files_say_where_gates_come_from(tmp_path: Path) -> None:
    found = run()
    path = found.save(tmp_path / "gates.safetensors")
    about = found.provenance
    assert (about["policy"], about["heads"], about["gate"], about["steps"]) == ("gated", "live", "block_gate", 6)
    assert about["metrics"]["loss"] == found.history[-1]["loss"] and len(about["data_digest"]) == 64
    assert b"kvcompile block gates" in path.read_bytes()
    with pytest.raises(KvCompileError, match=r"ends in \.safetensors"):
        found.save(tmp_path / "gates.tsv")


# ---------------------------------------------------------------- checkpoints


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, step, stopped = run(), module._Trainer.step, []

    def interrupted(self: Any, *given: Any) -> None:
        if self.done == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        step(self, *given)

    monkeypatch.setattr(module._Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path)
    found = run(checkpoint=tmp_path)
    assert found.history == whole.history
    assert all(torch.equal(found.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert run(checkpoint=tmp_path).history == whole.history  # nothing is left to do
    with pytest.raises(KvCompileError, match=r"of another run: .*seed is 0 there and 1 here"):
        run(checkpoint=tmp_path, seed=1)


def test_a_checkpoint_with_other_tensors_is_damaged(tmp_path: Path) -> None:
    run(checkpoint=tmp_path)
    state = module.read_files(tmp_path)
    assert state is not None
    identity = json.loads(state.index)["identity"]
    found = module.state_of(state, tmp_path, identity)
    short = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in found.tensors.items()}
    module.save_state(tmp_path, module.State(found.step, short, found.history), identity)
    with pytest.raises(KvCompileError, match="its tensors are not those of this run"):
        run(checkpoint=tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": "30%"}, "keep='30%' has no use for gates of units"),
        ({"draws": 1}, "draws=1 has no use"),
        ({"compile": "eager"}, "compile='eager' has no use"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True has no use"),
        ({"size": 64}, "no query has two units of 64 to choose from"),
        ({"lr": 0.0}, "above 0, not 0"),
        ({"lr": 1e30, "steps": 3}, "learning has diverged"),
    ],
)
def test_what_is_in_vain_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(KvCompileError, match=reason):
        run(**options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KvCompileError, match="by one process"):
        run()


# ---------------------------------------------------------------- policies that read by gates


def by_mask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, told: Any, **_: Any
) -> tuple[Tensor, None]:
    """Dense attention under a mask that is made of what training says of the same gates."""
    plan, gates, table, n, apart = told
    gate, group, tokens, index = plan.gate, plan.facts.group, key.shape[2], module.layer_idx
    places, q, k = torch.arange(tokens), query[0].unflatten(0, (-1, group)), key[0]
    text = Text(q, k, rotate(q, places, table, back=True), rotate(k, places, table, back=True), scaling)
    weights = Gate(gates[f"layers.{index}.q"], gates[f"layers.{index}.k"], rope=gates["rope"])
    own = places // SIZE
    reads = ((own[:, None] == own) & (places[:, None] >= places)).repeat(len(q), group, 1, 1)
    for head in range(len(q)):
        for some in asked_in(gate, tokens, group):
            says = torch.softmax(gate_logits(gate, weights, text, head, some, units_of(gate, tokens)), -1)
            says = says.expand(group, -1, -1) if apart else says.mean(0, keepdim=True).expand(group, -1, -1)
            for i, which in enumerate(some.which.tolist()):
                asking = own == which if gate.pooled else places == some.place[i]
                for g in range(group):
                    for u in says[g, i, :which].topk(min(n, which)).indices.tolist():
                        reads[head, g, asking, u * SIZE : (u + 1) * SIZE] = True
    logits = torch.einsum("hgqd,hnd->hgqn", q, k) * scaling
    attn = torch.softmax(logits.masked_fill(~reads, float("-inf")), -1)
    return torch.einsum("hgqn,hnd->hgqd", attn, value[0]).flatten(0, 1).transpose(0, 1)[None], None


AttentionInterface.register("test_by_mask", by_mask)


@pytest.mark.parametrize(("gate", "scope"), KINDS)
def test_a_policy_reads_the_units_that_its_gates_name(tmp_path: Path, gate: str, scope: str) -> None:
    """All logits of a prompt equal those of dense attention under a mask that is worked out from training's code."""
    text, n = policy(gate, scope), 2
    path = run(text, steps=3).save(tmp_path / "gates.safetensors")
    plain, model, ids = small_model(), small_model(), torch.tensor([tokens(39, seed=9)])
    plan = compile_learn(text, model_facts(plain))
    assert isinstance(plan, DistilPlan)
    table = RopeTable(plain, find_sites(plain)).upto(64)
    plain.set_attn_implementation("test_by_mask")
    kvcompile.optimize(model, text, backend="reference", compile="off", tables={"live": path}, n=n)
    with torch.no_grad():
        expected = plain(ids, told=(plan, load_file(path), table, n, scope == "per query_head"), use_cache=False).logits
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_policy_that_reads_as_many_units_as_there_are_is_the_model(tmp_path: Path, backend: str) -> None:
    path = run(steps=2).save(tmp_path / "gates.safetensors")
    plain, model, ids = small_model(), small_model(), torch.tensor([tokens(39, seed=9)])
    kvcompile.optimize(model, policy(), backend=backend, compile="off", tables={"live": path}, n=99)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    few, options = {"max_new_tokens": 6, "do_sample": False}, {"backend": backend, "compile": "off", "n": 1}
    assert torch.equal(model.generate(ids, **few), plain.generate(ids, **few))
    kvcompile.restore(model)
    kvcompile.optimize(model, policy(), tables={"live": path}, **options)
    assert model.generate(ids, **few).shape == (1, 45)


@pytest.mark.parametrize("gate", ["block_gate", "query_gate"])
def test_cuts_at_units_and_padding_change_nothing(tmp_path: Path, gate: str) -> None:
    text = policy(gate)
    path = run(text, steps=2).save(tmp_path / "gates.safetensors")
    model, long, short = small_model(), tokens(38, seed=1), tokens(29, seed=2)
    options = {"backend": "reference", "compile": "off", "tables": {"live": path}}
    kvcompile.optimize(model, text, **options)
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits[0] for ids in (long, short)]
        mask = torch.tensor([[1] * 38, [0] * 9 + [1] * 29])
        both = model(torch.tensor([long, [0] * 9 + short]), attention_mask=mask).logits
        assert torch.allclose(both[0], alone[0], atol=1e-4) and torch.allclose(both[1, 9:], alone[1], atol=1e-4)
        kvcompile.restore(model)
        kvcompile.optimize(model, text.replace("at chunk,", "at chunk(8),"), **options)
        assert torch.allclose(model(torch.tensor([long])).logits[0], alone[0], atol=1e-4)
        kvcompile.restore(model)
        kvcompile.optimize(model, text.replace("at chunk,", "at chunk(7),"), **options)
        same = torch.allclose(model(torch.tensor([long])).logits[0], alone[0], atol=1e-4)
        assert same == (gate == "query_gate")  # a mean over a unit's queries follows from a cut inside of it


def test_a_file_beside_the_policy_is_found_and_another_models_is_refused(tmp_path: Path) -> None:
    run(steps=1).save(tmp_path / "gates.safetensors")
    file = tmp_path / "gated.kvp"
    file.write_text(policy())
    kvcompile.optimize(small_model(), str(file), backend="reference", compile="off")
    with pytest.raises(kvcompile.PolicyError, match=r"K616.*`layers.2.k` is missing"):
        kvcompile.optimize(small_model(num_hidden_layers=3), str(file), backend="reference", compile="off")
    with pytest.raises(kvcompile.PolicyError, match=r"K616.*units of 4 tokens, the policy has units of 8"):
        kvcompile.optimize(small_model(), str(file), backend="reference", compile="off", size=8)
    with pytest.raises(kvcompile.PolicyError, match=r"K615.*brings no weights for `live`"):
        kvcompile.optimize(small_model(), "seerattention_gated", backend="reference", compile="off")


# ---------------------------------------------------------------- what it is good for

RECALL = """
policy gated(size=8, n=2, near=8):
    unit block(size) with hi = max[i] raw.k, lo = min[i] raw.k, c = mean[i] raw.k
    score live = softmax[u] learned("gates.safetensors", q, hi, lo, c)
    attend recent(near) | top(n) blocks by live per head
    at step

learn live for gated:
    gate z = query_gate(width=32) per head
    loss attention_kl
    freeze weights

policy untrained(size=8, n=2, near=8):
    unit block(size) with c = mean[i] raw.k
    attend recent(near) | top(n) blocks by dot(mean[g] q, c) per head
    at step

policy chance(size=8, n=2, near=8):
    attend recent(near) | random(n * size, 1)
    at step
"""


def shipped() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(__file__).parents[2] / "examples" / "recall_model")


def right_answers(name: str, count: int, **options: Any) -> float:
    """The part of questions that the shipped model answers rightly where the last word of each is read as a step."""
    from kvcompile.evaluation import tales

    model, right = shipped(), 0
    kvcompile.optimize(model, RECALL, name=name, backend="reference", compile="off", **options)
    for asked in tales.prompts(count, length=256):
        ids = torch.tensor([tales.encode([tales.BOS, *asked.text.split()])])
        with torch.no_grad():
            cache = model(ids[:, :-1]).past_key_values
            answer = model(ids[:, -1:], past_key_values=cache).logits[0, -1].argmax()
        right += int(answer) == tales.INDEX[asked.answer]
    return right / count


def tales_of(count: int, seed: int) -> list[Sequence]:
    import random

    from kvcompile.evaluation import tales

    rng = random.Random(seed)
    return [Sequence(tales.encode(tales.training_text(rng, 256, 12)[0])) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "scope"), [KINDS[1], KINDS[2]])
def test_fifty_steps_rank_blocks_of_the_shipped_model_far_better_than_the_identity(gate: str, scope: str) -> None:
    text = policy(gate, scope).replace("width=8", "width=32")
    model, options = shipped(), {"size": 8}
    plan = compile_learn(text, model_facts(model), **options)
    assert isinstance(plan, DistilPlan)
    rope = RopeTable(model, find_sites(model))
    asked = [torch.tensor(one.ids) for one in tales_of(4, seed=99)]

    def judged(tensors: dict[str, Tensor]) -> dict[str, float]:
        gates = module.first_gates(plan, rope, model, 0)
        for name, weight in gates.named_parameters():
            part, layer = name.split(".")
            weight.data.copy_(tensors[f"layers.{layer}.{part}"])
        teacher = module._Teacher(plan, find_sites(model), rope, gates)
        teacher.begin([len(ids) for ids in asked])
        module.observe(model, asked, teacher)
        return teacher.figures()

    found = kvcompile.learn(model, text, tales_of(100, seed=0), steps=50, batch=2, lr=0.01, **options)
    same = {}
    for name, weight in found.tensors.items():
        heads, wide, width = weight.shape if weight.dim() == 3 else (0, 0, 0)
        eye = torch.eye(width)
        if name.endswith(".q"):
            same[name] = eye.repeat(wide // width, 1).expand(heads, -1, -1) * width / wide if width else weight
        elif name.endswith(".k"):
            same[name] = torch.cat([0 * eye, eye]).expand(heads, -1, -1)  # the mean, and nothing of the largest
    trained, identity = judged(dict(found.tensors)), judged(same)
    assert trained["loss"] < 0.6 * identity["loss"] and trained["recall"] > identity["recall"] + 0.1


@pytest.mark.slow
def test_trained_gates_find_what_the_shipped_model_must_recall(tmp_path: Path) -> None:
    """16 of 256 tokens by trained gates answer more than 16 by their means, and far more than any 16 tokens."""
    data = tales_of(400, seed=0)
    found = kvcompile.learn(shipped(), RECALL, data, name="gated", steps=200, batch=2, lr=0.01)
    recall = [entry["recall"] for entry in found.history]
    assert sum(recall[-10:]) / 10 > 0.45 > 0.25 > recall[0]
    tables = {"live": found.save(tmp_path / "gates.safetensors")}
    gated, untrained, chance = (
        right_answers(name, 60, **options)
        for name, options in (("gated", {"tables": tables}), ("untrained", {}), ("chance", {}))
    )
    assert gated > untrained > chance and gated > 0.8 and chance < 0.3
