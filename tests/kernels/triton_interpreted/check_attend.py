"""Attention of a piece on the interpreter, against a dense mask in float64: ragged paged past, padding, local heads,
lists of blocks, variants of attention; which blocks are visited and in which order; the whole backend."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels import reference
from kvcompile.kernels.choose import prefill_spec, unprintable
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import ModelFacts, PolicyPlan, Region
from kvcompile.kernels.triton_backend import backend
from kvcompile.kernels.triton_backend.attend import LONG, attend, file_queries, library_reads, variant
from kvcompile.kernels.tuning_space import with_config
from kvcompile.passes.pipeline import compile_policy
from kvcompile.verify import verify
from tests.driving import LIBRARY, Sizes, examples
from tests.kernels.triton_interpreted.plans import Pools, module, plan, varied
from tests.models import tokens

M, N, LISTED = 32, 16, 32  # tiles small enough that a short piece has several
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def kernel(p: PolicyPlan, place: Path, listed: int = 0) -> ModuleType:
    return module(p, with_config(prefill_spec(p, listed=listed), (("block_m", M), ("block_n", N))), place)


@dataclass
class Case:
    """A piece of some sequences; every field as `launch` takes it. `past`: positions that each row holds.

    reach: the window of layer 1, which reads; layer 0 has another. None: no layer has one.
    """

    group: int = 2
    size: int = 64
    dtype: torch.dtype = torch.float32
    columns: int = 40
    new: list[int] = field(default_factory=lambda: [40, 23])
    peek: list[int] = field(default_factory=lambda: [0, 5])
    past: list[list[int]] = field(default_factory=lambda: [[], [3, 1, 2], list(range(40)), [9]])
    start: list[int] = field(default_factory=lambda: [50, 41])
    spans: list[tuple[int, int]] | None = None  # first and window of each row
    lists: list[list[list[int]] | None] | None = None  # of each row and block of queries
    softcap: float = 0.0
    sinks: bool = False
    reach: int | None = None
    packed: bool = True  # whether the heads of a group share a tile
    seed: int = 0

    @property
    def heads(self) -> int:
        return len(self.past) // len(self.new)

    @property
    def plan(self) -> PolicyPlan:
        name = str(self.dtype).removeprefix("torch.")
        made = plan((Region("all"),), kv_heads=self.heads, group=self.group, head_dim=self.size, dtype=name)
        return varied(made, self.softcap, self.sinks, () if self.reach is None else (3, self.reach))

    def module(self, place: Path) -> ModuleType:
        return kernel(self.plan, place, LISTED if self.lists is not None else 0)

    def sees(self, row: int) -> torch.Tensor:
        """bool [queries, past, then the piece]: what each query of a row reads, by the definition."""
        b = row // self.heads
        n, start = self.new[b] + self.peek[b], self.start[b]
        places = [*self.past[row], *range(start, start + n)]
        made = torch.zeros(n, len(places), dtype=torch.bool)
        first, window = self.spans[row] if self.spans else (0, 0)
        mine = self.lists[row] if self.lists else None
        for j in range(n):
            for e, at in enumerate(places):
                t = e - len(self.past[row])  # of the piece, where it is not negative
                read = at < first or (at > start + j - window if window else mine is None or t < 0)
                if mine is not None and t >= 0:
                    read |= t // LISTED == j // LISTED or t // LISTED in mine[j // LISTED]
                made[j, e] = read and at <= start + j and (not self.reach or at > start + j - self.reach)
        return made


def compare(case: Case, place: Path, layer: int = 1) -> ModuleType:
    """Launch and hold output and log-sum-exp against the definition. Rows of another layer stand before."""
    made, rows, batch = case.module(place), len(case.past), len(case.new)
    made.SHORT = 1 << 20 if case.packed else 0
    pools = Pools(2 * rows, 8, case.size, states=0, dtype=case.dtype, seed=case.seed, spare=6 * rows)
    for row, positions in enumerate(case.past):
        pools.fill(layer * rows + row, positions)
    q = pools.randn(batch, case.columns, case.heads * case.group, case.size).transpose(1, 2)
    k, v = (pools.randn(batch, case.columns, case.heads, case.size).transpose(1, 2) for _ in range(2))
    clock = torch.zeros(batch, 6, dtype=torch.int64)
    clock[:, :3] = torch.tensor([case.new, case.peek, case.start]).T
    extra: dict[str, object] = {}
    whole = {"dtype": torch.int32}
    if case.spans is not None:
        extra |= {"first": torch.tensor([s[0] for s in case.spans], **whole)}
        extra |= {"window": torch.tensor([s[1] for s in case.spans], **whole)}
    if case.lists is not None:
        blocks = -(-case.columns // LISTED)
        extra["lists"] = torch.full((rows, blocks, blocks), 1 << 20, dtype=torch.int32)  # never to be followed
        extra["counts"] = torch.full((rows, blocks), -1, dtype=torch.int32)
        for row, mine in enumerate(case.lists):
            for block, chosen in enumerate(mine if mine is not None else ()):
                extra["counts"][row, block] = len(chosen)
                extra["lists"][row, block, : len(chosen)] = torch.tensor(chosen, **whole)
    sinks = torch.randn(2, case.heads * case.group, generator=pools.noise)
    site = SimpleNamespace(layer=torch.tensor([layer]), clock=clock, k=pools.k, v=pools.v, pos=pools.pos,
                           table=pools.table, length=pools.length, sink=sinks,
                           reach=torch.tensor(case.plan.facts.windows, dtype=torch.int32))  # fmt: skip
    extra |= variant(case.plan, site)  # type: ignore[arg-type]
    lse = torch.full((batch, case.heads * case.group, case.columns), 7.0)
    out = attend(made, site, q, k, v, case.size**-0.5, lse=lse, **extra)  # type: ignore[arg-type]
    assert out.shape == (batch, case.columns, case.heads * case.group, case.size) and out.dtype == case.dtype
    for row in range(rows):
        b, h = divmod(row, case.heads)
        mine, pad = slice(h * case.group, (h + 1) * case.group), case.columns - case.new[b] - case.peek[b]
        at = pools.slots(layer * rows + row)
        keys = torch.cat([pools.k[at], k[b, h, pad:]]).double()
        values = torch.cat([pools.v[at], v[b, h, pad:]]).double()
        logits = torch.einsum("gqd,nd->gqn", q[b, mine, pad:].double(), keys) * case.size**-0.5
        if case.softcap:
            logits = case.softcap * (logits / case.softcap).tanh()
        logits = logits.masked_fill(~case.sees(row), float("-inf"))
        if case.sinks:
            more = sinks[layer, mine, None, None].double().expand(-1, logits.shape[1], 1)
            logits, values = torch.cat([logits, more], 2), torch.cat([values, torch.zeros(1, case.size)])
        want = (logits.softmax(2) @ values).transpose(0, 1)
        assert not out[b, :pad].any() and bool((lse[b, :, :pad] == 7).all()), "a column without a token was written"
        if want.numel():
            assert (out[b, pad:, mine].double() - want).abs().max() < TOLERANCE[case.dtype]
            assert (lse[b, mine, pad:].double() - logits.logsumexp(2)).abs().max() < TOLERANCE[case.dtype]
    return made


@st.composite
def cases(draw: st.DrawFn, variants: bool = False) -> Case:
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    rows, columns = batch * heads, draw(st.integers(1, 70))
    peek = [draw(st.sampled_from([0, 0, 3])) for _ in range(batch)]
    lengths = [draw(st.one_of(st.just(0), st.integers(0, 90))) for _ in range(rows)]
    start = [draw(st.integers(90, 130)) if any(lengths) else draw(st.integers(0, 5)) for _ in range(batch)]
    group = draw(st.sampled_from([1, 2, 3, 4, 16]))
    pick = random.Random(draw(st.integers(0, 1 << 16)))
    span = st.tuples(st.sampled_from([0, 3, 40, 120]), st.sampled_from([0, 1, 7, 33, 60]))
    lists: list[list[list[int]] | None] | None = None
    if draw(st.booleans()):
        blocks = -(-columns // LISTED)
        lists = [
            None if draw(st.booleans()) else [pick.sample(range(j + 1), pick.randint(0, j + 1)) for j in range(blocks)]
            for _ in range(rows)
        ]
    return Case(
        group=group,
        size=draw(st.sampled_from([16, 64, 96])),
        columns=columns,
        new=[draw(st.integers(0, max(0, columns - extra))) for extra in peek],
        peek=[min(extra, columns) for extra in peek],
        past=[pick.sample(range(start[row // heads]), n) for row, n in enumerate(lengths)],
        start=start,
        spans=[draw(span) for _ in range(rows)] if draw(st.booleans()) else None,
        lists=lists,
        softcap=draw(st.sampled_from([0.0, 2.0])) if variants else 0.0,
        sinks=draw(st.booleans()) if variants else False,
        reach=draw(st.sampled_from([None, 0, 1, 9, 50])) if variants else None,
        packed=group > 4 or draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@given(case=cases())
@examples(10)
def test_a_piece_reads_what_it_may(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    compare(case, tmp_path_factory.mktemp("kernels"))


@given(case=cases(variants=True))
@examples(10)
def test_variants_of_attention(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    compare(case, tmp_path_factory.mktemp("kernels"))


@pytest.mark.slow
@given(case=cases(variants=True))
@examples(250)
def test_many_more(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    compare(case, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(("size", "group", "packed"), [(64, 1, False), (96, 4, True), (128, 2, False), (256, 3, True)])
def test_half_precision(tmp_path: Path, size: int, group: int, packed: bool) -> None:
    spans = [(0, 0), (4, 20), (45, 1), (0, 33)]
    past = [list(range(50)), [3, 1, 2], list(range(40)), []]
    compare(Case(group, size, torch.float16, past=past, spans=spans, packed=packed), tmp_path)


def visits(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Of each program in order: whether each block that it takes in is masked."""
    from triton.runtime.interpreter import interpreter_builder

    made = case.module(place)
    seen: dict[int, list[bool]] = {}
    absorb, grid = made.absorb, interpreter_builder

    def watched(*args: object) -> object:
        seen.setdefault(grid.grid_idx[0], []).append(bool(getattr(args[-1], "value", args[-1])))
        return absorb(*args)

    monkeypatch.setattr(made, "absorb", watched)
    compare(case, place)
    assert list(seen) == sorted(seen)
    return list(seen.values())


def test_dead_blocks_are_not_visited_and_the_longest_tiles_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = 3 * M + 6
    spans = [(0, 0), (0, 20), (5, 33), (0, 0), (0, 1), (32, 18)]
    past = [list(range(90)), list(range(78, 88)), [], [], [], []]
    case = Case(2, 16, columns=columns, new=[3 * M, 2 * M], peek=[0, 0], past=past, start=[90, 0], spans=spans,
                packed=False)  # fmt: skip
    taken = visits(case, tmp_path, monkeypatch)
    live, whole = 0, 0
    for row, span in enumerate(spans):
        sees, held = case.sees(row), len(past[row])
        for tile in sees.split(M):
            for part in (*tile[:, :held].split(N, 1), *tile[:, held:].split(N, 1)):
                live += bool(part.any())
                in_the_past = part.data_ptr() < tile[:, held:].data_ptr()
                whole += bool(part.all()) and part.shape[1] == N and not (in_the_past and span[1])
    assert sum(map(len, taken)) == live * case.group, "a dead block was visited, or a live one was not"
    assert sum(not masked for tile in taken for masked in tile) == whole * case.group
    sizes = [len(tile) for tile in taken]
    assert all(later <= size + 2 for i, size in enumerate(sizes) for later in sizes[i:]), f"{sizes}"
    assert sizes[0] == max(sizes) > 4 * min(sizes)


@pytest.mark.parametrize("reach", [20, 33])
def test_blocks_beyond_a_window_are_not_visited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: int) -> None:
    columns = 4 * M
    past = [list(range(90)), list(range(60, 90)), [], []]
    case = Case(2, 16, columns=columns, new=[columns, columns - 7], peek=[0, 0], past=past, start=[90, 0],
                reach=reach, packed=False)  # fmt: skip
    taken = visits(case, tmp_path, monkeypatch)
    live = 0
    for row, held in enumerate(map(len, past)):
        for tile in case.sees(row).split(M):
            live += sum(bool(part.any()) for part in (*tile[:, :held].split(N, 1), *tile[:, held:].split(N, 1)))
    assert sum(map(len, taken)) == live * case.group, "a dead block was visited, or a live one was not"


def test_the_ring_takes_the_newest_queries_of_every_sequence() -> None:
    noise = torch.Generator().manual_seed(3)
    for width in (0, 1, 4, 7):
        q = torch.randn(4, 2, 9, 8, generator=noise)
        new, peek, start = [9, 3, 0, 5], [0, 2, 0, 1], [0, 11, 4, 30]
        clock = torch.tensor([*zip(new, peek, start, strict=True)])
        rings = [torch.randn(4, 2, width, 8, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
        ours, theirs = (SimpleNamespace(ring=ring, clock=clock) for ring in rings)
        file_queries(ours, q)  # type: ignore[arg-type]
        for b in range(4):
            if new[b] + peek[b]:
                reference.file_queries(theirs, b, q[b, :, 9 - new[b] - peek[b] :], new[b], start[b])  # type: ignore[arg-type]
        assert torch.equal(*rings)


@pytest.mark.parametrize("name", ["prulong", "snapkv_chunked"])
def test_pieces_of_a_policy_are_read_by_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    sample = LIBRARY[name](Sizes(budget=8, chunk=9))
    model = sample.model()
    calls = []
    plain = reference.attend_prefill

    def watched(p: PolicyPlan, site: Site, *args: torch.Tensor) -> torch.Tensor:
        calls.append(site.paged)
        return plain(p, site, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "attend_prefill", watched)
    found = verify(model, sample.policy, torch.tensor([tokens(24)]), steps=1, backend="triton", compile="off",
                   **sample.options(tmp_path))  # fmt: skip
    assert found.ok, str(found)
    assert found.kept_fraction < 1
    assert not any(calls), "a piece on the triton backend was read by the reference"


def piece(
    tokens: int, new: list[int], peek: list[int], held: list[int], windows: tuple[int, int] = (0, 0)
) -> tuple[Site, tuple[torch.Tensor, ...]]:
    """A site of layer 1 of two whose rows hold so many entries, those of layer 0 some, and a piece of two KV heads."""
    pools = Pools(8, 4, 64, states=0, spare=20)
    for row, count in enumerate([9, 9, 9, 9, *held]):
        pools.fill(row, list(range(count)))
    clock = torch.zeros(2, 6, dtype=torch.int64)
    clock[:, :3] = torch.tensor([new, peek, [max(held)] * 2]).T
    names = ("k", "v", "pos", "frozen", "state", "table", "length", "free", "top")
    rest = {name: torch.zeros(0) for name in Site._fields} | {name: getattr(pools, name) for name in names}
    rest |= {"layer": torch.tensor([1]), "clock": clock, "ring": torch.zeros(2, 4, 3, 64)}
    site = Site(**(rest | {"reach": torch.tensor(windows, dtype=torch.int32), "sink": torch.zeros(2, 4)}))
    return site, (pools.randn(2, 4, tokens, 64), pools.randn(2, 2, tokens, 64), pools.randn(2, 2, tokens, 64))


@pytest.mark.parametrize(
    ("new", "peek", "held", "whole"),
    [
        ([20, 20], [0, 0], [0, 0, 0, 0], True),
        ([20, 15], [0, 5], [0, 0, 0, 0], True),
        ([20, 19], [0, 0], [0, 0, 0, 0], False),
        ([20, 20], [0, 0], [0, 0, 0, 7], False),
    ],
)
def test_a_whole_prompt_goes_to_torch_where_that_has_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: list[int], peek: list[int], held: list[int], whole: bool
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    p, taken = plan((Region("all"),)), []
    dense = backend.dense
    monkeypatch.setattr(backend, "dense", lambda *a: (taken.append(1), dense(*a))[1])
    results = []
    for asked in (False, True):
        monkeypatch.setattr(backend, "library_reads", lambda *_, asked=asked: asked)
        site, inputs = piece(20, new, peek, held)
        out = backend.Triton().attend_prefill(p, site, *inputs, 0.125)
        assert out.is_contiguous()
        results.append((out, site.ring))
        assert len(taken) == (asked and whole)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("cap", "sinks", "windows", "whole"),
    [
        (0.0, False, (5, 0), True),
        (0.0, False, (5, 20), True),
        (0.0, False, (0, 19), False),
        (2.0, False, (), False),
        (0.0, True, (), False),
    ],
)
def test_torch_reads_a_whole_prompt_only_where_that_means_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: float, sinks: bool, windows: tuple[int, int], whole: bool
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    p, taken = varied(plan((Region("all"),)), cap, sinks, windows), []
    dense = backend.dense
    monkeypatch.setattr(backend, "dense", lambda *a: (taken.append(1), dense(*a))[1])
    results = []
    for asked in (False, True):
        monkeypatch.setattr(backend, "library_reads", lambda *_, asked=asked: asked)
        site, inputs = piece(20, [20, 20], [0, 0], [0, 0, 0, 0], windows or (0, 0))
        results.append(backend.Triton().attend_prefill(p, site, *inputs, 0.125))
        assert len(taken) == (asked and whole)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_short_pieces_and_those_on_the_host_are_read_by_the_kernel() -> None:
    q = torch.zeros(1, 2, LONG, 16, dtype=torch.bfloat16)
    assert not library_reads(q, q, q)
    for length, has_kernel, expected in ((LONG, True, True), (LONG, False, False), (LONG - 1, True, False)):
        there = torch.zeros(1, 4, length, 16, dtype=torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda asked, has=has_kernel: has)
            assert library_reads(there, there[:, :2], there[:, :2]) is expected


def test_what_has_no_kernel_is_listed() -> None:
    facts = ModelFacts(2, 4, 2, 64)
    assert not [why for why in unprintable(compile_policy("snapkv", facts).plan) if "attention" in why]
    compact = unprintable(compile_policy("streaming_compact", facts).plan)
    assert "prefill attention: positions compact have no Triton form yet" in compact
