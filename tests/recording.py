"""Writes down which property tests a library policy has passed, on which backend: what the README's table shows.

A pytest plugin. With `--record-systems FILE`, every test `test_pN_...` that is parametrised by a policy's name counts;
a property holds on a backend when all of its tests passed there. Works under pytest-xdist.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcompile.dsl import library, load, resolve

_PROPERTY = re.compile(r"test_(p\d)_")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-systems", metavar="FILE", help="write what the property tests show for each policy")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-systems") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(config.getoption("--record-systems"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        found = _PROPERTY.match(item.name)
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        name = params.get("name")
        if found and name in library.names():
            item.user_properties.append(("shows", (name, found.group(1).upper(), params.get("backend", "cpu"))))


class Recorder:
    """Collects outcomes in the process that controls the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: dict[tuple[str, str, str], bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == "shows" and (report.when == "call" or report.failed):
                name, shown, backend = value
                self.passed[name, shown, backend] = self.passed.get((name, shown, backend), True) and report.passed

    def pytest_sessionfinish(self) -> None:
        out: dict[str, dict[str, object]] = {}
        for name, shown, backend in sorted(key for key, fine in self.passed.items() if fine):
            entry = out.setdefault(name, {"digest": resolve(load(name)).digest, "holds": {}})
            holds = entry["holds"]
            assert isinstance(holds, dict)
            holds.setdefault(shown, []).append(backend)
        self.path.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
