"""Heads that several processes hold: the same tokens and the same kept positions as one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.kernels import ranks
from tests.driving import LIBRARY, Sizes
from tests.parallel import SHAPE, divided, exchanges, generated, one, run, save_model, together

MASK = ((1, 0, 0, 1), (0, 1, 0, 0), (0, 0, 1, 1))
RANDOM = """
policy scattered(n=10):
    keep recent(4) | random(n, 7)
    at prefill.end, step
"""
SHARED = """
policy voted(n=12):
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep recent(4) | top(n) by acc shared heads
    at prefill.end, step
"""
JOINED = """
policy loudest(n=12):
    score s = max[h] max[g] mean[q in last(4)] attn
    keep recent(4) | top(n) by s shared heads
    at prefill.end
"""
FULL = """
policy filled(n=12):
    score s = mean[g] mean[q in last(4)] attn
    keep recent(4) | top(n) by s across heads floor 10%
    at prefill.end, full(40)
"""
OWN = {"scattered": RANDOM, "voted": SHARED, "loudest": JOINED, "filled": FULL}
ALONE = ("keep_all", "snapkv", "h2o", "prulong", "pyramidkv", "scattered")
JOINT = ("adakv", "voted", "loudest", "filled")
OTHERS = ("classed", *(name for name in LIBRARY if name not in ALONE + JOINT))


CLASSED = """
policy classed(n=10):
    few: keep recent(4) | top(n) by mean[g] mean[q in last(4)] attn across heads
    many: keep sink(2) | top(n) by mean[g] mean[q in last(4)] attn across heads floor 20%
    at prefill.end
heads few = table("mask.tsv", top=50%)
heads many = rest
"""


def written(path: Path) -> Path:
    """MASK as a table of heads."""
    path.write_text("\n".join("\t".join(map(str, row)) for row in MASK) + "\n")
    return path


def case(name: str, folder: Path) -> tuple[str, dict[str, Any], dict[str, object]]:
    """Policy, options of `optimize`, changes of the model."""
    if name in OWN:
        return OWN[name], {}, {}
    folder.mkdir(exist_ok=True)
    if name == "classed":
        return CLASSED, {"tables": {"few": str(written(folder / "mask.tsv"))}}, {}
    sample = LIBRARY[name](Sizes(budget=14, mask=MASK))
    sample = replace(sample, changes={**SHAPE, **sample.changes})
    return sample.policy, sample.options(folder), dict(sample.changes)


def runs(rank: int, cases: list[tuple[str, str, dict[str, Any], str]]) -> dict[str, Any]:
    """In each process: of every case what came out, and how many exchanges the run took."""
    found: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, policy, options, folder in cases:
        if folder not in models:
            models[folder] = divided(Path(folder))
        model = models[folder]
        kvcompile.optimize(model, policy, **options)
        before = exchanges(model)
        tokens, kept = run(model)
        found[name] = tokens, kept, exchanges(model) - before
    return found


def prepared(names: tuple[str, ...], tmp_path: Path, backend: str) -> tuple[list[Any], dict[str, Any]]:
    """What processes are to run, and what one process makes of it."""
    cases, expected = [], {}
    for name in names:
        policy, options, changes = case(name, tmp_path / name)
        folder = tmp_path / ("model" + "".join(str(v) for v in changes.values()))
        if not folder.exists():
            save_model(folder, **changes)
        options["backend"] = backend
        expected[name] = generated(one(folder), policy, options)
        cases.append((name, policy, options, str(folder)))
    return cases, expected


def agree(parts: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Asserts the same tokens in every process, and that the positions of their heads, in order, are the model's."""
    for name, (tokens, positions) in expected.items():
        assert all(part[name][0] == tokens for part in parts), name
        for b, layers in enumerate(positions):
            for layer, heads in enumerate(layers):
                kept = [tuple(head) for part in parts for head in part[name][1][b][layer]]
                assert kept == list(heads), f"{name}, sequence {b}, layer {layer}"


def compare(names: tuple[str, ...], world: int, tmp_path: Path, backend: str = "cpu") -> dict[str, int]:
    """Runs cases in one process and in `world`; returns the exchanges of each."""
    cases, expected = prepared(names, tmp_path, backend)
    parts = together(runs, world, cases, folder=tmp_path)
    agree(parts, expected)
    return {name: parts[0][name][2] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_processes_decide_as_one_under_every_other_library_policy(tmp_path: Path, backend: str) -> None:
    compare(OTHERS, 2, tmp_path, backend)


@pytest.mark.slow
def test_four_processes_of_which_some_have_no_head_of_a_class_decide_as_one(tmp_path: Path) -> None:
    compare(("prulong", "adakv", "voted", "classed"), 4, tmp_path)


def refused(rank: int, folder: str, table: str) -> dict[str, str]:
    """What each process says of calls that not all of them can make, and whether a right one works after each."""

    def said(policy: str, **options: Any) -> str:
        try:
            kvcompile.optimize(model, policy, **options)
        except kvcompile.KvCompileError as error:
            return str(error)
        except kvcompile.PolicyError as error:
            return error.diagnostics[0].code
        return "optimised"

    model = divided(Path(folder))
    found = {"policy": said(("snapkv", "h2o")[rank])}
    found["parameter"] = said("snapkv", budget=(128, 256)[rank])
    found["backend"] = said("snapkv", backend=("cpu", "reference")[rank])
    found["table"] = said("prulong", tables={"retrieval": (table, "/nowhere/mask.tsv")[rank]})
    found["limit"] = said("snapkv", max_bytes="1GiB")
    found["right"] = said("snapkv")
    return found


def uneven(rank: int, folder: str) -> str:
    """A world that does not divide the KV heads."""
    try:
        kvcompile.optimize(divided(Path(folder)), "keep_all")
    except kvcompile.KvCompileError as error:
        return str(error)
    return "optimised"


def left_alone(rank: int, folder: str) -> str:
    """One process ends while the other decides with it."""
    model = divided(Path(folder))
    kvcompile.optimize(model, SHARED)
    plan = kvcompile.inspect(model).plan
    if rank == 1:
        return "gone"
    try:
        ranks.gathered(plan, torch.zeros(2), ranks.everyone(plan))
    except kvcompile.KvCompileError as error:
        return str(error)
    return "went on"


def everything(rank: int, cases: list[Any], folder: str, table: str) -> dict[str, Any]:
    return {"runs": runs(rank, cases), "refused": refused(rank, folder, table), "alone": left_alone(rank, folder)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two processes did, and what one made of the same cases. Started once: most of the time is imports."""
    folder = tmp_path_factory.mktemp("two")
    cases, expected = prepared((*ALONE, *JOINT), folder, "cpu")
    return together(everything, 2, cases, cases[0][3], str(written(folder / "mask.tsv")), folder=folder), expected


def test_two_processes_decide_as_one(two: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    parts, expected = two
    agree([part["runs"] for part in parts], expected)


def test_processes_exchange_nothing_for_what_each_head_decides_alone(two: tuple[list[dict[str, Any]], Any]) -> None:
    for part in two[0]:
        made = {name: found[2] for name, found in part["runs"].items()}
        assert {name: made[name] for name in ALONE} == dict.fromkeys(ALONE, 0)
        assert all(made[name] > 0 for name in JOINT)


def test_processes_that_were_told_different_things_all_refuse(two: tuple[list[dict[str, Any]], Any]) -> None:
    first, second = (part["refused"] for part in two[0])
    for key in ("policy", "parameter", "backend"):
        assert first[key] == second[key]
        assert "the processes of one model were told different things" in first[key]
    assert "policy snapkv" in first["policy"] and "policy h2o" in first["policy"]
    assert "backend cpu" in first["backend"] and "backend reference" in first["backend"]


def test_what_one_process_cannot_do_none_does_and_the_next_call_works(two: tuple[list[dict[str, Any]], Any]) -> None:
    first, second = (part["refused"] for part in two[0])
    assert "process 1 of 2 could not optimise its heads" in first["table"] and second["table"].startswith("K")
    assert first["limit"] == second["limit"] and "max_bytes is not supported where several" in first["limit"]
    assert first["right"] == second["right"] == "optimised"


def test_a_process_that_ends_is_an_error_in_those_that_wait_for_it(two: tuple[list[dict[str, Any]], Any]) -> None:
    first, second = (part["alone"] for part in two[0])
    assert second == "gone"
    assert "could not reach those that hold the model's other heads" in first


@pytest.mark.slow
def test_a_world_that_does_not_divide_the_kv_heads_is_refused_in_every_process(tmp_path: Path) -> None:
    save_model(tmp_path / "model", num_key_value_heads=1)
    for said in together(uneven, 2, str(tmp_path / "model"), folder=tmp_path):
        assert "1 KV heads cannot be divided evenly over 2 processes" in said
