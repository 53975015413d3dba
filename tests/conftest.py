"""What all tests share: one thread for torch, golden texts, and the option that writes them anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is imported: several workers share few cores, and spinning threads cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.recording"]

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew instead of comparing")


@pytest.fixture
def small_linear_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Linear layers of any size run by the generated kernel, on two threads."""
    import torch

    monkeypatch.setattr("kvcompile.kernels.cpp_backend.project.LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME; with --update-golden write it."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden text {name}: run pytest with --update-golden"
        assert text == path.read_text(encoding="utf-8")

    return compare
