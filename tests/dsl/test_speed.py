"""How long a policy file takes after start, and the command from its start: processor time, not the clock."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

from kvcompile.dsl import PolicyError, check, library, load, parse, resolve
from kvcompile.dsl.lower import lower

pytestmark = pytest.mark.slow


def seconds(name: str) -> float:
    text = library.read(name)
    began = time.process_time()
    resolved = resolve(load(parse(text)))
    if not any(diagnostic.severity == "error" for diagnostic in check(resolved)):
        try:
            lower(resolved)
        except PolicyError as refused:
            assert all(diagnostic.code.startswith("K9") for diagnostic in refused.diagnostics)
    return time.process_time() - began


@pytest.mark.parametrize("name", library.names())
def test_a_library_file_takes_less_than_50_ms(name: str) -> None:
    seconds(name)  # what is built on first use
    assert min(seconds(name) for _ in range(3)) < 0.05


@pytest.mark.parametrize("command", [["check", "snapkv"], ["fmt", "--check", "dsl/library/snapkv.kvp"]])
def test_the_command_answers_within_a_second(command: list[str]) -> None:
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "kvcompile", *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 1.0
