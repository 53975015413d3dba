"""Text to syntax tree: nodes, numbers, places, layout, and the printer as its inverse."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest

from kvcompile.dsl import PolicyError, ast, library, parse
from kvcompile.dsl.parser import MAX_BYTES, parse_value
from kvcompile.dsl.printer import canonical, text


def clause(line: str) -> ast.Clause:
    """The only clause of a policy."""
    return parse(f"policy p():\n    {line}\n").policies[0].clauses[0]


@pytest.mark.parametrize(
    ("written", "value", "kind"),
    [
        ("128", Fraction(128), "int"),
        ("32k", Fraction(32768), "size"),
        ("2M", Fraction(2 * 1024**2), "size"),
        ("3GiB", Fraction(3 * 1024**3), "bytes"),
        ("64kb", Fraction(64 * 1024), "bytes"),
        ("30%", Fraction(3, 10), "percent"),
        ("12.5%", Fraction(1, 8), "percent"),
        ("0.1", Fraction(1, 10), "float"),
        ("1e-4", Fraction(1, 10000), "float"),
        ("2.5E+2", Fraction(250), "float"),
    ],
)
def test_numbers_are_exact(written: str, value: Fraction, kind: str) -> None:
    assert parse_value(written) == ast.Number(value, kind)  # type: ignore[arg-type]


def test_reduction_binds_closer_than_product() -> None:
    flat = parse_value("sum[d] q * k")
    assert flat == ast.Binary("*", ast.Reduce("sum", (ast.Axis("d"),), ast.Name("q")), ast.Name("k"))
    assert parse_value("sum[d] (q * k)") == ast.Reduce(
        "sum", (ast.Axis("d"),), ast.Binary("*", ast.Name("q"), ast.Name("k"))
    )


def test_precedence() -> None:
    trigger = clause("at when not a < 1 + 2 * b or c and d < 3")
    assert isinstance(trigger, ast.At)
    found = trigger.triggers[0].cond
    assert isinstance(found, ast.Binary) and found.op == "or"
    assert isinstance(found.left, ast.Unary) and found.left.op == "not"
    assert text(parse_value("a - (b - c)")) == "a - (b - c)"
    assert text(parse_value("(a - b) - c")) == "a - b - c"
    assert text(parse_value("-sum[q] -a")) == "-sum[q] -a"
    assert text(parse_value("(1 + 2) of prompt")) == "(1 + 2) of prompt"


def test_selection_with_everything() -> None:
    kept = clause("keep frozen | top(budget / page) pages by s per head per lot shared layers(8)")
    assert isinstance(kept, ast.Keep)
    region, selection = kept.set.terms
    assert region == ast.Region("frozen")
    assert isinstance(selection, ast.Selection)
    assert (selection.rank, selection.unit) == ("top", "pages")
    assert [(s.kind, s.what) for s in selection.scopes] == [("per", "head"), ("per", "lot"), ("shared", "layers")]
    assert selection.scopes[2].size == ast.Number(Fraction(8))


def test_losers_chain_over_continuation_lines() -> None:
    source = (
        "policy p():\n    keep sink(4)\n        else merge into nearest by cos(k) when sim >= 0.5 weight sim\n"
        "        else fold mean weight count\n      else drop\n    at step\n"
    )
    kept, at = parse(source).policies[0].clauses
    assert isinstance(kept, ast.Keep) and isinstance(at, ast.At)
    assert [type(loser) for loser in kept.losers] == [ast.Merge, ast.Fold, ast.Drop]


def test_formats_with_part_grain_and_tier() -> None:
    stored = clause("store rest as k int(2) per channel(32) prerope, v fp16 move cpu")
    assert isinstance(stored, ast.Store)
    keys, values = stored.formats
    assert (keys.part, values.part) == ("k", "v")
    assert keys.words == (
        ast.FormatWord("int", (ast.Number(Fraction(2)),)),
        ast.Grain("channel", ast.Number(Fraction(32))),
        ast.FormatWord("prerope"),
    )
    assert values.words == (ast.FormatWord("fp16"), ast.Move("cpu"))


def test_prefixes() -> None:
    layers = clause("layers 0, 2..last-1, last: keep all")
    assert isinstance(layers, ast.Prefixed)
    one, span, last = (0, False), (2, False), (0, True)
    assert isinstance(layers.prefix, ast.LayersPrefix)
    ends = [
        ((r.first.number, r.first.from_last), (r.last.number, r.last.from_last))
        for r in layers.prefix.items
        if isinstance(r, ast.LayerRange)
    ]
    assert ends == [(one, one), (span, (1, True)), (last, last)]
    assert clause("local: keep all") == ast.Prefixed(
        ast.HeadsPrefix("local"), (ast.Keep(ast.SetUnion((ast.Region("all"),))),)
    )
    assert clause("layers rest: off") == ast.Prefixed(ast.LayersPrefix((ast.LayerRest(),)), (ast.Off(),))


def test_on_as_line_and_as_block() -> None:
    line = "on attend where attn > 0.1: a += sum[q] attn, b = now"
    block = "on attend where attn > 0.1:\n        a += sum[q] attn\n        b = now"
    assert clause(line) == clause(block)


def test_file_items() -> None:
    file = parse(
        'heads a = table("f.tsv", top=30%) | probe("echo")\nheads b = a | rest\n'
        "policy p(c=32k) extends q\npolicy q():\n    a: keep all\n"
        "learn a for q:\n    gate z = clamp01(init=1) per head\n    mix z * a + (1 - z) * b\n"
        "    loss hidden_mse(answer_tokens) + 0.05 * mean(z)\n    freeze weights, norms\n"
    )
    assert [p.name for p in file.policies] == ["p", "q"]
    assert file.policies[0].parent == ast.Name("q") and file.policies[0].clauses == ()
    table, probe = file.heads[0].sources
    assert isinstance(table, ast.Call) and table.get("top") == ast.Number(Fraction(3, 10), "percent")
    assert isinstance(probe, ast.Call) and probe.args == (ast.Text("echo"),)
    assert file.heads[1].sources == (ast.HeadsSame("a"), ast.HeadsRest())
    assert [type(c) for c in file.learns[0].clauses] == [ast.Gate, ast.Mix, ast.Loss, ast.Freeze]


def test_spans_are_exact() -> None:
    source = "policy p(n=4):\n    keep sink(n)\n        | top(n) by norm(k) per head\n    at step\n"
    policy = parse(source).policies[0]
    assert policy.header.text == "policy p"
    assert policy.params[0].span.text == "n=4"
    kept = policy.clauses[0]
    assert isinstance(kept, ast.Keep)
    assert kept.span.text == "keep sink(n)\n        | top(n) by norm(k) per head"
    selection = kept.set.terms[1]
    assert isinstance(selection, ast.Selection)
    assert (selection.span.line, selection.span.column) == (3, 11)
    assert (selection.span.end_line, selection.span.end_column) == (3, 37)
    assert selection.by.span.text == "norm(k)"
    assert selection.scopes[0].span.text == "per head"


def test_spans_take_no_part_in_equality() -> None:
    one = parse("policy p():\n    keep sink(4)   | recent(2) # c\n")
    two = parse("# c\n\npolicy p( ) :\n  keep sink( 4 )\n    | recent(2)")
    assert one.policies == two.policies and hash(one.policies[0]) == hash(two.policies[0])


@pytest.mark.parametrize(
    "source",
    [
        "policy p():\r\n    keep all\r\n",
        "policy p():\n    keep all",
        "\ufeffpolicy p():\n    keep all\n",
        "\n\n    policy p():\n        keep all\n\n      # comment\n",
        "    policy p():\n      keep all\n",
        "policy p():\n\n  # comment\n    # comment\n    keep all # comment\n\t\n",
        "policy p(\n):\n    keep all\n",
        "policy p(): # comment\n    keep\n        all\n   \n",
    ],
)
def test_layouts_of_the_same_policy(source: str) -> None:
    assert parse(source).policies == parse("policy p():\n    keep all\n").policies


@pytest.mark.parametrize("name", library.names())
def test_printed_text_parses_to_the_same_tree(name: str) -> None:
    file = parse(library.read(name))
    assert parse(text(file)) == file


def test_canonical_spells_numbers_alike() -> None:
    assert canonical(parse_value("32k")) == canonical(parse_value("32768"))
    assert canonical(parse_value("0.10")) == canonical(parse_value("1e-1"))
    assert canonical(parse_value("30%")) != canonical(parse_value("0.3"))


def test_limits_are_findings() -> None:
    for source, code in [
        ("policy p():\n    keep sink(" + "(" * 200 + "4" + ")" * 200 + ")\n", "K008"),
        ("policy p():\n    score s = " + "-" * 5000 + "k\n", "K008"),
        ("policy p():\n    score s = " + " + ".join("k" * 2000) + "\n", "K008"),
        ("policy p():\n" + "".join(" " * (i + 1) + "a:\n" for i in range(500)), "K008"),
        ("policy p():\n    keep sink(" + "9" * 10000 + ")\n", "K007"),
        ("policy p():\n    keep sink(1e999999999)\n", "K007"),
        ("# " + "x" * MAX_BYTES, "K009"),
        ("# " + "\N{SNOWMAN}" * (MAX_BYTES // 2), "K009"),
    ]:
        with pytest.raises(PolicyError) as caught:
            parse(source)
        assert caught.value.diagnostics[0].code == code
        assert len(str(caught.value)) < 1000


def test_wide_unions_are_fine() -> None:
    file = parse("policy p():\n    keep " + " | ".join(["sink(4)"] * 1500) + "\n")
    kept = file.policies[0].clauses[0]
    assert isinstance(kept, ast.Keep) and len(kept.set.terms) == 1500


def test_import_needs_neither_torch_nor_the_dialect() -> None:
    code = "import sys, kvcompile.dsl; print(sorted({'torch', 'xdsl', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
