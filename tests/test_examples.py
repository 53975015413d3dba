"""Every example runs as a script would, and prints what it promises."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "recall_model"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example by file name with arguments; what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("COLUMNS", "200")

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch):
    """The names an example defines, without running its main."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: runpy.run_path(str(EXAMPLES / name), run_name=name.removesuffix(".py"))


def code_lines(path: Path) -> int:
    """Lines with code: no blank lines, comments or docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None
    ]
    said = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in said
        for number, line in enumerate(path.read_text().splitlines(), 1)
    )


def test_all_examples_have_a_docstring_and_a_main() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 8
    for path in files:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.name
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body), path.name


def test_the_quick_start_is_short_and_right(run) -> None:
    assert code_lines(EXAMPLES / "01_quick_start.py") < 15
    out = run("01_quick_start.py")
    asked, answer, wanted = re.search(r"colour of (\w+) -> (\w+) .*\(right: (\w+)\)", out).groups()
    assert asked and answer == wanted
    assert re.search(r"policy\s+snapkv", out)


def test_an_own_policy_is_explained_runs_and_a_mistake_is_shown_with_its_place(run) -> None:
    out = run("02_own_policy.py")
    assert re.search(r"policy\s+sharp", out) and "footprint" in out
    answer, wanted = re.search(r"-> (\w+) .*\(right: (\w+)\)", out).groups()
    assert answer == wanted
    place, caret = re.search(r"(:3:15: error\[K\d+\].*)\n.*\n([ |]*)\^", out).groups()
    assert place and caret.strip() == "|"
    assert re.search(r"codes: K\d+", out)


def test_a_kernel_can_be_looked_at(run) -> None:
    out = run("03_look_at_a_kernel.py")
    assert "kv.top" in out and "kv.keep" in out
    files = [Path(line.strip()) for line in out.splitlines() if line.strip().endswith(".py")]
    assert files and all("@triton.jit" in path.read_text() for path in files)
    assert '"""' in out.split("to its first function:")[1]


def test_a_head_mask_in_the_published_layout_decides_what_each_head_keeps(run) -> None:
    out = run("04_published_head_mask.py")
    assert "retrieval: 9 KV heads" in out and "local: 23 KV heads" in out
    kept = [int(n) for row in re.findall(r"kept per KV head \[(.*)\]", out) for n in row.split(", ")]
    assert sorted(set(kept)) == [64, 519]  # sink and window, or all of 512 + 7
    assert kept.count(519) == 9 and len(kept) == 32


def test_two_policies_stand_side_by_side_by_head_class(run) -> None:
    out = run("05_compose.py")
    assert "retrieval: 3 KV heads" in out and "local: 9 KV heads" in out
    kept = [int(n) for row in re.findall(r"kept per KV head \[(.*)\]", out) for n in row.split(", ")]
    assert sorted(kept) == [36] * 9 + [103] * 3  # sink and window; the budget and 7 new ones
    assert "else fold mean weight count" in out
    answer, wanted = re.search(r"-> (\w+) .*\(right: (\w+)\)", out).groups()
    assert answer == wanted


def test_heads_are_learned_saved_and_used(run, tmp_path: Path) -> None:
    assert code_lines(EXAMPLES / "06_learn_heads.py") < 40
    out = run("06_learn_heads.py", "--out", str(tmp_path))
    table = [[float(x) for x in line.split("\t")] for line in (tmp_path / "masks.tsv").read_text().splitlines()]
    marked = [(i, j) for i, row in enumerate(table) for j, value in enumerate(row) if value == 1.0]
    assert [len(row) for row in table] == [4, 4, 4] and sum(map(sum, table)) == len(marked) == 3
    assert f"kept whole (layer, KV head): {marked}" in out
    answer, wanted = re.search(r"-> (\w+) .*\(right: (\w+)\)", out).groups()
    assert answer == wanted
    assert re.search(r"policy\s+prulong", out) and "footprint" in out


def test_gates_are_learned_saved_and_read_by(run, tmp_path: Path) -> None:
    out = run("08_learn_gates.py", "--out", str(tmp_path))
    first, last = re.findall(r"step \d+: divergence ([\d.]+), best blocks found (\d+)%", out)
    assert float(last[0]) < 0.5 * float(first[0]) and int(last[1]) > int(first[1]) + 15
    right = {name: int(number) for name, number in re.findall(r"^(\w+): (\d+) of 12 right", out, re.MULTILINE)}
    assert right["gated"] >= 9 > 4 >= right["random_tokens"]
    assert (tmp_path / "gates.safetensors").stat().st_size > 100_000


def test_a_model_in_plain_pytorch_recalls_under_a_policy(run) -> None:
    out = run("07_plain_pytorch.py")
    answer, wanted = re.search(r"-> (\w+) .*\(right: (\w+)\)", out).groups()
    assert answer == wanted
    kept, seen = re.search(r"kept per KV head \[(.*)\] of (\d+)", out).groups()
    assert set(kept.split(", ")) == {"104"} and int(seen) == 648  # the budget and 8 new ones
    assert re.search(r"policy\s+snapkv", out) and "0 breaks, 0 recompiles" in out


def test_the_demo_shows_who_remembers(run) -> None:
    out = run("demo.py", "--prompts", "8")
    rows = re.findall(r"^ *(\w+) +(\d+)% +(\d+)% +([\d.]+) +([\d.]+) +(\d+) ", out, re.MULTILINE)
    right = {name: (int(at_once), int(later)) for name, at_once, later, *_ in rows}
    assert list(right) == ["keep_all", "streaming", "h2o", "snapkv", "snapkv_chunked", "prulong"]
    assert min(right["keep_all"]) >= 95
    assert max(right["streaming"]) <= 35
    assert right["h2o"][0] >= 95 and right["snapkv"][0] >= 95  # they read the question before they drop anything
    assert min(right["prulong"]) >= 87
    held = {name: int(kib) for name, *_, kib in rows}
    assert all(held[name] < 0.4 * held["keep_all"] for name in held if name != "keep_all")
    files = [Path(line.strip()) for line in out.splitlines() if re.fullmatch(r"\s+/\S+\.py", line)]
    assert files and all(path.is_file() for path in files)
    checked = re.search(r"^  \S+ (\S+) --check --bench$", out, re.MULTILINE)[1]  # only Triton files can do that
    name = re.search(r"--kernel (\S+) --arch sm_90$", out, re.MULTILINE)[1]
    assert Path(checked) in files and Path(checked).stem == name


def test_ablation_finds_the_head_that_the_shipped_table_names(run, tmp_path: Path) -> None:
    run("ablation.py", "--prompts", "2", "--out", str(tmp_path / "heads.tsv"))

    def table(path: Path) -> list[list[float]]:
        return [[float(score) for score in line.split("\t")] for line in path.read_text().splitlines()]

    found, shipped = table(tmp_path / "heads.tsv"), table(FOLDER / "heads.tsv")
    assert [len(row) for row in found] == [len(row) for row in shipped]
    best = max(score for row in shipped for score in row)
    layer, head = next((i, row.index(best)) for i, row in enumerate(shipped) if best in row)
    assert found[layer][head] == 1 == max(score for row in found for score in row)


def test_the_training_script_makes_what_is_shipped(functions) -> None:
    from transformers import AutoConfig, AutoTokenizer

    train = functions("train_recall_model.py")
    made, shipped = train["new_model"](0).config.to_diff_dict(), AutoConfig.from_pretrained(FOLDER).to_diff_dict()
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in made.items() if k not in ignored} == {k: v for k, v in shipped.items() if k not in ignored}
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert train["new_tokenizer"]().get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.padding_side, tokenizer.model_input_names) == ("left", ["input_ids", "attention_mask"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_learns_to_recall(run, tmp_path: Path) -> None:
    out = run("train_recall_model.py", "--out", str(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size < 4_000_000
    accuracy = {int(n): float(right) for n, right in re.findall(r"prompts of (\d+) tokens: ([\d.]+)", out)}
    assert sorted(accuracy) == [128, 256, 512, 640] and min(accuracy.values()) >= 0.95
