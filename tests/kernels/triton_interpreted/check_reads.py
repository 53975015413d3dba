"""Landmarks, choices of units and reads by them on the interpreter, against each file's own torch and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime import interpreter

import kvcompile
from kvcompile.kernels.choose_listed import (
    listed_blocks,
    listed_decode,
    listed_marks,
    listed_piece,
    listed_specs,
    listed_units,
    unlisted,
)
from kvcompile.kernels.plan import ClassPlan, ModelFacts, Region
from kvcompile.kernels.triton_backend import reads
from kvcompile.kernels.tuning_space import default, with_config
from kvcompile.passes import compile_policy
from tests.driving import drive, examples, one_by_one
from tests.kernels.triton_interpreted.plans import STEP, module
from tests.kernels.triton_interpreted.read_plans import CHUNK, EVERY, moba, quest
from tests.kernels.triton_interpreted.watching import fallbacks
from tests.models import random_model, tokens

WINDOW = ClassPlan("some", (Region("sink", 0), Region("recent", 0)), (STEP,), (), True)


def some(names: object, often: tuple[str, ...]) -> list[object]:
    """As parameters; the interpreter takes seconds for each, so all but a few are slow."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in names]  # type: ignore[attr-defined]


@pytest.mark.parametrize("odd", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some(EVERY, ("infllm", "power")))
def test_every_file_of_a_read_passes_its_own_check(tmp_path: Path, name: str, odd: bool) -> None:
    plan = EVERY[name](group=3, head_dim=96) if odd else EVERY[name]()
    templates = {"units", "spans", "chosen", "blocks"} | ({"marks"} if name not in ("power", "fixed") else set())
    if name == "share":  # a stride beside a choice
        templates -= {"chosen", "blocks"}
        assert all("prefill attention: a choice beside the region stride" in reason for reason in unlisted(plan))
    else:
        assert unlisted(plan) == ()
    specs = listed_specs(plan)
    assert {spec.template for spec in specs} == templates
    for spec in specs:
        assert module(plan, spec, tmp_path).check() == 0, spec.name


CHOOSE = ("quest", "moba", "infllm", "seer", "cover")


@pytest.mark.parametrize("name", some(CHOOSE, ("seer",)))
def test_a_kv_head_with_one_query_head_chooses_as_the_definition_does(tmp_path: Path, name: str) -> None:
    plan = EVERY[name](group=1)
    for spec in (listed_units(plan, 0), listed_piece(plan, 0)):
        assert module(plan, spec, tmp_path).check() == 0, spec.name


def unequal(made: Any, inputs: dict[str, Any]) -> list[str]:
    """Which results of a launch are not exactly what the file's own torch says."""
    wanted = made.reference(**inputs)
    seen = made.observe(inputs, made.launch(**inputs))
    return [name for name, want in wanted.items() if not torch.equal(seen[name], want)]


@examples(4)
@given(st.data())
@pytest.mark.parametrize("name", some(EVERY, ("quest", "cover")))
def test_spans_are_those_of_the_definition_for_any_length_and_ties(tmp_path_factory, name: str, data) -> None:  # type: ignore[no-untyped-def]
    plan = EVERY[name]()
    made = module(plan, listed_units(plan, 0), tmp_path_factory.getbasetemp())
    inputs = made.example("cpu", torch.float32, small=True)
    inputs["table"][2:] = inputs["table"][:2]  # the example's other rows are short; these hold as many entries
    longest = int(inputs["length"].max())
    for b in range(2):
        held = data.draw(st.integers(0, longest), label="entries")
        inputs["length"][2 * b : 2 * b + 2], inputs["now"][b] = held, held
    inputs["prompt"][:] = data.draw(st.integers(0, longest), label="prompt")
    inputs["counts"][:] = data.draw(st.integers(0, 7), label="count")
    if "marks" in inputs:
        inputs["marks"], inputs["q"] = inputs["marks"].round(), inputs["q"].round()  # so that whole scores tie
    assert not unequal(made, inputs)


@pytest.mark.slow
@examples(4)
@given(st.data())
@pytest.mark.parametrize("name", [name for name in EVERY if name != "share"])
def test_lists_of_a_piece_are_those_of_the_definition(tmp_path_factory, name: str, data) -> None:  # type: ignore[no-untyped-def]
    plan = EVERY[name]()
    made = module(plan, listed_piece(plan, 0), tmp_path_factory.getbasetemp())
    inputs = made.example("cpu", torch.float32, small=True)
    for b in range(2):
        held = data.draw(st.integers(0, 75), label="entries")
        inputs["length"][2 * b : 2 * b + 2], inputs["start"][b] = held, held
        inputs["new"][b] = data.draw(st.integers(0, 90), label="tokens")
    inputs["counts"][:] = data.draw(st.integers(0, 7), label="count")
    if "marks" in inputs:
        inputs["marks"], inputs["q"] = inputs["marks"].round(), inputs["q"].round()
    assert not unequal(made, inputs)


HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def real_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 as integers: here it multiplies the numbers."""
    plain = interpreter.InterpreterBuilder.create_dot

    def number(of: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if of.dtype.scalar != tl.bfloat16:
            return of
        return interpreter.TensorHandle((of.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, number(a), number(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", some(("moba", "infllm", "cover"), ("moba",)))
def test_a_piece_of_half_precision_chooses_by_all_bits_of_its_landmarks(
    tmp_path: Path, real_dots: None, name: str, dtype: torch.dtype
) -> None:
    """Units differ in the last bits of 19, which only three parts of bfloat16 hold, and no sum of products rounds;
    where a softmax follows, which rounds, they differ by more."""
    plan = EVERY[name](head_dim=16, dtype=str(dtype).removeprefix("torch."))
    made = module(plan, listed_piece(plan, 0), tmp_path)
    inputs = made.example("cpu", dtype, small=True)
    if name == "moba":
        inputs["marks"] = inputs["marks"].round().clamp(-3, 3) + 2**18 + 2**9
    inputs["q"] = inputs["q"].clamp(-1, 1).round()
    assert not unequal(made, inputs)


@pytest.mark.parametrize("dtype", HALVES)
def test_landmarks_of_any_size_are_taken_apart_without_loss(
    tmp_path: Path, real_dots: None, dtype: torch.dtype
) -> None:
    plan = moba(head_dim=16, dtype=str(dtype).removeprefix("torch."))
    made = module(plan, listed_piece(plan, 0), tmp_path)
    inputs = made.example("cpu", dtype, small=True)
    inputs["by"][3] = -1  # this row asks nothing of landmarks
    sizes = torch.tensor([1e-30, 1e-6, 1.0, 1e6, 1e30])
    inputs["marks"] *= sizes[torch.arange(inputs["marks"].shape[2]) % 5][:, None]
    inputs["marks"][0, 0, 0, 3], inputs["marks"][0, 1, 1, 4], inputs["marks"][1, 0, 2] = float("inf"), float("nan"), 0.0
    inputs["marks"][1, 0, 3, :2] = torch.tensor([3.4028234663852886e38, 1e-38])
    made.launch(**inputs)
    split, scales = inputs["out"]["split", 0]
    assert split.dtype == dtype and split.shape[1:3] == (1, 3)
    for row in range(3):
        b, h = divmod(row, 2)
        marked = (75 + int(inputs["new"][b])) // made.MARK_SIZE
        want = inputs["marks"][h, b].reshape(-1, made.CHANNELS)[:marked].double()
        parts = split[row, 0, :, :marked].double()
        parts[1:] = parts[1:].where(want.isfinite(), 0.0)  # a product takes the largest part for what is not finite
        seen = parts.sum(0) * scales[row, 0, :marked].double()[:, None]
        whole = want.isfinite().all(1)
        largest = want.abs().amax(1, keepdim=True)
        assert torch.equal(seen[~whole].isfinite(), want[~whole].isfinite()) and (row or int((~whole).sum()) == 1)
        assert bool(((seen - want).abs() <= 2.0**-23 * (want.abs() + 2.0**-15 * largest))[whole].all())


@pytest.mark.parametrize("form", ["step", pytest.param("piece", marks=pytest.mark.slow)])
def test_more_units_than_registers_hold_are_chosen_alike(tmp_path: Path, form: str) -> None:
    plan = moba(size=1, n=7)
    made = module(plan, listed_units(plan, 0) if form == "step" else listed_piece(plan, 0), tmp_path)
    inputs = made.example("cpu", torch.float32, small=True)
    inputs["marks"], inputs["q"] = inputs["marks"].round(), inputs["q"].round()
    if form == "step":
        made.KEPT, made.BLOCK = 4, 4
    else:
        made.KEPT, made.LOOPED = 128, 256
        inputs["new"][:] = torch.tensor([60, 0])
    assert not unequal(made, inputs)


def test_a_piece_in_stretches_reads_what_it_reads_in_one(tmp_path: Path) -> None:
    plan = moba(size=8)
    choose, attend = (module(plan, spec, tmp_path) for spec in (listed_piece(plan, 0), listed_blocks(plan)))
    choose.WHOLE_TILES = 32
    inputs = choose.example("cpu", torch.float32, small=True)
    inputs["by"][1] = -1  # reads all
    whole = choose.launch(**inputs)
    wide = whole["bits"].shape[3] * 32
    inputs["out"] = choose.make_lists(inputs["q"], inputs["table"], inputs["length"], 2, 32, False, wide, limit=1)
    assert inputs["out"]["stretch"] == 32 and inputs["out"]["bits"].shape[2] == 32
    for x, begins_at in enumerate((0, 32, 64)):
        part = choose.launch(**inputs, begins_at=begins_at)
        assert torch.equal(part["totals"][:, :, 0], whole["totals"][:, :, x])
        for row in range(4):
            b, many = row // 2, int(part["totals"][row, 0, 0, 1])
            there = max(0, min(32, int(inputs["new"][b]) - begins_at))
            if row != 1:
                assert torch.equal(part["lists"][row, 0, 0, :many], whole["lists"][row, 0, x, :many])
                own = slice(begins_at, begins_at + there)
                assert torch.equal(part["bits"][row, :, :there, 0], whole["bits"][row, :, own, 0])
    asked = attend.example("cpu", torch.float32, small=True)
    queries, _ = attend.queries_of(asked["q"].shape[2])
    want, seen = attend.launch(**asked), torch.zeros_like(attend.launch(**asked))
    for x in range(asked["totals"].shape[2]):
        at, tile = slice(x * queries, (x + 1) * queries), slice(x, x + 1)
        part = {
            name: asked[name][:, :, of].contiguous() for name, of in (("lists", tile), ("totals", tile), ("bits", at))
        }
        attend.launch(**asked | part, begins_at=x * queries, out=seen)
    assert bool(want.any()) and torch.equal(seen, want)


@pytest.mark.slow
def test_a_prompt_in_stretches_gives_what_it_gives_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    model, prompt = random_model("llama64", num_hidden_layers=1), tokens(150, seed=5)
    whole = []
    for limit in (reads.TABLES, 1):
        monkeypatch.setattr(reads, "TABLES", limit)
        kvcompile.optimize(model, POLICIES["blocks"], backend="triton", compile="off")
        whole.append(drive(model, prompt)[0].logits)
        kvcompile.restore(model)
    assert torch.equal(*whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_over_spans_of_half_precision_is_as_near_as_one_over_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    plan = moba(size=8, dtype=str(dtype).removeprefix("torch."))
    made = module(plan, listed_decode(plan), tmp_path)
    inputs = made.example("cpu", dtype, small=True)
    want, seen = made.reference(**inputs)["out"], made.observe(inputs, made.launch(**inputs))["out"]
    assert (want.float() - seen.float()).abs().max() < (1e-5 if dtype == torch.float32 else 2e-3)


def test_a_tile_of_units_of_one_position_finds_the_bits_of_all_of_them(tmp_path: Path) -> None:
    """64 units from one that begins no word lie in three words."""
    plan = moba(size=1, dtype="float16")
    spec = listed_blocks(plan)
    made = module(plan, with_config(spec, tuple(sorted((dict(default(spec)) | {"block_n": 64}).items()))), tmp_path)
    assert made.BLOCK_N == 64 and int(made.example("cpu", torch.float32, small=True)["start"][0]) % 32
    assert made.check() == 0


def test_a_landmark_of_half_precision_is_the_extreme_itself(tmp_path: Path) -> None:
    plan = quest(dtype="float16")
    made = module(plan, listed_marks(plan), tmp_path)
    inputs = made.example("cpu", torch.float16, small=True)
    assert inputs["marks"].dtype == torch.float16 and not unequal(made, inputs)


def test_files_of_a_bfloat16_model_check_themselves_without_a_gpu(tmp_path: Path) -> None:
    plan = quest(dtype="bfloat16")
    for spec in (listed_marks(plan), listed_units(plan, 0), listed_piece(plan, 0)):
        assert module(plan, spec, tmp_path).check() == 0, spec.name


def test_landmarks_that_are_current_are_not_made_again(tmp_path: Path) -> None:
    made = module(plan := quest(), listed_marks(plan), tmp_path)
    inputs = made.example("cpu", torch.float32, small=True)
    made.launch(**inputs)
    first, marked = inputs["marks"].clone(), inputs["marked"].clone()
    inputs["k"].zero_()
    made.launch(**inputs)
    assert torch.equal(inputs["marks"], first) and torch.equal(inputs["marked"], marked)
    assert bool((marked == (2 * 16 + 5 + 16 + 9) // 16).all())


def test_rows_that_dropped_entries_are_found_by_position(tmp_path: Path) -> None:
    """Units with holes, an empty one and one that lost an entry since it was marked."""
    plan = quest(keep=WINDOW)
    marks, units = (module(plan, spec, tmp_path) for spec in (listed_marks(plan), listed_units(plan, 0)))
    inputs = marks.example("cpu", torch.float32, small=True)
    for name in ("k_new", "new", "peek"):
        del inputs[name]
    for lost in ([3, 4, 5], [3, 4, 5, *range(16, 32)], [0, 3, 4, 5, *range(16, 32)]):
        left = [p for p in range(37) if p not in lost]
        for row in range(4):
            at = inputs["table"][row, torch.arange(37) // 16].long() * 16 + torch.arange(37) % 16
            keys = torch.randn(37, 64, generator=torch.Generator().manual_seed(row))
            inputs["length"][row] = len(left)
            inputs["k"][at[: len(left)]], inputs["pos"][at[: len(left)]] = keys[left], torch.tensor(left).int()
        assert not unequal(marks, inputs)
        asked = units.example("cpu", torch.float32, small=True)
        asked |= {name: inputs[name] for name in ("pos", "table", "length", "marks", "edges", "layer", "readers")}
        asked["now"][:], asked["counts"][:] = 37, 1
        found = units.launch(**asked)
        for row in range(4):
            spans = found["spans"][:, row, : int(found["total"][row])].T.tolist()
            last = [span for span in spans if span[2] == -1]
            assert [left[e] for first, end, _ in last for e in range(first, end)] == list(range(32, 37))
            chosen = [span for span in spans if span[2] != -1]
            assert all(end > first for first, end, _ in chosen), "an empty unit was chosen"
            assert sum(bin(bits).count("1") for *_, bits in chosen) == 2, "each query head takes one page"


POLICIES = {
    "pages in steps": """
policy p(page=4, budget=8):
    unit page(page) with lo = min[i] k, hi = max[i] k
    score s = sum[d] max(q * lo, q * hi)
    layers 1..last: attend newest page | top(budget / page) pages by s per query_head
    at step
""",
    "blocks": """
policy p(size=8, n=3):
    unit block(size) with c = mean[i] k
    attend own block | top(n - 1) blocks by dot(q, c) per query_head
    at chunk, step
""",
    "blocks by kernels": """
policy p(n=2):
    unit kernel(8, stride=4) with c = mean[i] k
    unit block(8)
    score s = sum[g] softmax[u] dot(q, c)
    attend sink(3) | recent(6) | top(n) blocks by s per head
    at chunk(16), step
""",
    "blocks of prompts alone": """
policy p(size=8, n=3):
    unit block(size) with c = mean[i] k
    attend own block | top(n - 1) blocks by dot(q, c) per query_head
    at chunk
    attend all
    at step
""",
    "powers": """
policy p(size=4, n_sink=2, window=6):
    unit block(size)
    attend sink(n_sink) | recent(window) | pow2 block
""",
    "pages of what is kept": """
policy p(page=4, budget=8):
    unit page(page) with lo = min[i] k, hi = max[i] k
    score s = sum[d] max(q * lo, q * hi)
    attend newest page | top(budget / page) pages by s per query_head
    at step
    keep sink(3) | recent(17)
    at prefill.end, step
""",
    "a window that reads what is kept": """
policy p(size=4):
    unit block(size)
    attend sink(1) | recent(5) | pow2 block
    keep sink(3) | recent(11)
    at chunk(16), step
""",
}
TURNS = [tokens(37, seed=1), *one_by_one(tokens(3, seed=2)), tokens(7, seed=3), *one_by_one(tokens(1, seed=4))]


@pytest.mark.parametrize("name", some(POLICIES, ("blocks",)))
def test_a_model_reads_what_it_reads_by_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    model = random_model("llama64", num_hidden_layers=2)
    kvcompile.optimize(model, POLICIES[name], backend="reference", compile="off")
    truth = drive(model, *TURNS)
    kvcompile.restore(model)
    kvcompile.optimize(model, POLICIES[name], backend="triton", compile="off")
    with fallbacks() as taken:
        found = drive(model, *TURNS)
    for i, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
        assert ours.kept == theirs.kept, f"kept positions after call {i}"
        assert torch.allclose(ours.logits, theirs.logits, rtol=1e-5, atol=1e-4), f"logits of call {i}"
    assert not taken and kvcompile.inspect(model).unprintable == ()


def test_steps_that_read_all_need_no_kernels_of_lists() -> None:
    plan = compile_policy(POLICIES["blocks of prompts alone"], ModelFacts(2, 4, 2, 32)).plan
    assert [spec.template for spec in listed_specs(plan)] == ["marks", "chosen", "blocks"]
    assert unlisted(plan) == ()


def test_what_has_no_list_is_told() -> None:
    """A set that steps go on with: pieces have lists, steps have none."""
    reasons = unlisted(quest(triggers=(CHUNK,)))
    assert {reason.split(":")[0] for reason in reasons} == {"some, decode"}  # once, not of attention as well
    assert all("later steps go on with" in reason for reason in reasons)
