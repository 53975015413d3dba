"""docs/turns.md says what its examples print, and each of them runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def printed():
    """What each example printed, in order."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "turns.md").read_text(), re.S)
    names, out = {}, []
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        for block in blocks:
            lines = []
            names["print"] = lambda *words, lines=lines: lines.append(" ".join(map(str, words)))
            exec(compile(block, "docs/turns.md", "exec"), names)
            out.append(lines)
    return out


def test_the_conversation_remembers_both_colours(printed):
    assert printed[1] == ["olour of alice red", " colour of bob blue"]


def test_the_system_prompt_outlives_the_window(printed):
    first, second = (line.split() for line in printed[2])
    assert (first[0], second[0]) == ("blue", "red")
    assert first[1] == second[1] == str(9 + 48)
    assert int(second[3]) > int(first[3]) > 150


def test_three_continuations_of_one_prefix(printed):
    assert printed[3] == ["['red', 'blue', 'green']"]


def test_the_restored_cache_answers(printed):
    assert printed[4][0].startswith("green ")
