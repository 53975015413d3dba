"""Head scores as files: exact counts with fixed ties, exact round trips, errors with the way out; published masks."""

from __future__ import annotations

import json
import os
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvcompile.dsl import PolicyError
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import ModelFacts
from kvcompile.learning.masks import HeadScores, load_scores, part_of, provenance
from kvcompile.passes import compile_policy
from tests.models import random_model

TENTHS = [Fraction(n, 10) for n in range(1, 10)]


def drawn(layers: int = 32, heads: int = 8, *, levels: int = 0, seed: int = 0) -> HeadScores:
    """Random scores; with `levels`, of that many different values, so that most of them are ties."""
    rng = random.Random(seed)
    number = (lambda: rng.randrange(levels) / levels) if levels else rng.random
    return HeadScores(tuple(tuple(number() for _ in range(heads)) for _ in range(layers)))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("levels", [0, 2, 1])
@pytest.mark.parametrize("keep", TENTHS, ids=str)
def test_the_number_of_heads_is_exact_whatever_is_a_tie(keep: Fraction, levels: int) -> None:
    scores = drawn(levels=levels)
    wanted = keep.numerator * 256 // keep.denominator
    chosen = scores.chosen(keep)
    assert len(chosen) == wanted
    assert sum(map(sum, scores.mask(keep))) == wanted
    assert chosen == drawn(levels=levels).chosen(float(keep)) == scores.chosen(f"{float(keep):.0%}")


def test_a_part_is_what_is_written_not_what_a_float_holds() -> None:
    assert Fraction(0.3) < Fraction(3, 10)  # what the nearest float is: one head less of ten
    scores = drawn(2, 5)
    for keep in (0.3, "0.3", "30%", ".3", "3/10", Fraction(3, 10)):
        assert len(scores.chosen(keep)) == 3
    assert len(scores.chosen(1 - 0.9)) == 0  # 0.09999999999999998 was written
    assert part_of("1e-2") == Fraction(1, 100) and part_of("12.5%") == Fraction(1, 8)
    assert scores.chosen(0) == set() and len(scores.chosen(1)) == len(scores.chosen("100%")) == 10


@pytest.mark.parametrize(
    "keep",
    [-0.1, 1.5, float("nan"), "150%", "", "many", "1/0", "1e9", "1e-999999999", "0" * 99, "3/2", True, Fraction(2)],
)
def test_what_is_no_part_is_refused(keep: object) -> None:
    with pytest.raises(KvCompileError, match="no part of the heads"):
        part_of(keep)  # type: ignore[arg-type]


def test_ties_go_to_the_lower_layer_then_the_lower_head() -> None:
    scores = HeadScores(((0.5, 1.0, 1.0), (1.0, 1.0, 0.25)))
    assert scores.chosen(Fraction(1, 2)) == {(0, 1), (0, 2), (1, 0)}
    assert scores.mask(Fraction(1, 2)) == ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0))


def quantile_mask(values: list[float], sparsity: float) -> int:
    """How many heads the published rounding keeps, by its formula: those at or above the quantile, noise aside."""
    ordered = sorted(values)
    place = sparsity * (len(values) - 1)
    low = int(place)
    threshold = ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])
    return sum(value >= threshold for value in values)


def test_a_mask_that_is_ranked_again_stays_as_it_is() -> None:
    """The published loader takes a quantile of 0/1 masks, after adding noise: 77 heads where 76 are marked."""
    mask = HeadScores(drawn().mask(Fraction(3, 10)))
    marked = {(i, j) for i, row in enumerate(mask.values) for j, value in enumerate(row) if value}
    assert len(marked) == 76
    assert mask.chosen(Fraction(3, 10)) == marked
    rng = random.Random(1)
    noisy = [value + rng.uniform(0, 1e-6) for row in mask.values for value in row]
    assert quantile_mask(noisy, 0.7) == 77


# ---------------------------------------------------------------- files


def test_text_holds_the_scores_to_their_last_digit(tmp_path: Path) -> None:
    scores = HeadScores(((1 / 3, -1e-300, 0.0), (5e-324, 1.7e308, 1.0)))
    path = scores.save(tmp_path / "heads.tsv")
    assert path.read_text() == "0.3333333333333333\t-1e-300\t0.0\n5e-324\t1.7e+308\t1.0\n"
    assert load_scores(path) == scores


def test_text_with_a_part_is_the_published_mask(tmp_path: Path) -> None:
    path = HeadScores(((0.1, 0.9), (0.8, 0.2))).save(str(tmp_path / "masks.tsv"), "50%")
    assert path.read_bytes() == b"0.0\t1.0\n1.0\t0.0\n"
    assert load_scores(path).values == ((0.0, 1.0), (1.0, 0.0))


def test_safetensors_hold_scores_mask_and_where_they_come_from(tmp_path: Path) -> None:
    told = provenance(random_model(), method="learn", data="tales", steps=7, seed=3, metrics={"loss": 0.5})
    scores = HeadScores(tuple(tuple(float(torch.tensor(x)) for x in row) for row in drawn(4, 2).values), told)
    path = scores.save(tmp_path / "heads.safetensors", 0.3)
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["mask", "scores"]
        mask, held = file.get_tensor("mask"), file.get_tensor("scores")
        said = json.loads(file.metadata()["kvcompile"])
    assert mask.dtype == torch.uint8 and held.dtype == torch.float32
    assert held.tolist() == [list(row) for row in scores.values]
    assert {(i, j) for i, j in mask.nonzero().tolist()} == scores.chosen(0.3) and int(mask.sum()) == 2
    assert said == {**told, "keep": "3/10"} and said["steps"] == 7 and said["metrics"] == {"loss": 0.5}
    wanted = "format version model data policy digest gate steps seed keep metrics versions"
    assert set(wanted.split()) <= set(said)
    loaded = load_scores(path)
    assert loaded.values == scores.values and loaded.provenance == said
    assert path.read_bytes() == loaded.save(tmp_path / "again.safetensors", "30%").read_bytes()


def test_both_files_name_the_same_heads_to_a_policy(tmp_path: Path) -> None:
    scores, facts = drawn(3, 4), ModelFacts(3, 8, 4, 32)
    owners = []
    for name in ("masks.tsv", "masks.safetensors"):
        path = scores.save(tmp_path / name, Fraction(1, 3))
        text = 'heads far = table("T")\n\npolicy p():\n    far: keep all\n    rest: keep recent(4)\n    at step\n'
        owners.append(compile_policy(text, facts, tables={"far": path}).plan.class_of)
    for name in ("scores.tsv", "scores.safetensors"):
        path = scores.save(tmp_path / name)
        owners.append(compile_policy("prulong", facts, tables={"retrieval": path}).plan.class_of)
    chosen = {(i, j) for i, row in enumerate(owners[0]) for j, owner in enumerate(row) if owner == 0}
    assert chosen == scores.chosen(Fraction(1, 3)) and owners[1] == owners[0]
    chosen = {(i, j) for i, row in enumerate(owners[2]) for j, owner in enumerate(row) if owner == 0}
    assert chosen == scores.chosen(0.3) and owners[3] == owners[2]


def test_a_file_is_replaced_in_one_step_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = drawn(2, 2).save(tmp_path / "heads.tsv")
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(KvCompileError, match=r"cannot write .*heads.tsv: No space left"):
        drawn(2, 2, seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["heads.tsv"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    scores = drawn(2, 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(KvCompileError, match=r"no/where is no folder; make it first"):
        scores.save(tmp_path / "no" / "where" / "heads.tsv")
    with pytest.raises(KvCompileError, match="file is no folder"):
        scores.save(tmp_path / "file" / "heads.tsv")
    with pytest.raises(KvCompileError, match="cannot write"):
        scores.save(tmp_path / "folder.tsv")
    with pytest.raises(KvCompileError, match=r"'heads.csv'.*\.tsv.*\.safetensors"):
        scores.save(tmp_path / "heads.csv")
    with pytest.raises(KvCompileError, match="too large for float32"):
        HeadScores(((1e300,),)).save(tmp_path / "heads.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.tsv"]


@pytest.mark.parametrize("values", [(), ((),), ((1.0, 2.0), (1.0,)), ((1.0, float("nan")),), ((float("inf"),),)])
def test_scores_are_a_full_table_of_numbers(values: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(KvCompileError, match=r"same number of KV heads|no number"):
        HeadScores(values)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("none.tsv", None, "K610"),
        ("empty.tsv", b"", "K612"),
        ("blank.tsv", b"\n\n1\t2\n", "K612"),
        ("ragged.tsv", b"1\t2\n3\n", "K612"),
        ("words.tsv", b"layer\thead\n1\t2\n", "K611"),
        ("binary.tsv", b"\xff\xfe\x00", "K610"),
        ("large.tsv", b"1\n" * (3 << 20), "K610"),
        ("none.safetensors", None, "K610"),
        ("text.safetensors", b"1\t2\n", "K610"),
        ("longer.safetensors", b"\xff" * 64, "K610"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes | None, code: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        load_scores(path)
    assert caught.value.diagnostics[0].code == code and name in str(caught.value)


def test_tensors_that_are_no_head_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for tensors in ({"w": torch.zeros(2, 2)}, {"scores": torch.zeros(4)}, {"scores": torch.full((2, 2), torch.nan)}):
        save_file(tensors, path)
        with pytest.raises(PolicyError):
            load_scores(path)


# ---------------------------------------------------------------- the published masks

# Name -> KV heads a layer; mean, part above 0.5; heads at 1.0; heads at 0.99 or more, where that has been counted.
PUBLISHED = {
    "Meta-Llama-3.1-8B-Instruct": (8, 0.852, 0.91, 57, 77),
    "Llama-3-8B-Instruct-Gradient-1048k": (8, 0.769, 0.81, 82, None),
    "Llama-3-8B-Instruct-Gradient-4194k": (8, 0.775, 0.81, 80, None),
    "Mistral-7B-Instruct-v0.2": (8, 0.923, 0.95, 110, None),
    "Mistral-7B-Instruct-v0.3": (8, 0.905, 0.94, 107, None),
    "Llama-2-7B-32K-Instruct": (32, 0.419, 0.43, 145, None),
}


@pytest.fixture(scope="module")
def published() -> Path:
    """The folder of DuoAttention's patterns, which are not ours to ship."""
    folder = Path(os.environ.get("KVC_SHARED_DATA", "")) / "duo_attention_patterns"
    if not os.environ.get("KVC_SHARED_DATA") or not folder.is_dir():
        pytest.skip("KVC_SHARED_DATA names no folder with duo_attention_patterns")
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_are_read_as_they_are(published: Path, name: str, tmp_path: Path) -> None:
    heads, mean, above, ones, nearly = PUBLISHED[name]
    scores = load_scores(published / name / "full_attention_heads.tsv")
    values = [value for row in scores.values for value in row]
    assert len(scores.values) == 32 and {len(row) for row in scores.values} == {heads}
    assert sum(values) / len(values) == pytest.approx(mean, abs=5e-4)
    assert sum(value > 0.5 for value in values) / len(values) == pytest.approx(above, abs=6e-3)
    assert values.count(1.0) == ones
    assert nearly is None or sum(value >= 0.99 for value in values) == nearly
    for file in ("copy.tsv", "copy.safetensors"):
        assert load_scores(scores.save(tmp_path / file)).values == scores.values


def test_more_than_a_quarter_of_llama_2s_heads_came_down_to_zero(published: Path) -> None:
    scores = load_scores(published / "Llama-2-7B-32K-Instruct" / "full_attention_heads.tsv")
    assert sum(value <= 0 for row in scores.values for value in row) / 1024 == pytest.approx(0.27, abs=5e-3)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("keep", [Fraction(1, 5), Fraction(1, 10)], ids=["20%", "10%"])
def test_where_the_cut_falls_among_ties_the_count_is_exact_and_the_heads_always_the_same(
    published: Path, name: str, keep: Fraction
) -> None:
    path = published / name / "full_attention_heads.tsv"
    scores = load_scores(path)
    wanted = scores.heads * keep.numerator // keep.denominator
    chosen = scores.chosen(keep)
    assert len(chosen) == wanted == sum(map(sum, scores.mask(keep)))
    assert chosen == load_scores(path).chosen(keep)
    ones = [(i, j) for i, row in enumerate(scores.values) for j, value in enumerate(row) if value == 1.0]
    if wanted <= len(ones):  # the cut falls among heads at 1.0: the first in order of layers and heads
        assert chosen == set(ones[:wanted])
    else:
        assert (name, keep) == ("Llama-2-7B-32K-Instruct", Fraction(1, 5)) and set(ones) < chosen
