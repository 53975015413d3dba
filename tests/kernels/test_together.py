"""Sequences that are equally far are read and judged at once: nothing of one reaches another, and copies stay few.

Every batch of the first test is compared with each of its sequences alone, entry by entry, over several turns: equal
lengths beside others, and sequences that bring nothing in a forward.
"""

from itertools import pairwise

import pytest
import torch

import kvcompile
from kvcompile.extents import ExtentStore
from kvcompile.kernels import cpu, evict, gather
from kvcompile.kernels.layout import make_room, write
from kvcompile.kernels.plan import ClassPlan, ModelFacts, PolicyPlan
from tests.driving import BACKENDS, padded
from tests.models import random_model, tokens

LENGTHS = ((30, 19, 19), (6, 11, 11), (1, 1, 1), (0, 9, 9), (1, 0, 1))


def policy(*clauses: str) -> str:
    return "policy p():\n" + "".join(f"    {clause}\n" for clause in clauses)


READ = "score s = mean[g] sum[q] attn"
LAST = "score s = mean[g] sum[q in last(4)] attn"
PEEK = "score s = maxpool(mean[g] sum[q in peek(3)] attn, 3)"
POLICIES = {
    "own queries": policy(READ, "keep frozen | recent(2) | top(40% of chunk) by s per head", "at chunk(7)"),
    "peeked queries": policy(PEEK, "keep frozen | top(40% of chunk) by s per head", "at chunk(7)"),
    "places": policy("positions compact", PEEK, "keep frozen | top(40% of chunk) by s per head", "at chunk(7)"),
    "query heads": policy("score s = sum[q in last(4)] attn", "keep recent(2) | top(5) by s per query_head",
                          "at prefill.end"),
    "shared heads": policy(PEEK, "keep recent(3) | top(6) by s shared heads", "at chunk(9)"),
    "across heads": policy(LAST, "keep recent(3) | top(6) by s across heads floor 20%", "at prefill.end"),
    "mean over heads": policy("score s = maxpool(mean[h] sum[q in peek(3)] attn, 3)",
                              "keep frozen | top(40% of chunk) by s per head", "at chunk(7)"),
    "across layers": policy(READ, "keep recent(2) | top(7) by s across layers", "at prefill.end"),
    "across layers, peeked": policy(PEEK, "keep frozen | top(4) by s across layers", "at chunk(8)"),
    "measured share": policy(READ, "share b = 9 by cover(s)", "keep recent(2) | top(b) by s per head",
                             "at prefill.end"),
    "states": policy("state acc = 0", "on attend: acc += mean[g] sum[q] attn",
                     "keep recent(3) | top(7) by acc per head", "at chunk(6), step"),
    "merge": policy("keep sink(1) | recent(4) | top(4) by norm(v) per head",
                    "    else merge into nearest by cos(k) when sim >= ema(mean(sim), 0.5) weight sim", "    else drop",
                    "at chunk(6), step"),
    "fold": policy("keep sink(1) | recent(6) else fold mean", "at chunk(8), step"),
    "two sets": policy(LAST, "keep recent(6) | top(12) by norm(v) per head", "at chunk(9)",
                       "keep recent(4) | top(3) by s per head", "at prefill.end"),
    "units": policy("unit lot(4) with c = mean[i] next.k", "score s = cos(k, c)",
                    "keep frozen | newest lot | top(50%) by s per head per lot", "at filled(lot, 2)"),
}  # fmt: skip


def entries(cache, layer: int, b: int) -> list[tuple[torch.Tensor, ...]]:
    """Position, frozen mark, states, key and value of all entries, by KV head and position."""
    site, heads = cache.store.site(layer), cache.plan.facts.kv_heads
    found = []
    for row in range(site.base(heads) + b * heads, site.base(heads) + (b + 1) * heads):
        slots = site.slots(row, 0, int(site.length[row]))
        slots = slots[site.pos[slots].argsort(stable=True)]
        found.append((site.pos[slots], site.frozen[slots], site.state[:, slots], site.k[slots], site.v[slots]))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_holds_what_each_sequence_holds_alone(name, backend):
    model = random_model("llama64", num_hidden_layers=2)
    kvcompile.optimize(model, POLICIES[name], backend=backend, compile="off")
    turns = [[tokens(n, seed=10 * t + b) for b, n in enumerate(lengths)] for t, lengths in enumerate(LENGTHS)]
    several, cache, mask = [], None, torch.zeros(3, 0, dtype=torch.int64)
    alone = [None] * 3
    with torch.no_grad():
        for t, turn in enumerate(turns):
            ids, here = padded(turn, "left")
            mask = torch.cat([mask, here], 1)
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            several.append(out.logits)
            for b, piece in enumerate(turn):
                if not piece:
                    continue
                own = model(input_ids=torch.tensor([piece]), past_key_values=alone[b], use_cache=True)
                alone[b] = own.past_key_values
                torch.testing.assert_close(out.logits[b, -len(piece) :], own.logits[0], rtol=1e-5, atol=1e-4)
                for layer in range(2):
                    for mine, truth in zip(entries(cache, layer, b), entries(alone[b], layer, 0), strict=True):
                        assert mine[0].tolist() == truth[0].tolist(), f"turn {t}, sequence {b}, layer {layer}"
                        assert mine[1].tolist() == truth[1].tolist(), f"frozen: turn {t}, sequence {b}"
                        for x, y in zip(mine[2:], truth[2:], strict=True):
                            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def store(slots: int) -> ExtentStore:
    """Four rows of one layer in a pool of so many slots."""
    plan = PolicyPlan("p", "0", ModelFacts(1, 2, 2, 4), (ClassPlan("all", (), ()),), ((0, 0),))
    made = ExtentStore(plan, 2, torch.float32, torch.device("cpu"))
    made.reserve(0, [0] * 4)
    made.resize(0, slots)
    return made


def appended(site, rows: list[int], counts: list[int], first: list[int]) -> None:
    """Entries whose position, key and value say which row they are of and where they stand in it."""
    pos = torch.cat([torch.arange(start, start + n) for start, n in zip(first, counts, strict=True)])
    row = torch.cat([torch.full((n,), row) for row, n in zip(rows, counts, strict=True)])
    k = torch.stack([row, pos, row, pos], 1).float()
    write(site, rows, counts, k, -k, pos, torch.zeros_like(pos), torch.zeros(0, len(pos)))


def test_rows_that_grow_together_move_within_a_pool_as_large_as_they_need():
    site = store(4 * 48).site(0)  # the extents of the last turn leave no slot to spare
    held = [0] * 4
    for rows, counts in (
        ([0, 1, 2, 3], [9, 9, 9, 9]),
        ([0, 2], [8, 12]),
        ([1, 3], [20, 11]),
        ([0, 1, 2, 3], [19, 0, 17, 11]),
        ([3, 2, 1, 0], [4, 1, 6, 3]),
    ):
        appended(site, rows, counts, [held[row] for row in rows])
        for row, count in zip(rows, counts, strict=True):
            held[row] += count
        taken = sorted((start, start + capacity) for start, capacity in site.table.tolist() if capacity)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        assert taken[-1][1] <= int(site.top) <= site.k.shape[0]
        for r in range(4):
            slots = site.slots(r, 0, held[r])
            assert site.length[r] == held[r] and site.pos[slots].tolist() == list(range(held[r]))
            assert (site.k[slots, 0] == r).all() and (site.v[slots, 1] == -site.pos[slots]).all()


def test_a_pool_that_is_too_small_says_so():
    site = store(4 * 16).site(0)
    with pytest.raises(RuntimeError, match="pool of 64 slots cannot hold the 96 slots"):
        make_room(site, {0: 20, 1: 20, 2: 10, 3: 10})


@pytest.mark.parametrize("name", ["keep_all", "own queries", "places"])
def test_long_pieces_are_taken_one_by_one(name, monkeypatch):
    """What is copied at a time does not grow with the batch."""
    groups = []

    def spy(sequences, size, few=gather.few):
        found = few(sequences, size)
        groups.extend((len(group), size) for group in found)
        return found

    monkeypatch.setattr(gather, "AT_ONCE", 2_000)
    for module in (cpu, evict):
        monkeypatch.setattr(module, "few", spy)
    model = random_model("llama64")
    kvcompile.optimize(model, POLICIES.get(name, name), backend="cpu", compile="off")
    for length in (2, 60):
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens(length, seed=b) for b in range(6)]), use_cache=True)
    assert all(count == 1 or count * size <= 2_000 for count, size in groups)
    assert {count for count, _ in groups} > {1} and max(size for _, size in groups) > 2_000
