"""The README's table is what the library, the cookbook and the recorded tests say; every policy has its page."""

from __future__ import annotations

import re

import pytest

from kvcompile.dsl import library
from tests.systems_table import BEGIN, COOKBOOK, END, README, lines, systems, table

SECTIONS = ("## What it does", "## The policy", "## What was matched", "## What differs")


def test_the_readme_holds_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table(), "run `make systems`"


@pytest.mark.parametrize("policy", library.names())
def test_every_policy_has_a_page_with_its_very_text(policy: str) -> None:
    page = (COOKBOOK / systems()[policy].page).read_text(encoding="utf-8")
    blocks = re.findall(r"```kvp\n(.*?)```", page, re.DOTALL)
    assert library.read(policy) in blocks, f"{policy}.kvp differs from its cookbook page"
    for section in SECTIONS:
        body = page.split(section, 1)[1] if section in page else ""
        assert len(body.split("\n## ")[0].split()) > 8, f"{section} of {policy} is missing or empty"


@pytest.mark.parametrize("policy", library.names())
def test_a_policy_is_at_most_fifteen_lines(policy: str) -> None:
    assert lines(policy) <= 15
