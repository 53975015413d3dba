"""Mixed attention: equal to the cache that it stands for, to plain formulas, and gone without a trace."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import kvcompile
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.readable import last_readers, readable, reads
from kvcompile.learning import mixing
from kvcompile.learning.mixing import attend, mixed
from kvcompile.passes.sites import find_sites
from tests.learning.learn_plans import STREAMING, learn_plan, rows
from tests.models import FAMILIES, random_model

LENGTH = 30


def gates(model: object, value: float | None = None, *, grad: bool = False) -> Tensor:
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    made = torch.rand(shape, generator=torch.Generator().manual_seed(5)) if value is None else torch.full(shape, value)
    return made.requires_grad_(grad)


def logits_of(model: object, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings()(hidden)


def token_by_token(model: object, policy: str, ids: Tensor) -> Tensor:
    """Logits of an optimised model that is fed one token at a time."""
    out, past = [], None
    with kvcompile.use(model, policy), torch.no_grad():
        for t in range(ids.shape[1]):
            found = model(ids[:, t : t + 1], past_key_values=past)
            past = found.past_key_values
            out.append(found.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("keep", [STREAMING, "stride(4) | recent(2)", "random(6, 3) | recent(1)"])
def test_closed_gates_are_the_policy_itself(keep: str) -> None:
    model, ids = random_model(), rows(2, LENGTH)
    truth = token_by_token(model, f"policy p():\n    keep {keep}\n    at chunk, step\n", ids)
    with mixed(model, find_sites(model), learn_plan(model, local=keep)) as mix, torch.no_grad():
        found = logits_of(model, mix(ids, gates(model, 0.0)).student)
    assert torch.allclose(found, truth, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_untouched_model(family: str) -> None:
    model, ids = random_model(family), rows(2, LENGTH)
    with torch.no_grad():
        truth = model(ids).logits
        with mixed(model, find_sites(model), learn_plan(model)) as mix:
            found = mix(ids, gates(model, 1.0))
            assert not torch.allclose(logits_of(model, mix(ids, gates(model, 0.0)).student), truth, atol=0.1)
    assert found.teacher is None and torch.allclose(logits_of(model, found.student), truth, atol=2e-4)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain attention, mask bool [heads or 1, n, n]."""
    group = q.shape[1] // k.shape[1]
    k, v, mask = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask
    if len(mask) > 1:
        mask = mask.repeat_interleave(group, 0)
    logits = (q @ k.transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf"))
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("keep", [STREAMING, "random(6, 3)", "stride(3) | recent(2)"])
def test_attention_in_blocks_is_masked_attention(keep: str, size: int | None) -> None:
    model, at = random_model(), torch.arange(LENGTH)
    plan = learn_plan(model, local=keep)
    last = torch.stack([last_readers(plan.plan, plan.local, 1, head, LENGTH) for head in range(2)])
    mask = torch.stack([readable(plan.plan, plan.local, 1, head, at, at) for head in range(2)])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, LENGTH, 16, generator=generator, requires_grad=True) for h in (4, 2, 2))
    weights = torch.randn(2, 4, LENGTH, 16, generator=generator)
    per_head = "random" in keep
    where = reads(last if per_head else last[:1], size)
    found = attend(q, k, v, where, 0.3)
    truth = dense(q, k, v, mask if per_head else mask[:1])
    assert torch.allclose(found, truth, atol=1e-5)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, truth))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def by_hooks(model: object, ids: Tensor, z: Tensor, local: Tensor) -> Tensor:
    """The student's last hidden states with two branches, layer by layer from modules: truth for the two-way mix."""
    base = model.base_model
    with torch.no_grad():
        teacher = student = base.embed_tokens(ids)
        rope = base.rotary_emb(teacher, torch.arange(ids.shape[1])[None])
        full = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for index, layer in enumerate(base.layers):
            clean, own = heads_of(layer, teacher, rope), heads_of(layer, student, rope)
            scale = layer.self_attn.scaling / 0.3  # `dense` has a scale of its own
            far = dense(clean[0] * scale, *clean[1:], full)
            near = dense(own[0] * scale, *own[1:], local)
            weight = z[index].repeat_interleave(far.shape[1] // len(z[index])).view(1, -1, 1, 1)
            teacher = after(layer, teacher, far)
            student = after(layer, student, weight * far + (1 - weight) * near)
        return base.norm(student)


def heads_of(layer: object, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        part(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (table[:, None] for table in rope)

    def turn(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    return turn(q), turn(k), v


def after(layer: object, hidden: Tensor, out: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def test_two_ways_mix_the_teachers_attention_into_the_student() -> None:
    model, ids, at = random_model(), rows(2, LENGTH), torch.arange(LENGTH)
    plan, z = learn_plan(model, "clamp01"), gates(model, grad=True)
    with torch.no_grad():
        clean = model.base_model(ids).last_hidden_state
    with mixed(model, find_sites(model), plan) as mix:
        found = mix(ids, z)
    with mixed(model, find_sites(model), learn_plan(model)) as mix, torch.no_grad():
        one_way = mix(ids, z).student
    assert torch.allclose(found.teacher, clean, atol=2e-4) and not found.teacher.requires_grad
    local = readable(plan.plan, plan.local, 0, 0, at, at)[None]
    assert torch.allclose(found.student, by_hooks(model, ids, z, local), atol=2e-4)
    assert not torch.allclose(found.student, one_way, atol=0.05)
    found.student.sum().backward()
    assert bool((z.grad != 0).all())


def test_nothing_of_a_teacher_is_kept_for_the_backward_pass() -> None:
    """One way keeps the queries, keys and values of both attentions; two ways only those of the local one."""
    model, ids, kept = random_model(), rows(1, 64), {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    for gate in ("hard_concrete", "clamp01"):
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            mixed(model, find_sites(model), learn_plan(model, gate)) as mix,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            mix(ids, gates(model, grad=True))
        kept[gate] = sum(size for place, size in saved.items() if place not in weights)
    assert 0 < kept["clamp01"] < kept["hard_concrete"]


def test_the_gradient_of_gates_is_that_of_finite_differences() -> None:
    model, ids = random_model(), rows(1, 20)
    plan, z = learn_plan(model), gates(model)
    weights = torch.randn(1, 20, 128, generator=torch.Generator().manual_seed(1))
    with mixed(model, find_sites(model), plan) as mix:

        def value(x: Tensor) -> Tensor:
            return (mix(ids, x).student * weights).sum()

        own = torch.autograd.grad(value(z.requires_grad_()), z)[0]
        with torch.no_grad():
            step = torch.zeros_like(z)
            step[1, 1] = 1e-2
            slope = float(value(z + step) - value(z - step)) / 2e-2
    assert float(own[1, 1]) == pytest.approx(slope, rel=3e-2)


def test_any_pair_of_sets_can_be_mixed() -> None:
    model, ids = random_model(), rows(1, LENGTH)
    truth = token_by_token(model, "policy p():\n    keep sink(1) | recent(9)\n    at chunk, step\n", ids)
    plan = learn_plan(model, full="sink(1) | recent(9)", local="stride(3)")
    with mixed(model, find_sites(model), plan) as mix, torch.no_grad():
        assert torch.allclose(logits_of(model, mix(ids, gates(model, 1.0)).student), truth, atol=2e-4)


@pytest.mark.parametrize("gate", ["hard_concrete", "clamp01"])
def test_padding_on_the_right_changes_nothing_before_it(gate: str) -> None:
    model, ids, z = random_model(), rows(2, LENGTH), gates(random_model())
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, 18:] = False
    with mixed(model, find_sites(model), learn_plan(model, gate)) as mix, torch.no_grad():
        both = mix(ids.masked_fill(~real, 0), z, real).student
        alone = mix(ids[1:, :18], z).student
        with pytest.raises(KvCompileError, match="padded on the right"):
            mix(ids, z, real.flip(1))
    assert torch.allclose(both[1:, :18], alone, atol=1e-5) and bool(both.isfinite().all())


@pytest.mark.parametrize(("gate", "expected"), [("hard_concrete", [3, 6]), ("clamp01", [6, 9])])
def test_gradient_checkpointing_gives_the_same_gradients(gate: str, expected: list[int]) -> None:
    model, ids, found = random_model(), rows(2, LENGTH), []
    runs = count_runs(model)
    for again in (False, True):
        z = gates(model, grad=True)
        if again:
            model.gradient_checkpointing_enable()
        with mixed(model, find_sites(model), learn_plan(model, gate)) as mix:
            runs.clear()
            mix(ids, z).student.square().sum().backward()
        found.append((z.grad, len(runs)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4) and bool((found[0][0] != 0).all())
    # The second time every layer of the student runs again in the backward pass, those of a teacher never.
    assert [n for _, n in found] == expected


def count_runs(model: object) -> list[int]:
    runs: list[int] = []
    for layer in model.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def test_bfloat16_does_not_round_the_gates() -> None:
    model, ids = random_model().to(torch.bfloat16), rows(1, LENGTH)
    z = gates(model, 0.0, grad=True)
    with mixed(model, find_sites(model), learn_plan(model)) as mix:
        out = mix(ids, z).student
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and z.grad.dtype == torch.float32 and bool(z.grad.isfinite().all())
    full, local = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    # In bfloat16 1 - 2^-12 would be 1, and the local part lost.
    found = mixing._added(torch.tensor([[1 - 2**-12]]), 256 * full, local - 2**15)
    assert float(found[0, 0, 0, 0]) == 248.0


def test_the_model_is_left_as_it_was() -> None:
    model, ids = random_model(), rows(1, LENGTH)
    model.train()
    model.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(vars(model.config)), model.config
    wants = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with mixed(model, find_sites(model), learn_plan(model)) as mix:
        assert not model.training and not any(weight.requires_grad for weight in model.parameters())
        mix(ids, gates(model))
    with pytest.raises(RuntimeError, match="stop"), mixed(model, find_sites(model), learn_plan(model)):
        raise RuntimeError("stop")
    assert model.training and all(module.training for module in model.modules())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == wants
    assert model.config is before[1] and vars(model.config) == before[0]
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    with pytest.raises(KvCompileError, match="has ended"):
        mix(ids, gates(model))


def test_an_optimised_model_learns_without_its_policy_and_keeps_it() -> None:
    model, ids = random_model(), rows(1, LENGTH)
    with torch.no_grad():
        truth = model(ids).logits
    kvcompile.optimize(model, "policy p():\n    keep recent(3)\n    at chunk(4), step\n")
    own = model(ids).logits
    with mixed(model, find_sites(model), learn_plan(model)) as mix, torch.no_grad():
        assert torch.allclose(logits_of(model, mix(ids, gates(model, 1.0)).student), truth, atol=2e-4)
    assert torch.equal(model(ids).logits, own) and not torch.allclose(own, truth, atol=0.1)


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    model = random_model()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
             "vocab_size": 32, "intermediate_size": 32}  # fmt: skip
    window = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    plain = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    with pytest.raises(KvCompileError, match="sliding windows"), mixed(window, find_sites(window), learn_plan(window)):
        pass
    with mixed(plain, find_sites(plain), learn_plan(plain)) as mix:
        assert mix(torch.arange(20)[None], gates(plain)).student.shape == (1, 20, 32)
        with pytest.raises(KvCompileError, match="sliding_window"):
            plain.model.layers[0].self_attn.config.sliding_window = 8  # a copy, gone with the block
            mix(torch.arange(20)[None], gates(plain))
    with (
        mixed(model, find_sites(model), learn_plan(model)) as mix,
        pytest.raises(KvCompileError, match=r"shape \[2, 2\]"),
    ):
        mix(rows(1, 8), torch.ones(2, 2))
    plan = learn_plan(model)
    turned = dataclasses.replace(plan, plan=dataclasses.replace(plan.plan, compact=True))
    for wrong, sites, why in (
        (turned, find_sites(model), "renumbers positions"),
        (plan, find_sites(model)[:2], "2 att"),
    ):
        with pytest.raises(KvCompileError, match=why), mixed(model, sites, wrong):
            pass
    with mixed(model, find_sites(model), learn_plan(model)):
        with pytest.raises(KvCompileError, match="while its head"):
            model(rows(1, 8))
        with pytest.raises(KvCompileError, match="learned already"), mixed(model, find_sites(model), learn_plan(model)):
            pass
    assert torch.is_grad_enabled() and model(rows(1, 8)).logits.requires_grad


def test_what_lies_beyond_the_text_never_becomes_a_gradient() -> None:
    """The last block reaches beyond the text; were its output no number there, no gradient would be one."""
    q, k, v = (torch.randn(1, 1, 5, 8, requires_grad=True) for _ in range(3))
    where = reads(torch.tensor([[0, 1, 2, 3, 4]]), 4)  # each its own
    out = attend(q, k, v, where, 1.0)
    assert where.mask.shape[1:3] == (2, 4) and torch.allclose(out, v)
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_sequences_may_have_gates_of_their_own() -> None:
    model, ids = random_model(), rows(3, LENGTH)
    shape = (3, len(model.model.layers), model.config.num_key_value_heads)
    z = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    with mixed(model, find_sites(model), learn_plan(model)) as mix:
        together = mix(ids, z).student
        for row in range(3):
            assert torch.allclose(together[row], mix(ids[row : row + 1], z[row]).student[0], atol=1e-5)
