"""Parents, parameters, triggers and digests."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from kvcompile.dsl import PolicyError, Resolved, ast, load, resolve
from kvcompile.dsl.printer import text


def resolved(policy: str, name: str | None = None, **params: object) -> Resolved:
    return resolve(load(policy, name), params)


def lines(policy: Resolved) -> list[str]:
    """Each clause as `prefixes: clause @ triggers`."""
    out = []
    for placed in policy.clauses:
        prefix = "".join(f"{text(p)}: " for p in placed.prefixes)
        at = f" @ {', '.join(text(t) for t in placed.triggers)}" if placed.triggers else ""
        out.append(f"{prefix}{text(placed.clause)}{at}")
    return out


def codes(policy: str, name: str | None = None, **params: object) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        resolved(policy, name, **params)
    return [d.code for d in caught.value.diagnostics]


def test_parameters_are_substituted() -> None:
    assert lines(resolved("snapkv")) == [
        "score s = maxpool(mean[g] sum[q in last(64)] attn, 7)",
        "keep recent(64) | top(2048 - 64) by s per head @ prefill.end",
    ]


def test_substituted_values_point_at_their_use() -> None:
    kept = resolved("policy p(n=4):\n    keep sink(n)\n    at step\n").clauses[0].clause
    assert isinstance(kept, ast.Keep) and isinstance(kept.set.terms[0], ast.Region)
    value = kept.set.terms[0].args[0]
    assert (value, value.span.line, value.span.text) == (ast.Number(Fraction(4)), 2, "n")


def test_child_replaces_clauses_in_place_and_inherits_the_rest() -> None:
    assert lines(resolved("pyramidkv", budget=100)) == [
        "score s = maxpool(mean[g] sum[q in last(64)] attn, 7)",
        "keep recent(64) | top(b) by s per head @ prefill.end",
        "share b = 100 - 64 by pyramid(20)",
    ]
    assert lines(resolved("duo")) == [
        "retrieval: keep all @ chunk(32k), step",
        "local: keep sink(64) | recent(256) @ chunk(32k), step",
    ]


def test_the_parents_only_at_governs_new_sets_of_the_child() -> None:
    assert lines(resolved("mikv"))[2:] == [
        "keep all @ prefill.end, step",
        "store recent(10% of prompt) | top(20%) by acc per head as fp16 @ prefill.end, step",
        "store rest as int(2) per token @ prefill.end, step",
    ]


def test_each_at_governs_the_sets_above_it() -> None:
    found = [(type(p.clause).__name__, [t.name for t in p.triggers]) for p in resolved("shadowkv").clauses]
    assert [f for f in found if f[1]] == [
        ("Store", ["prefill.end"]),
        ("Store", ["prefill.end"]),
        ("Attend", ["step"]),
    ]


def test_an_only_at_governs_sets_below_it_too() -> None:
    layers = resolved("d2o").clauses[-1]
    assert [t.name for t in layers.triggers] == ["prefill.end", "step"]
    assert layers.layers is not None and text(layers.layers) == "layers 0, 1, last"


def test_an_at_inside_a_prefix_governs_that_prefix() -> None:
    source = """
policy p():
    keep sink(4)
    rest:
        keep sink(8)
        at step
    at prefill.end
"""
    assert lines(resolved(source)) == ["keep sink(4) @ prefill.end", "rest: keep sink(8) @ step"]


def test_a_childs_at_replaces_every_at_of_the_parent() -> None:
    source = """
policy a():
    keep sink(4)
    at step
    attend recent(4)
    at prefill.end
policy b() extends a:
    keep sink(8)
    at every(16)
"""
    assert lines(resolved(source, "b")) == ["attend recent(4) @ every(16)", "keep sink(8) @ every(16)"]


def test_replacement_by_name_and_prefix() -> None:
    source = """
policy a():
    state acc = 0, seen = now
    score s = acc
    score t = seen
    local: keep sink(4)
    far: keep all
    at step
policy b() extends a:
    state acc = 1
    score t = acc
    local: keep sink(8)
policy c() extends a:
    keep sink(2)
heads far = table("f.tsv")
heads local = rest
"""
    assert lines(resolved(source, "b")) == [
        "state acc = 1",
        "state seen = now",
        "score s = acc",
        "score t = acc",
        "local: keep sink(8) @ step",
        "far: keep all @ step",
    ]
    assert lines(resolved(source, "c"))[-1] == "keep sink(2) @ step"
    assert not any(line.startswith(("local", "far")) for line in lines(resolved(source, "c")))


def test_lookup_is_in_the_same_file_first() -> None:
    source = "policy snapkv():\n    keep sink(1)\n    at step\npolicy mine() extends snapkv\n"
    assert lines(resolved(source, "mine")) == ["keep sink(1) @ step"]
    assert lines(resolved("policy snapkv(budget=99) extends snapkv\n"))[1].startswith("keep recent(64) | top(99 - 64)")


def test_cycles_and_unknown_parents() -> None:
    source = "policy a() extends b\npolicy b() extends c\npolicy c() extends a\n"
    with pytest.raises(PolicyError) as caught:
        resolved(source, "a")
    found = caught.value.diagnostics[0]
    assert (found.code, found.line) == ("K108", 3) and "a -> b -> c -> a" in found.message
    assert codes("policy a() extends a\n\n", "a") == ["K108"]
    with pytest.raises(PolicyError) as caught:
        resolved("policy a() extends snapk\n\n")
    found = caught.value.diagnostics[0]
    assert (found.code, found.column, found.hint) == ("K107", 20, "did you mean `snapkv`?")


def test_heads_in_scope() -> None:
    duo = resolved("duo")
    assert [head.decl.name for head in duo.heads] == ["retrieval", "local"]
    assert all(head.base is None for head in duo.heads)
    assert [learn.policy.id for learn in duo.learns] == ["duo"]
    assert resolved("snapkv").heads == () and resolved("razor").heads[0].decl.name == "far"


def test_a_childs_file_redeclares_heads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.kvp"
    path.write_text('heads retrieval = table("mine.tsv", top=10%)\npolicy mine() extends prulong\n')
    heads = {h.decl.name: h for h in resolve(load(path)).heads}
    assert text(heads["retrieval"].decl).endswith('table("mine.tsv", top=10%)')
    assert heads["retrieval"].base == tmp_path and heads["local"].base is None


@pytest.mark.parametrize(
    ("policy", "params", "clause"),
    [
        ("snapkv", {"budget": 512}, "top(512 - 64)"),
        ("snapkv", {"budget": "512"}, "top(512 - 64)"),
        ("snapkv", {"budget": 512.0}, "top(512 - 64)"),
        ("snapkv", {"budget": "10% of prompt"}, "top(10% of prompt - 64)"),
        ("h2o", {"heavy": 100}, "top(100)"),
        ("h2o", {"heavy": "5% of len"}, "top(5% of len)"),
        ("snapkv_chunked", {"ratio": 0.1}, "top(10% of chunk)"),
        ("snapkv_chunked", {"ratio": Fraction(1, 8)}, "top(12.5% of chunk)"),
        ("snapkv_chunked", {"ratio": Decimal("0.3")}, "top(30% of chunk)"),
        ("snapkv_chunked", {"ratio": "40%"}, "top(40% of chunk)"),
        ("snapkv_chunked", {"ratio": 1}, "top(100% of chunk)"),
    ],
)
def test_overrides(policy: str, params: dict[str, object], clause: str) -> None:
    assert any(clause in line for line in lines(resolved(policy, **params)))


def test_floats_are_taken_as_written() -> None:
    state = dict(resolved("lazy", alpha=0.1).params)["alpha"]
    assert state == ast.Number(Fraction(1, 10), "float")


@pytest.mark.parametrize(
    ("policy", "params", "code", "hint"),
    [
        ("snapkv", {"budgt": 4}, "K104", "did you mean `budget`?"),
        ("keep_all", {"budget": 4}, "K104", "it takes no parameters"),
        ("snapkv", {"budget": None}, "K109", "10% of prompt"),
        ("snapkv", {"budget": True}, "K109", "10% of prompt"),
        ("snapkv", {"budget": [4]}, "K109", "10% of prompt"),
        ("snapkv", {"budget": float("nan")}, "K109", "finite"),
        ("snapkv", {"budget": float("inf")}, "K109", "finite"),
        ("snapkv", {"budget": Decimal("sNaN")}, "K109", "finite"),
        ("snapkv", {"budget": ""}, "K109", "10% of prompt"),
        ("snapkv", {"budget": 0.3}, "K109", "30% of prompt"),
        ("snapkv", {"budget": "30%"}, "K109", "30% of prompt"),
        ("snapkv", {"budget": '"4"'}, "K109", "its default is"),
        ("snapkv", {"budget": 10**30}, "K007", "1e18"),
        ("h2o", {"heavy": 0.3}, "K109", "30% of prompt"),
        ("snapkv_chunked", {"ratio": 30}, "K109", "30%"),
        ("snapkv_chunked", {"ratio": "10% of prompt"}, "K109", "bare percentage"),
        ("snapkv", {"budget": "4 +"}, "K001", "10% of prompt"),
        ("snapkv", {"budget": "keep all"}, "K001", "10% of prompt"),
    ],
)
def test_bad_overrides(policy: str, params: dict[str, object], code: str, hint: str) -> None:
    with pytest.raises(PolicyError) as caught:
        resolved(policy, **params)
    assert [d.code for d in caught.value.diagnostics] == [code]
    assert hint in caught.value.diagnostics[0].hint


def test_all_bad_overrides_are_said_at_once() -> None:
    assert codes("snapkv", budget=None, pool=float("nan")) == ["K109", "K109"]
    assert codes("snapkv", budgt=1, pol=2) == ["K104", "K104"]


def test_defaults_may_read_other_parameters() -> None:
    source = "policy p(a=4, b=a * 2):\n    keep sink(a) | recent(b)\n    at step\n"
    assert lines(resolved(source)) == ["keep sink(4) | recent(4 * 2) @ step"]
    assert lines(resolved(source, a=8)) == ["keep sink(8) | recent(8 * 2) @ step"]
    assert codes("policy p(a=b, b=a):\n    keep sink(a) | recent(b)\n    at step\n") == ["K108"]


def test_unused_parameters_are_warned_of() -> None:
    found = resolved("policy p(a=4, b=5):\n    keep sink(a)\n    at step\n").findings
    assert [(d.code, d.severity, d.column) for d in found] == [("K117", "warning", 15)]


def test_digest_depends_on_meaning_only() -> None:
    base = resolved("policy p(n=32k, w=4):\n    keep sink(w) | recent(n)\n    at step\n").digest
    same = [
        "# c\npolicy q( a=4, b = 32768 ) :\n  keep sink(a)\n     | recent( b )  # c\n  at step",
        "policy p():\r\n    keep sink(4) | recent(32k)\r\n    at step\r\n",
    ]
    assert {resolved(s).digest for s in same} == {base}
    other = [
        "policy p():\n    keep sink(4) | recent(32769)\n    at step\n",
        "policy p():\n    keep recent(32k) | sink(4)\n    at step\n",
        "policy p():\n    keep sink(4) | recent(32k)\n    at step, prefill.end\n",
        "policy p():\n    rest: keep sink(4) | recent(32k)\n    at step\n",
        "policy p():\n    keep sink(4) | recent(32k) else fold mean\n    at step\n",
    ]
    assert len({base, *(resolved(s).digest for s in other)}) == 1 + len(other)
    assert resolved("snapkv", budget="512").digest == resolved("snapkv", budget=512).digest
    assert resolved("snapkv").digest != resolved("snapkv", budget=512).digest
    assert resolved("duo").digest != resolved("prulong").digest


@pytest.mark.parametrize(
    "clause",
    [
        "keep sink(1e18 * 10)",
        "keep sink(999999999999999999k)",
        "keep sink(1 / 999999999999999999 / 999999999999999999 / 999999999999999999)",
        "keep top(" + " * ".join(["999999999999999999"] * 40) + ") by norm(k)",
        "at every(n * 1000000)",
    ],
)
def test_constants_are_bounded_as_numbers_are(clause: str) -> None:
    with pytest.raises(PolicyError) as caught:
        resolve(load(f"policy p(n=999999999999999):\n    {clause}\n"))
    assert caught.value.diagnostics[0].code == "K007" and caught.value.diagnostics[0].line == 2


@pytest.mark.parametrize(("length", "step"), [(60, "p{0} + p{0}"), (1500, "p{0}")])
def test_parameters_that_grow_when_written_out_are_refused(length: int, step: str) -> None:
    params = ", ".join(["p0=1", *(f"p{i}={step.format(i - 1)}" for i in range(1, length))])
    with pytest.raises(PolicyError) as caught:
        resolve(load(f"policy p({params}):\n    keep sink(p{length - 1})\n"))
    assert caught.value.diagnostics[0].code == "K008"


def test_lines_of_parents_and_policies_in_a_text_are_bounded() -> None:
    first = "policy p0():\n    keep all\n"
    line = "".join(f"policy p{i}() extends p{i - 1}\n" for i in range(1, 60))
    with pytest.raises(PolicyError) as caught:
        resolve(load(first + line, "p59"))
    assert caught.value.diagnostics[0].code == "K008"
    assert resolve(load(first + line, "p20")).name == "p20"
    with pytest.raises(PolicyError) as caught:
        load(first + "".join(f"policy p{i}() extends p0\n" for i in range(1, 90)), "p3")
    assert caught.value.diagnostics[0].code == "K009"
