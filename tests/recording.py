"""Writes down which property tests a library policy, or a model family, has passed, on which backend: what the tables
of README.md and docs/models.md show.

A pytest plugin. With `--record-systems FILE`, every test `test_pN_...` that is parametrised by a policy's name counts,
with `--record-models FILE` every one parametrised by a family and a policy; a property holds on a backend when all of
its tests passed there. Works under pytest-xdist.
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

    parser.addoption("--record-models", metavar="FILE", help="write what the property tests show for each family")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    for option, recorder in (("--record-systems", Recorder), ("--record-models", FamilyRecorder)):
        if config.getoption(option):
            config.pluginmanager.register(recorder(Path(config.getoption(option))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        found = _PROPERTY.match(item.name)
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        name = params.get("name")
        if found and name in library.names():
            item.user_properties.append(("shows", (name, found.group(1).upper(), params.get("backend", "cpu"))))
        if found and "family" in params and "policy" in params:
            what = (params["family"], found.group(1).upper(), params.get("backend", "cpu"), params["policy"])
            item.user_properties.append(("shows of a family", what))


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


class FamilyRecorder:
    """Collects what families pass, and adds it to what the file says of the same definitions of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: dict[tuple[str, str, str, str], bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == "shows of a family" and (report.when == "call" or report.failed):
                self.passed[tuple(value)] = self.passed.get(tuple(value), True) and report.passed

    def pytest_sessionfinish(self) -> None:
        from tests.families import digest_of

        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        for (family, shown, backend, policy), fine in sorted(self.passed.items()):
            entry = known.get(family, {})
            if entry.get("digest") != digest_of(family):
                entry = {"digest": digest_of(family), "holds": {}}
            policies = entry["holds"].setdefault(shown, {}).setdefault(backend, [])
            entry["holds"][shown][backend] = sorted({*policies, policy} if fine else {*policies} - {policy})
            known[family] = entry
        text = json.dumps(dict(sorted(known.items())), indent=1) + "\n"
        self.path.write_text(text, encoding="utf-8")
