"""What queries read: equal to what a cache really holds, token by token, and to the definition, now by now."""

from __future__ import annotations

import pytest
import torch

import kvcompile
from kvcompile.kernels.compete import Place
from kvcompile.kernels.counts import count_value
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ClassPlan, ModelFacts, PolicyPlan
from kvcompile.kernels.readable import by_place, last_readers, readable, reads
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.select import region_mask
from kvcompile.passes import compile_policy
from kvcompile.passes.facts import model_facts
from tests.models import random_model, tokens

FACTS = ModelFacts(layers=2, q_heads=4, kv_heads=2, head_dim=16)
TOTAL = 40
SETS = (
    "sink(2) | recent(5)",
    "recent(1)",
    "sink(0) | recent(0)",
    "stride(4)",
    "stride(7) | recent(3)",
    "random(6, 3)",
    "random(4, 1) | sink(1) | recent(2)",
    "recent(now / 3)",
    "recent(max(4, now / 5)) | sink(1)",
    "all",
)


def bound(keep: str, facts: ModelFacts = FACTS, more: str = "") -> tuple[PolicyPlan, ClassPlan]:
    plan = compile_policy(f"policy p():\n    keep {keep}\n    at chunk, step\n{more}", facts).plan
    return plan, plan.classes[0]


def by_definition(plan: PolicyPlan, cls: ClassPlan, layer: int, head: int, total: int) -> torch.Tensor:
    """A row that loses, after each token, what no region holds at that `now`: who reads whom, bool [total, total]."""
    alive, out = torch.zeros(total, dtype=torch.bool), torch.zeros(total, total, dtype=torch.bool)
    pos = torch.arange(total)[None]
    place = Place(0, (layer,), (head,), (0,))
    for now in range(total):
        alive[now] = True
        out[now] = alive
        row = Rows(pos, alive[None], alive[None], torch.zeros(1, total, dtype=torch.bool), torch.tensor([now]),
                   torch.zeros(1, dtype=torch.int64), {})  # fmt: skip
        held = torch.zeros_like(alive)
        for region in cls.keep:
            numbers = torch.tensor(
                [[count_value(plan.counts[i], {"now": now})] for i in range(len(plan.counts))]
            ).reshape(-1, 1)
            held |= region_mask(plan, region, row, numbers, place)[0]
        alive &= held
    return out


@pytest.mark.parametrize("keep", SETS)
def test_a_query_reads_what_was_kept_at_every_now_before_it(keep: str) -> None:
    plan, cls = bound(keep)
    at = torch.arange(TOTAL)
    for layer, head in ((0, 0), (0, 1), (1, 0)):
        assert torch.equal(readable(plan, cls, layer, head, at, at), by_definition(plan, cls, layer, head, TOTAL)), (
            layer,
            head,
        )


@pytest.mark.parametrize("keep", ["sink(2) | recent(5)", "stride(4) | recent(2)", "random(6, 3) | recent(1)"])
def test_the_cache_holds_just_that_when_it_is_fed_token_by_token(keep: str) -> None:
    model = random_model()
    plan, cls = bound(keep, model_facts(model))
    ids, past, length = tokens(24), None, 24
    with kvcompile.use(model, f"policy p():\n    keep {keep}\n    at chunk, step\n"), torch.no_grad():
        for t in range(length - 1):
            past = model(torch.tensor([[ids[t]]]), past_key_values=past).past_key_values
            for layer in range(plan.facts.layers):
                for head, held in enumerate(past.positions(layer)):
                    read = readable(plan, cls, layer, head, torch.tensor([t + 1]), torch.arange(t + 1))[0]
                    assert held.tolist() == read.nonzero()[:, 0].tolist(), (t, layer, head)


def test_queries_and_keys_may_be_any_positions() -> None:
    plan, cls = bound("sink(2) | recent(5)")
    at = torch.arange(TOTAL)
    whole = readable(plan, cls, 0, 0, at, at)
    queries, keys = torch.tensor([39, 3, 17]), torch.tensor([1, 38, 16, 30])
    assert torch.equal(readable(plan, cls, 0, 0, queries, keys), whole[queries][:, keys])
    assert readable(plan, cls, 0, 0, queries[:0], keys).shape == (0, 4)


@pytest.mark.parametrize("size", [None, 4, 16, 64])
@pytest.mark.parametrize("keep", ["sink(2) | recent(5)", "random(6, 3) | recent(2)", "stride(3)", "all"])
def test_blocks_hold_each_read_once_and_nothing_else(keep: str, size: int | None) -> None:
    plan, cls = bound(keep)
    last = torch.stack([last_readers(plan, cls, 1, head, TOTAL) for head in range(2)])
    found = reads(last, size)
    heads, blocks, wide, width = found.mask.shape
    assert found.columns.shape == (heads, blocks, width) and blocks * wide >= TOTAL and width % 8 == 0
    for head in range(heads):
        back = torch.zeros(blocks * wide, TOTAL, dtype=torch.int64)
        for b, q, w in found.mask[head].nonzero().tolist():
            back[b * wide + q, found.columns[head, b, w]] += 1
        at = torch.arange(TOTAL)
        assert torch.equal(back[:TOTAL], readable(plan, cls, 1, head, at, at).long())
        assert bool((back[TOTAL:].sum(1) >= 1).all())  # what lies beyond the text reads something, so it is a number


def test_memory_grows_with_the_text_and_not_with_its_square() -> None:
    plan, cls = bound("sink(8) | recent(56)")
    for total in (1 << 12, 1 << 15):
        found = reads(last_readers(plan, cls, 0, 0, total)[None])
        assert found.mask.numel() <= 3 * 64 * total and found.columns.numel() <= 3 * total


def test_only_random_sets_differ_from_head_to_head() -> None:
    assert not by_place(bound("sink(2) | stride(4)")[1])
    plan, cls = bound("random(6, 3)")
    assert by_place(cls)
    assert not torch.equal(last_readers(plan, cls, 0, 0, TOTAL), last_readers(plan, cls, 0, 1, TOTAL))


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ("top(4) by norm(k) per head", "selects by a score"),
        ("prompt | recent(4)", "region `prompt`"),
        ("recent(10% of prompt)", "`recent` follows from prompt"),
        ("sink(now / 4) | recent(2)", "`sink` of policy 'p' takes entries back"),
        ("recent(2 * now - 20)", "`recent` of policy 'p' takes entries back"),
        ("recent(4) else fold mean weight count", "merged or folded"),
    ],
)
def test_sets_that_do_not_follow_from_places_are_refused(keep: str, why: str) -> None:
    plan, cls = bound(keep)
    with pytest.raises(KvCompileError, match=why):
        last_readers(plan, cls, 0, 0, TOTAL)
