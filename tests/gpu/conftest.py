"""A device that was lost to a test takes no other test along: the worker ends, and xdist begins a new one."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and lost():
        os.write(2, f"\n{item.nodeid}: the device is lost\n{report.longreprtext}\n".encode())
        os._exit(70)  # reported as a crash while this very test ran
    return report


def lost() -> bool:
    """Whether an earlier launch left an error that all later ones would see."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
