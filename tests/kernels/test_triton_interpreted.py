"""Runs the kernels on Triton's interpreter, in a process of its own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_interpreted.plans import no_interpreter

pytest.importorskip("triton")
HERE = Path(__file__).parent / "triton_interpreted"
ROOT = HERE.parents[2]


SUITES = sorted(path.stem for path in HERE.glob("check_*.py"))
SLOW = [suite for suite in SUITES if "pytest.mark.slow" in (HERE / f"{suite}.py").read_text(encoding="utf-8")]

pytestmark = pytest.mark.skipif(bool(no_interpreter()), reason=no_interpreter())


@pytest.mark.parametrize("suite", SUITES)
def test_on_the_interpreter(suite: str) -> None:
    _run(suite, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("suite", SLOW)
def test_the_rest_on_the_interpreter(suite: str) -> None:
    _run(suite, "slow")


def _run(suite: str, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--no-header"]
    done = subprocess.run(
        [*command, "-m", marked, str(HERE / f"{suite}.py")],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
