"""Learned masks come from anywhere: what is no such file, or another model's, is refused with file, tensor and need."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from kvcompile.dsl import PolicyError
from kvcompile.dsl.diagnostics import outside
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy, tables
from kvcompile.passes.masks import read_masks

FACTS = ModelFacts(2, 8, 4, 64)
SCORES = np.array([[0.5, 3.0, 3.0, -1.0], [3.0, 0.25, 0.0, 9.0]], np.float32)
MASK = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], np.uint8)
TOLD = {"model": "tales/seed0", "policy": "prulong"}


def written(tmp_path: Path, metadata: dict[str, str] | None = None, **arrays: np.ndarray[Any, Any]) -> Path:
    path = tmp_path / "heads.safetensors"
    path.write_bytes(save(arrays, metadata if metadata is not None else {"kvcompile": json.dumps(TOLD)}))
    return path


def chosen(path: Path, top: str = "") -> set[tuple[int, int]]:
    """The heads that a class takes of the file."""
    heads = f'heads far = table("{path}"{f", top={top}" if top else ""})\n'
    plan = compile_policy(f"{heads}policy p():\n    far: keep all\n    rest: keep recent(4)\n    at step\n", FACTS).plan
    far = [cls.name for cls in plan.classes].index("far") if "far" in [cls.name for cls in plan.classes] else -1
    return {(layer, head) for layer, row in enumerate(plan.class_of) for head, c in enumerate(row) if c == far}


def refused(path: Path, top: str = "30%") -> str:
    with pytest.raises(PolicyError) as caught:
        chosen(path, top)
    (finding,) = caught.value.diagnostics
    assert finding.hint
    return str(finding)


def test_without_a_threshold_the_mask_is_taken(tmp_path: Path) -> None:
    assert chosen(written(tmp_path, scores=SCORES, mask=MASK)) == {(0, 1), (1, 3)}


def test_with_a_threshold_the_scores_are_ranked_and_ties_go_to_the_lower_layer_then_head(tmp_path: Path) -> None:
    path = written(tmp_path, scores=SCORES, mask=MASK)
    assert chosen(path, "13%") == {(1, 3)}
    assert chosen(path, "25%") == {(0, 1), (1, 3)}
    assert chosen(path, "49%") == {(0, 1), (0, 2), (1, 3)}
    assert chosen(path, "50%") == {(0, 1), (0, 2), (1, 0), (1, 3)}
    whole = written(tmp_path, scores=np.array([[1, 0, 1, 1], [1, 1, 1, 1]], np.float32))
    assert chosen(whole, "50%") == {(0, 0), (0, 2), (0, 3), (1, 0)}  # gates that ended at 0 and 1 are ranked too


def test_a_mask_that_a_threshold_passes_over_is_told_of(tmp_path: Path) -> None:
    path = written(tmp_path, scores=SCORES, mask=MASK)
    span = outside("p.kvp")
    assert tables.heads_of_file(path, FACTS, Fraction(1, 4), span)[1] == []  # the same two
    _, (warning,) = tables.heads_of_file(path, FACTS, Fraction(1, 2), span)
    assert (warning.code, warning.severity) == ("K614", "warning")
    assert "marks 2 heads, and `top` takes 4 by their scores" in warning.message


def test_scores_alone_need_a_threshold(tmp_path: Path) -> None:
    text = refused(written(tmp_path, scores=SCORES), top="")
    assert "K613" in text and "heads.safetensors holds scores, but no mask" in text and "top=30%" in text


def test_a_mask_of_another_model_names_both_shapes_and_the_model(tmp_path: Path) -> None:
    other = np.zeros((3, 2), np.float32)
    text = refused(written(tmp_path, scores=other))
    assert "heads.safetensors: error[K612]" in text
    assert "`scores` is of 3 layers with 2 KV heads, learned on tales/seed0" in text
    assert "this model has 2 layers with 4" in text
    for told in ({"model": "me"}, {"kvcompile": json.dumps({"model": {"name": "me"}})}):
        assert "learned on me" in refused(written(tmp_path, told, scores=other))
    for told in ({}, {"kvcompile": "nonsense"}, {"kvcompile": "[" * 100_000}, {"kvcompile": "[3]"}):
        assert "learned on" not in refused(written(tmp_path, told, scores=other))


@pytest.mark.parametrize(
    ("arrays", "code", "reason"),
    [
        ({"mask": MASK}, "K612", "no tensor `scores`"),
        ({"scores": SCORES, "weights": SCORES}, "K612", "a tensor `weights`"),
        ({"scores": SCORES.astype(np.float64)}, "K612", "`scores` is F64"),
        ({"scores": SCORES.astype(np.float16)}, "K612", "`scores` is F16"),
        ({"scores": SCORES, "mask": MASK.astype(np.int64)}, "K612", "`mask` is I64"),
        ({"scores": SCORES, "mask": MASK.astype(bool)}, "K612", "`mask` is BOOL"),
        ({"scores": SCORES[0]}, "K612", "the shape [4]"),
        ({"scores": SCORES[None]}, "K612", "the shape [1, 2, 4]"),
        ({"scores": SCORES[:, :0]}, "K612", "the shape [2, 0]"),
        ({"scores": SCORES.T}, "K612", "4 layers with 2 KV heads"),
        ({"scores": SCORES, "mask": MASK[:1]}, "K612", "`mask` is of 1 layers with 4"),
        ({"scores": SCORES * np.float32(np.nan)}, "K611", "`scores` has nan for layer 0, KV head 0"),
        ({"scores": np.where(SCORES == 9, np.inf, SCORES).astype(np.float32)}, "K611", "inf for layer 1, KV head 3"),
        ({"scores": SCORES, "mask": MASK * 2}, "K611", "`mask` has 2 for layer 0, KV head 1"),
    ],
)
def test_other_tensors_than_the_two(
    tmp_path: Path, arrays: dict[str, np.ndarray[Any, Any]], code: str, reason: str
) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = refused(written(tmp_path, **arrays))
    assert f"heads.safetensors: error[{code}]" in text and reason in text


def test_bytes_that_are_no_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, scores=SCORES, mask=MASK)
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = good[8 : 8 + size]
    far = header.replace(b'"data_offsets":[0,32]', b'"data_offsets":[0,99]')
    broken = [
        b"",
        b"1 0 0 0\n0 0 0 1\n",
        good[:-1],
        good + b"\0",
        struct.pack("<Q", 1 << 60) + good[8:],
        good[:8] + b"\xff" * size + good[8 + size :],
        good[:8] + far + good[8 + size :],
    ]
    assert far != header
    for data in broken:
        path.write_bytes(data)
        assert "K610" in refused(path)
    path.write_bytes(good)
    monkeypatch.setattr(tables, "MAX_BYTES", 100)
    assert "larger than 100 bytes" in refused(path)


def test_scores_and_where_they_come_from_are_read_without_a_model(tmp_path: Path) -> None:
    path = written(tmp_path, scores=SCORES, mask=MASK)
    found = read_masks(path, path.read_bytes())
    assert (found.scores, found.provenance) == (tuple(map(tuple, SCORES.tolist())), TOLD)
    text = tmp_path / "heads.tsv"
    text.write_text("0.5 1\n2 3\n1 1\n")
    assert tables.read_table(text) == ((0.5, 1.0), (2.0, 3.0), (1.0, 1.0))
    text.write_text("0.5 1\n2\n")
    with pytest.raises(PolicyError, match=r"K612.*line 2 holds 1 numbers"):
        tables.read_table(text)
    written(tmp_path, scores=SCORES, mask=MASK[:1])
    with pytest.raises(PolicyError, match=r"K612.*shapes \[2, 4\] and \[1, 4\]"):
        read_masks(path, path.read_bytes())


def test_reading_masks_needs_no_torch(tmp_path: Path) -> None:
    path = written(tmp_path, scores=SCORES, mask=MASK)
    code = (
        "import sys, pathlib; from kvcompile.passes.masks import read_masks;"
        f"p = pathlib.Path({str(path)!r}); m = read_masks(p, p.read_bytes(), 2, 4);"
        "print(m.mask[0][1], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0", "False"]
