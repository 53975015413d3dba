"""The library: every policy of the language page is a file that parses, resolves and checks."""

from __future__ import annotations

import pytest

from kvcompile.dsl import check, library, load, parse, resolve
from kvcompile.dsl.printer import text

PUBLISHED = [
    "adakv",
    "bigbird",
    "chunkkv",
    "criticalkv",
    "cskv",
    "d2o",
    "duo",
    "expected_attention",
    "freqkv",
    "gear",
    "h2o",
    "infllm_v2",
    "keep_all",
    "keydiff",
    "keyformer",
    "kivi",
    "knorm",
    "lagkv",
    "lazy",
    "llmdrop",
    "louiskv",
    "mikv",
    "minicache",
    "moba",
    "pbs_attn",
    "powerattention",
    "prefixkv",
    "prulong",
    "pyramidkv",
    "quest",
    "r_kv",
    "razor",
    "rotatekv",
    "sampleattention",
    "seerattention",
    "seerattention_r",
    "shadowkv",
    "snapkv",
    "snapkv_chunked",
    "streaming",
    "streaming_compact",
    "tidal",
    "tova",
    "windowkv",
]


def test_every_published_policy_is_there() -> None:
    assert set(library.names()) >= set(PUBLISHED)


@pytest.mark.parametrize("name", library.names())
def test_policy_checks_without_errors(name: str) -> None:
    findings = check(resolve(load(name)))
    assert [str(d) for d in findings if d.severity == "error"] == []
    averages = name in ("d2o", "elastic", "razor")  # keys after their rotation, as published
    assert [d.code for d in findings if d.severity == "warning"] == ["K401"] * averages


@pytest.mark.parametrize("name", library.names())
def test_file_says_what_it_is(name: str) -> None:
    written = library.read(name)
    assert written.startswith("# ") and written.endswith("\n")
    assert all(len(line) <= 120 and line == line.rstrip() for line in written.splitlines())
    assert [policy.name for policy in parse(written).policies] == [name]
    assert len([line for line in written.splitlines() if line.strip() and not line.startswith("#")]) <= 15


def test_meanings_differ() -> None:
    digests = {name: resolve(load(name)).digest for name in library.names()}
    assert len(set(digests.values())) == len(digests)


def test_clauses_of_known_policies() -> None:
    def kept(name: str) -> list[str]:
        return [text(p.clause) for p in resolve(load(name)).clauses]

    assert kept("streaming") == ["keep sink(4) | recent(1020)"]
    assert kept("knorm") == ["keep bottom(2048) by norm(k) per head"]
    assert kept("adakv")[1] == "keep recent(64) | top(2048 - 64) by s across heads floor 20%"
    assert kept("snapkv_chunked")[1] == "keep frozen | top(30% of chunk) by s per head"
    assert kept("prulong") == ["keep all", "keep sink(128) | recent(1024)"]
    assert kept("tova") == [
        "score s = mean[h] sum[q in last(1)] attn",
        "keep top(2048) by s shared heads",
    ]
