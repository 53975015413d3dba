"""What attention over a policy's rows gives, on both backends that need no device, against a loop over every query.

Rows of any order and length; an entry without position that weighs by its count; keys turned by their place.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompile.kernels import cpu, reference
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import Loser, PolicyPlan
from tests.kernels.rows import Entry, entries, plan_of, rope_table, site_of, turned

WIDTH, SCALE, ROOM = 8, 0.7, 2
ATTEND = {"reference": reference, "cpu": cpu}
FOLD = (Loser("fold", "mean"),)
quick = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(plan: PolicyPlan, row: list[Entry], q: torch.Tensor, pos: int) -> torch.Tensor:
    """One query at position pos reads what of a row is not newer: [head_dim], float64."""
    placed = sorted(e.pos for e in row if e.pos >= 0)
    logits, values = [], []
    for e in row:
        if e.pos > pos:
            continue
        key, query = e.k.double(), q.double()
        if plan.compact:
            query = turned(query, sum(p < pos for p in placed))
            key = turned(key, placed.index(e.pos)) if e.pos >= 0 else key
        logits.append(float(query @ key) * SCALE + (math.log(e.count) if e.pos < 0 else 0.0))
        values.append(e.v.double())
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    return sum(w * v for w, v in zip(weights, values, strict=True))


@st.composite
def cases(draw: st.DrawFn, tokens: int) -> tuple[PolicyPlan, list[list[Entry]], list[int], list[int]]:
    """A plan, the rows of up to three sequences, the position that each starts at and how many tokens it brings."""
    folds, compact = draw(st.booleans(), "folds"), draw(st.booleans(), "compact")
    plan = plan_of(FOLD if folds else (), compact=compact, ring=3)
    rows, starts, new = [], [], []
    for _ in range(draw(st.integers(1, 3), "batch")):
        start = draw(st.integers(0, 14), "start")
        starts.append(start)
        new.append(draw(st.integers(0, tokens), "new"))
        held = draw(st.sets(st.integers(0, max(0, start - 1))), "held") if start else set()
        for _ in range(2):
            # Rows of one length side by side, and rows of unequal ones
            if start and draw(st.booleans(), "another"):
                held = draw(st.sets(st.integers(0, start - 1)), "held")
            seed = draw(st.integers(0, 999), "seed")
            row = [Entry(p, *noise(seed + p, 2, WIDTH)) for p in draw(st.permutations(sorted(held)), "order")]
            if folds and draw(st.booleans(), "folded"):
                row.insert(draw(st.integers(0, len(row))), Entry(-1, *noise(seed, 2, WIDTH), draw(st.integers(1, 50))))
            rows.append(row)
    return plan, rows, starts, new


def site_at(plan: PolicyPlan, rows: list[list[Entry]], starts: list[int], new: list[int], peek: int = 0) -> Site:
    site = site_of(plan, rows, room=ROOM, rope=rope_table(40, WIDTH))
    for b, (start, n) in enumerate(zip(starts, new, strict=True)):
        site.clock[b, Clock.NEW], site.clock[b, Clock.PEEK], site.clock[b, Clock.START] = n, peek if n else 0, start
    return site


@pytest.mark.parametrize("backend", ATTEND)
@pytest.mark.parametrize("peek", [0, 2])
@quick
@given(case=cases(tokens=6))
def test_a_piece_reads_its_row_and_its_own_earlier_tokens(backend, peek, case):
    plan, rows, starts, new = case
    width = max(new) + peek
    q, k, v = (noise(i, len(new), heads, width, WIDTH) for i, heads in enumerate((4, 2, 2)))
    site = site_at(plan, rows, starts, new, peek)
    out = ATTEND[backend].attend_prefill(plan, site, q, k, v, SCALE)
    truth = torch.zeros_like(out).double()
    for b, n in enumerate(new):
        for j in range(n + peek if n else 0):
            column = width - n - peek + j
            for h in range(4):
                piece = [
                    Entry(starts[b] + i, k[b, h // 2, width - n - peek + i], v[b, h // 2, width - n - peek + i])
                    for i in range(n + peek)
                ]
                truth[b, column, h] = read(plan, rows[2 * b + h // 2] + piece, q[b, h, column], starts[b] + j)
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)
    for b, n in enumerate(new):  # the newest queries lie in the ring as the model gave them
        for i in range(max(0, n - 3), n):
            assert torch.equal(site.ring[b, :, (starts[b] + i) % 3], q[b, :, width - n - peek + i])
    assert [int(n) for n in site.length] == [len(row) for row in rows]


@pytest.mark.parametrize("backend", ATTEND)
@quick
@given(case=cases(tokens=1))
def test_a_step_appends_its_entry_and_reads_the_row(backend, case):
    plan, rows, starts, new = case
    q, k, v = (noise(i, len(new), heads, 1, WIDTH) for i, heads in enumerate((4, 2, 2)))
    site = site_at(plan, rows, starts, new)
    out = ATTEND[backend].attend_step(plan, site, q, k, v, SCALE, {})
    truth = torch.zeros_like(out).double()
    for b, n in enumerate(new):
        for h in range(4 if n else 0):
            row = [*rows[2 * b + h // 2], Entry(starts[b], k[b, h // 2, 0], v[b, h // 2, 0])]
            truth[b, 0, h] = read(plan, row, q[b, h, 0], starts[b])
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)
    for r, row in enumerate(rows):
        b = r // 2
        found = entries(site, r)
        assert [e.pos for e in found] == [e.pos for e in row] + [starts[b]] * new[b]
        if new[b]:  # the key is stored as the model gave it, for one token
            assert torch.equal(found[-1].k, k[b, r % 2, 0]) and found[-1].count == 1


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("step", [False, True])
def test_sixteen_bits_agree_between_the_backends(folds, compact, step):
    plan = plan_of(FOLD if folds else (), compact=compact, dtype="bfloat16")
    rows = [[Entry(p, *noise(40 * r + p, 2, WIDTH).bfloat16()) for p in range(20 - 3 * r)] for r in range(4)]
    if folds:
        for row in rows:
            row.insert(3, Entry(-1, *noise(1, 2, WIDTH).bfloat16(), 100.0))
    n = 1 if step else 5
    q, k, v = (noise(i, 2, heads, n, WIDTH).bfloat16() for i, heads in enumerate((4, 2, 2)))

    def ask(backend) -> torch.Tensor:
        site = site_at(plan, rows, [20, 20], [n, n])
        if step:
            return backend.attend_step(plan, site, q, k, v, SCALE, {})
        return backend.attend_prefill(plan, site, q, k, v, SCALE)

    a, b = (ask(backend) for backend in ATTEND.values())
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ATTEND)
def test_a_folded_entry_weighs_as_all_the_tokens_that_it_stands_for(backend):
    """Twelve equal entries, and one without position with count 12: the same answer."""
    k, v, other = noise(1, WIDTH), noise(2, WIDTH), [Entry(p, *noise(9 + p, 2, WIDTH)) for p in range(20, 26)]
    many = [Entry(p, k, v) for p in range(12)]
    q, key, value = (noise(i, 1, heads, 1, WIDTH) for i, heads in enumerate((4, 2, 2)))
    plan, results = plan_of(FOLD), []
    for row in ([*many, *other], [*other, Entry(-1, k, v, 12.0)]):
        site = site_at(plan, [row, row], [26], [1])
        results.append(ATTEND[backend].attend_step(plan, site, q, key, value, SCALE, {}))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
