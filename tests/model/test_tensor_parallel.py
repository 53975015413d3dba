"""Heads that several processes hold: the same tokens, kept positions, logits and graphs as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.kernels import ranks
from tests.driving import LIBRARY
from tests.following import policy
from tests.models import tokens
from tests.parallel import divided, save_model, together
from tests.parallel_cases import ALL_READS, PAGES, SHARED, WINDOWS, agree, compare, prepared, runs, written
from tests.parallel_limits import HALVES, NEW, PROMPT, limited

ALONE = ("keep_all", "snapkv", "h2o", "prulong", "pyramidkv", "scattered")
JOINT = ("adakv", "voted", "loudest", "filled")
OTHERS = ("classed", *(name for name in LIBRARY if name not in ALONE + JOINT))
GRAPHED = ("keep_all", "snapkv", "adakv", "h2o", "prulong", "voted")
WINDOWED = tuple(f"{family} {name}" for family in WINDOWS for name in ("keep_all", "snapkv", "adakv", "h2o", "prulong"))
# What is run by default beside ALONE and JOINT; of the rest see the slow tests.
READ = ("quest", "pages of what adakv keeps", "off")
ALSO = ("adakv, eager", "granite_swa snapkv", "gemma2 adakv", *READ)
TOGETHER_READ = {
    "scope": policy(PAGES, "attend own page | top(2) pages by mean[g] dot(q, c) shared heads", "at chunk, step"),
    "condition": policy("attend sink(2) | recent(6)", "at step if mean[h] mean[g] cos(q, prev.q) < 0.6"),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_processes_decide_as_one_under_every_other_library_policy(tmp_path: Path, backend: str) -> None:
    compare(OTHERS, 2, tmp_path, backend)


@pytest.mark.slow
def test_two_processes_decide_as_one_by_the_definition(tmp_path: Path) -> None:
    compare((*ALONE, *JOINT), 2, tmp_path, "reference")


@pytest.mark.slow
def test_four_processes_of_which_some_have_no_head_of_a_class_decide_as_one(tmp_path: Path) -> None:
    compare(("prulong", "adakv", "voted", "classed"), 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_two_processes_run_the_graphs_of_one_without_a_break_or_a_recompile(tmp_path: Path, mode: str) -> None:
    found = compare(tuple(f"{name}, {mode}" for name in GRAPHED), 2, tmp_path)
    for name in found:
        breaks, recompiles, phases = found[name]["graphs"]
        assert (breaks, recompiles) == ([], 0), name
        assert {"prefill.end", "step"} <= set(phases), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_processes_read_as_one(tmp_path: Path, backend: str) -> None:
    compare(ALL_READS, 2, tmp_path, backend)


@pytest.mark.slow
def test_two_processes_keep_windows_and_sinks_as_one(tmp_path: Path) -> None:
    graphed = ("gemma2 adakv, eager", "granite_swa h2o, eager")
    compare(
        (*WINDOWED, *graphed, "gemma2 off where heads compete", "granite_swa pages of what adakv keeps"), 2, tmp_path
    )


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
    found["limit"] = said("snapkv", max_bytes=(None, "1GiB")[rank])
    found |= {name: said(text) for name, text in TOGETHER_READ.items()}
    found["right"] = said("snapkv")
    return found


def uneven(rank: int, folder: str) -> str:
    """A world that does not divide the KV heads."""
    try:
        kvcompile.optimize(divided(Path(folder)), "keep_all")
    except kvcompile.KvCompileError as error:
        return str(error)
    return "optimised"


def saved(rank: int, folder: str) -> dict[str, Any]:
    """Each process saves its heads, goes on from what it loads, and tries the other's file."""

    def more(cache: Any) -> list[list[int]]:
        options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache}
        return model.generate(made.sequences, **options).tolist()

    model, ids = divided(Path(folder)), torch.tensor([tokens(30)])
    kvcompile.optimize(model, SHARED, backend="cpu", compile="off")
    made = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    files = [Path(folder).parent / f"cache{i}.safetensors" for i in range(2)]
    kvcompile.save_cache(model, made.past_key_values, files[rank])
    goes_on = more(kvcompile.load_cache(model, files[rank])) == more(made.past_key_values)
    try:
        kvcompile.load_cache(model, files[1 - rank])
    except kvcompile.KvCompileError as error:
        return {"goes on": goes_on, "other": str(error)}
    return {"goes on": goes_on, "other": "loaded"}


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


def everything(rank: int, cases: list[Any], folder: str, table: str, halves: str) -> dict[str, Any]:
    found = {
        "runs": runs(rank, cases),
        "refused": refused(rank, folder, table),
        "limits": limited(rank, folder, halves),
    }
    return {**found, "saved": saved(rank, folder), "alone": left_alone(rank, folder)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two processes did, and what one made of the same cases. Started once: most of the time is imports."""
    folder = tmp_path_factory.mktemp("two")
    cases, expected = prepared((*ALONE, *JOINT, *ALSO), folder, "cpu")
    tables = str(written(folder / "mask.tsv")), str(written(folder / "halves.tsv", HALVES))
    return together(everything, 2, cases, cases[0][3], *tables, folder=folder), expected


def test_two_processes_decide_as_one(two: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    parts, expected = two
    agree([part["runs"] for part in parts], expected)


def test_processes_exchange_nothing_for_what_each_head_decides_alone(two: tuple[list[dict[str, Any]], Any]) -> None:
    for part in two[0]:
        made = {name: found["exchanges"] for name, found in part["runs"].items()}
        assert {name: made[name] for name in ALONE} == dict.fromkeys(ALONE, 0)
        assert made["quest"] == made["off"] == made["granite_swa snapkv"] == 0
        assert all(made[name] > 0 for name in (*JOINT, "gemma2 adakv", "pages of what adakv keeps"))


def test_graphs_of_two_processes_neither_break_nor_are_made_anew(two: tuple[list[dict[str, Any]], Any]) -> None:
    for part in two[0]:
        assert part["runs"]["adakv, eager"]["graphs"] == [[], 0, ["prefill.end", "step"]]


def test_processes_that_were_told_different_things_all_refuse(two: tuple[list[dict[str, Any]], Any]) -> None:
    first, second = (part["refused"] for part in two[0])
    for key in ("policy", "parameter", "backend", "limit"):
        assert first[key] == second[key]
        assert "the processes of one model were told different things" in first[key]
    assert "policy snapkv" in first["policy"] and "policy h2o" in first["policy"]
    assert "backend cpu" in first["backend"] and "backend reference" in first["backend"]


def test_what_one_process_cannot_do_none_does_and_the_next_call_works(two: tuple[list[dict[str, Any]], Any]) -> None:
    first, second = (part["refused"] for part in two[0])
    assert "process 1 of 2 could not optimise its heads" in first["table"] and second["table"].startswith("K")
    assert first["right"] == second["right"] == "optimised"


def test_heads_that_decide_together_what_they_read_are_refused(two: tuple[list[dict[str, Any]], Any]) -> None:
    for name in TOGETHER_READ:
        assert all("lets heads decide together what they read" in part["refused"][name] for part in two[0]), name


@pytest.mark.parametrize("layout", ["extents", "pages"])
def test_a_step_for_which_one_process_has_no_room_is_refused_in_both_and_goes_on_later(
    two: tuple[list[dict[str, Any]], Any], layout: str
) -> None:
    full, other = (part["limits"][layout]["step"] for part in two[0])
    assert full["said"].startswith("max_bytes is") and "process 0 of 2 has no room" in other["said"]
    assert full["made"] == other["made"] and PROMPT + 2 < full["made"] < PROMPT + NEW
    assert full["seen"] == other["seen"] == full["made"] - 1
    assert [len(head) for layer in full["rows"] for head in layer] == [full["seen"]] * 6
    assert [len(head) for layer in other["rows"] for head in layer] == [10] * 6
    assert full["goes on"] and other["goes on"]


@pytest.mark.parametrize("layout", ["extents", "pages"])
def test_a_prompt_or_a_copy_for_which_one_process_has_no_room_changes_nothing_in_either(
    two: tuple[list[dict[str, Any]], Any], layout: str
) -> None:
    full, other = (part["limits"][layout] for part in two[0])
    assert "120 tokens needs" in full["prefill"]["said"] and "process 0 of 2" in other["prefill"]["said"]
    assert full["prefill"]["seen"] == other["prefill"]["seen"] == 0
    assert full["select"]["unchanged"] and other["select"]["unchanged"]
    for kind in ("select", "clone"):
        assert full["select"]["told"][kind].startswith("max_bytes is"), kind
        assert "process 0 of 2 has no room" in other["select"]["told"][kind], kind
    assert full["select"]["top"] == other["select"]["top"] == [full["select"]["top"][0]] * 2


def test_each_process_goes_on_from_a_file_of_its_heads_and_refuses_that_of_others(
    two: tuple[list[dict[str, Any]], Any],
) -> None:
    for part in two[0]:
        assert part["saved"]["goes on"] and "other weights" in part["saved"]["other"]


def test_a_process_that_ends_is_an_error_in_those_that_wait_for_it(two: tuple[list[dict[str, Any]], Any]) -> None:
    first, second = (part["alone"] for part in two[0])
    assert second == "gone"
    assert "could not reach those that hold the model's other heads" in first


@pytest.mark.slow
def test_a_world_that_does_not_divide_the_kv_heads_is_refused_in_every_process(tmp_path: Path) -> None:
    save_model(tmp_path / "model", num_key_value_heads=1)
    for said in together(uneven, 2, str(tmp_path / "model"), folder=tmp_path):
        assert "1 KV heads cannot be divided evenly over 2 processes" in said
