"""docs/models.md is what the families' definitions, the recorded tests and the refusals say."""

from __future__ import annotations

import json

import pytest
import transformers
from packaging.version import Version

from tests.families import FAMILIES
from tests.models_table import PAGE, SHOWN, page, status


# Earlier versions name some kinds of layers otherwise, and refusals repeat the name.
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="the page was written with 5.23")
def test_the_page_holds_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run `make models`"


def test_every_family_has_shown_every_property() -> None:
    shown = json.loads(SHOWN.read_text(encoding="utf-8"))
    assert {name: status(name, shown) for name in FAMILIES} == dict.fromkeys(FAMILIES, "P1 P2 P5 P8")
