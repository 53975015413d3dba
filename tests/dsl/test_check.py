"""The checker: for each fault its code, place and way out, and silence where nothing is wrong."""

from __future__ import annotations

import pytest

from kvcompile.dsl import Diagnostic, check, load, parse, resolve
from kvcompile.dsl.axes import Env, axes_of, unit_of
from kvcompile.dsl.check_cost import CHEAPER, COSTS, cost_of
from kvcompile.dsl.codes import CATALOGUE
from kvcompile.dsl.context import MOST, Context, constant, linear, negative
from kvcompile.dsl.parser import parse_value


def found(source: str, name: str | None = None, **params: object) -> list[Diagnostic]:
    return list(check(resolve(load(source, name), params)))


def body(lines: str, params: str = "n=4", heads: str = "") -> str:
    return heads + f"policy p({params}):\n" + "".join(f"    {line}\n" for line in lines.split("\n"))


# clauses, code, line (2 is the first clause), column, a part of the message or hint
FAULTS = [
    # names
    ("keep top(n) by attnn\nat step", "K101", 2, 20, "did you mean `attn`"),
    ("keep top(n) by raw.v\nat step", "K101", 2, 20, "did you mean `raw.k`"),
    ("on attend: ac += sum[q] attn\nkeep sink(n)\nat step", "K101", 2, 16, "declare `state ac = 0`"),
    ("score s = mxpool(mean[q] attn, 3)\nkeep top(n) by s\nat step", "K102", 2, 15, "did you mean `maxpool`"),
    ("score s = sum(attn)\nkeep top(n) by s\nat step", "K102", 2, 15, "sum[q] x"),
    ("keep sink(n) else merge into nearest by near(k)\nat step", "K102", 2, 45, "`merge into nearest by cos(k)`"),
    ("score s = ema(norm(k), 0.5)\nkeep top(n) by s\nat step", "K102", 2, 15, "belongs to the `when` and `weight`"),
    ("keep sink(n) else merge into nearest by cos(k) when acc > 1\nat step", "K101", 2, 57, "known here: count, sim"),
    (
        "layers 0:\n    score s = norm(k)\n    keep top(n) by s\nkeep top(n) by s\nat step",
        "K101",
        5,
        20,
        "below another prefix",
    ),
    ("share b = n by pyramd(20)\nkeep top(b) by norm(k)\nat step", "K102", 2, 20, "did you mean `pyramid`"),
    ("keep snk(n)\nat step", "K103", 2, 10, "did you mean `sink`"),
    ("keep frozn\nat step", "K103", 2, 10, "did you mean `frozen`"),
    ("keep recent\nat step", "K103", 2, 10, "`recent(n)`"),
    ("score s = norm(k)\nkeep s\nat step", "K103", 3, 10, "`top(n) by s`"),
    ("state k = 0\nkeep sink(n)\nat step", "K105", 2, 11, "`k_`"),
    ("score s = norm(k)\nscore s = norm(v)\nkeep top(n) by s\nat step", "K106", 3, 11, "score already"),
    ("keep sink(n)\nlayers 0:\n    score s = norm(k)\n    score s = norm(v)\nat step", "K106", 5, 15, "score already"),
    ("score s = norm(k)\nlayers 0:\n    share s = n by pyramid(2)\nkeep top(n) by s\nat step", "K106", 4, 15, "score"),
    ("state n = 0\nkeep sink(n)\nat step", "K106", 2, 11, "parameter already"),
    ("keep sink(n)\nkeep recent(n)\nat step", "K106", 3, 5, "join the sets"),
    ("score a = norm(k) + a\nkeep top(n) by a\nat step", "K108", 2, 25, "stand on its own"),
    ("pick t = w\npick w = t\nkeep t\nat step", "K108", 3, 14, "t -> w -> t"),
    ("keep sink(n) else merge into nearest by cos(raw.k)\nat step", "K109", 2, 49, "`merge into nearest by cos(k)`"),
    ("keep sink(n) else merge into nearest by cos(k) weight ema(3, 2)\nat step", "K109", 2, 66, "ema(mean(sim), 0.5)"),
    ('state r = learned("w.bin", q)\nkeep top(n) by r\nat step', "K109", 2, 23, '"weights.safetensors"'),
    ('state r = learned("w.safetensors", attn)\nkeep top(n) by r\nat step', "K109", 2, 40, "q, k, v"),
    ("share b = n by pyramid(0)\nkeep top(b) by norm(k)\nat step", "K109", 2, 28, "pyramid(20)"),
    ("share b = n by table(4)\nkeep top(b) by norm(k)\nat step", "K109", 2, 26, 'table("layers.txt")'),
    ("keep newest page\nat step", "K110", 2, 10, "declare it: `unit page(16)`"),
    ("unit page(16)\nkeep top(n) pags by mean[q] attn\nat step", "K110", 3, 10, "did you mean `page`"),
    ("keep sink(n)\nat filled(lot, 2)", "K110", 3, 15, "`unit lot(128)`"),
    ("keep top(n) by norm(k) per heads\nat step", "K111", 2, 28, "did you mean `per head`"),
    ("keep top(n) by norm(k) shared head\nat step", "K111", 2, 28, "did you mean `shared heads`"),
    ("keep sink(n)\nat prefil.end", "K112", 3, 8, "did you mean `prefill.end`"),
    ("keep sink()\nat step", "K113", 2, 10, "`sink(4)`"),
    ("keep random(n)\nat step", "K113", 2, 10, "`random(4, 4)`"),
    ("keep top(n) by cos(k)\nat step", "K113", 2, 20, "takes 2 arguments"),
    ("keep sink(n) else merge into nearest by cos(k, v)\nat step", "K113", 2, 45, "one value per entry"),
    ("keep sink(n) else fold dct\nat step", "K113", 2, 23, "`fold dct(50%)`"),
    ("keep sink(n) else merge into nearest by cos(k) weight mean(sim, 2)\nat step", "K113", 2, 59, "one value"),
    ("keep top(n) by max(norm(k))\nat step", "K113", 2, 20, "max[i] x"),
    ("keep top(n) by medn[q] attn\nat step", "K114", 2, 20, "did you mean `mean`"),
    ("keep top(n) by mean[x] attn\nat step", "K114", 2, 25, "q queries"),
    ("keep top(n) by mean[q in first(3)] attn\nat step", "K114", 2, 30, "q in last(64)"),
    ("store all as fp17\nat step", "K115", 2, 18, "did you mean `fp16`"),
    ("store all as int2 per chanel(3)\nat step", "K116", 2, 23, "did you mean `channel`"),
    ("store all as move gpu\nat step", "K116", 2, 18, "did you mean `cpu`"),
    ("on atend: a += 1\nstate a = 0\nkeep sink(n)\nat step", "K116", 2, 5, "did you mean `attend`"),
    ("positions packed\nkeep sink(n)\nat step", "K116", 2, 5, "compact"),
    ("keep sink(10% of promt)\nat step", "K116", 2, 15, "prompt, len or chunk"),
    ("keep sink(n) else fold dkt(50%)\nat step", "K116", 2, 23, "did you mean `dct`"),
    # axes
    ("score s = sum[d] q * k\nkeep top(n) by s\nat step", "K202", 2, 15, "write `sum[d] (q * k)`"),
    ("keep top(n) by k\nat step", "K202", 2, 20, "norm(...)"),
    ("unit page(16)\nkeep top(n) pages by k\nat step", "K202", 3, 26, "no channels"),
    ("state a = 0\non attend: a += k\nkeep top(n) by a\nat step", "K202", 3, 21, "no channels"),
    ("keep top(n) by sum[q] k\nat step", "K203", 2, 20, "queries come with q, attn and logit"),
    ("keep top(n) by norm(pos)\nat step", "K203", 2, 25, "channels come with k"),
    ("keep top(n) by mean[i] norm(k)\nat step", "K203", 2, 20, "same number for every entry"),
    ("keep top(n) by 3\nat step", "K203", 2, 20, "ranks nothing"),
    ("keep top(n) by attn\nat step", "K204", 2, 20, "sum[q in last(64)]"),
    ("store top(n) by attn as fp16\nat step", "K204", 2, 21, "without a query"),
    ("keep sink(n)\nat step if attn > 1", "K202", 3, 16, "`max[i] ...`"),
    (
        "keep sink(n) else merge into nearest by cos(k) weight ema(sim, 0.5)\nat step",
        "K203",
        2,
        63,
        "one number per row",
    ),
    ("share b = n by cover(mean[i] norm(k))\nkeep top(b) by norm(k)\nat step", "K203", 2, 26, "one number per entry"),
    ("share b = n by softmax(norm(k))\nkeep top(b) by norm(k)\nat step", "K202", 2, 28, "one number per layer"),
    ("pick t = top(n) by attn\nkeep t\nat step", "K204", 2, 24, "a pick that `keep` names"),
    # sets
    ("share b = n - 64 by pyramid(20)\nkeep recent(64) | top(b) by norm(k)\nat step", "K205", 2, 15, "-60"),
    ("share b = 20% by pyramid(20)\nkeep top(b) by norm(k)\nat step", "K210", 2, 15, "20% of prompt"),
    ("share b = 2.5 by pyramid(20)\nkeep top(b) by norm(k)\nat step", "K205", 2, 15, "2.5 is no whole number"),
    ("keep recent(64) | top(n - 64) by norm(k)\nat step", "K205", 2, 27, "regions of this set take 64"),
    ("keep sink(0 - n)\nat step", "K205", 2, 15, "-4"),
    ("unit page(0)\nkeep newest page\nat step", "K205", 2, 15, "`unit page(16)`"),
    ("unit page(16) from 1 - 2\nkeep newest page\nat step", "K205", 2, 24, "at least 0"),
    ("keep top(n) by norm(k) shared layers(0)\nat step", "K205", 2, 42, "`shared layers(8)`"),
    ("keep recent(0.5)\nat step", "K205", 2, 17, "0.5 is no whole number"),
    ("keep sink(1.5)\nat step", "K205", 2, 15, "10% of prompt"),
    ("keep top(2.5) by norm(k)\nat step", "K205", 2, 14, "2.5 is no whole number"),
    ("keep top(10% of prompt - 20% of prompt) by norm(k)\nat step", "K205", 2, 14, "-10% of prompt"),
    ("keep sink(n) | recent(64)\nat step\nattend sink(n) | recent(128)\nat step", "K206", 4, 22, "keep more"),
    ("keep top(n) by norm(k) per query_head\nat step", "K207", 2, 10, "up to n for each of them, 16 where 4"),
    ("pick t = top(n) by norm(k) per query_head\nkeep t\nat step", "K207", 2, 14, "union"),
    ("keep sink(n) else fold pool(25%)\nat step", "K210", 2, 33, "`fold pool(4)`"),
    ("keep sink(n) else fold dct(3)\nat step", "K210", 2, 32, "`fold dct(50%)`"),
    ("keep top(n) by norm(k) per head across heads\nat step", "K208", 2, 10, "contradict"),
    ("score s = maxpool(mean[q] attn, 6)\nkeep top(n) by s\nat step", "K209", 2, 37, "take 5 or 7"),
    ("keep top(n) by maxpool(mean[q] attn, len)\nat step", "K209", 2, 42, "such as 7"),
    ("keep top(130%) by norm(k)\nat step", "K210", 2, 14, "0% and 100%"),
    ("keep sink(10%)\nat step", "K210", 2, 15, "10% of prompt"),
    ("keep sink(n of prompt)\nat step", "K210", 2, 15, "percentage"),
    ("keep cover(3) by norm(k)\nat step", "K210", 2, 16, "cover(95%)"),
    ("keep top(n) by norm(k) across heads floor 3\nat step", "K210", 2, 47, "floor 20%"),
    ("keep sink(pos)\nat step", "K211", 2, 15, "axis `i` is open"),
    ("keep top(n) by mean[q in last(0)] attn\nat step", "K211", 2, 30, "at least 1"),
    (
        'keep top(n) by learned("w.safetensors", k)\nat step',
        "K214",
        2,
        20,
        'state trained = learned("w.safetensors", k)',
    ),
    ("keep all | top(n) by norm(k)\nat step", "K212", 2, 10, "every entry"),
    ("unit page(16)\nattend top(n / 16) pages by norm(k)\nat step", "K212", 3, 16, "is 0.25, cut to 0: no whole pages"),
    ("keep recent(n) | top(n - 4) by norm(k)\nat step", "K212", 2, 26, "is 0: no entry is chosen"),
    ('keep top("4") by norm(k)\nat step', "K213", 2, 14, "string"),
    # time
    ("keep top(n) by mean[q in last(n)] attn | frozen\nat chunk(8)", "K301", 2, 25, "q in peek(n)"),
    ("keep top(n) by norm(k)\nat chunk(8), step", "K302", 2, 10, "frozen |"),
    ("keep sink(n)\nat prefill.end", "K303", 1, 1, "`step` or `every(128)`"),
    ("layers 0: keep sink(n)\nat step\nkeep recent(n)\nat prefill.end", "K303", 4, 5, "these rows grow"),
    ("keep sink(n)", "K304", 2, 5, "at prefill.end, step"),
    ("attend top(n) by attn", "K304", 2, 5, "no `at`"),
    ("keep sink(n)\nat every", "K305", 3, 8, "every(128)"),
    ("keep sink(n)\nat step(3)", "K305", 3, 8, "every(n)"),
    ("keep sink(n)\nat chunk(0)", "K305", 3, 14, "at least 1"),
    ("keep sink(n)\nat chunk(1, 2)", "K305", 3, 8, "`chunk` alone cuts nothing"),
    ("keep sink(n)\nat full(pos)", "K305", 3, 13, "at least 1"),
    ("keep sink(n)\nat step\nat prefill.end", "K306", 4, 5, "below the sets"),
    ("keep top(n) by mean[q in peek(8)] attn\nat prefill.end, step", "K307", 2, 25, "q in last(8)"),
    ("keep sink(n) else merge into nearest by cos(k)\nat step", "K401", 2, 23, "positions compact"),
    ("keep sink(n) else fold mean weight count\nat step", "K401", 2, 23, "rotation"),
    ("layers 5..2: keep sink(n)\nat step", "K402", 2, 12, "write `layers 2..5`"),
    ("layers last..last-2: keep sink(n)\nat step", "K402", 2, 12, "write `layers last-2..last`"),
    ("keep sink(n) else drop else fold mean\nat step", "K402", 2, 23, "leave out those after it"),
    ("keep sink(n) else fold dct(50%) weight count\nat step", "K402", 2, 44, "leave out the `weight`"),
    # heads
    ("lokal: keep sink(n)\nrest: keep all\nat step", "K601", 2, 5, 'heads lokal = table("masks.tsv", top=30%)'),
]


@pytest.mark.parametrize(("lines", "code", "line", "column", "words"), FAULTS)
def test_faults(lines: str, code: str, line: int, column: int, words: str) -> None:
    matches = [d for d in found(body(lines)) if d.code == code]
    assert [(d.line, d.column) for d in matches] == [(line, column)]
    assert words in f"{matches[0].message} {matches[0].hint}"
    assert matches[0].severity == CATALOGUE[code].severity
    assert matches[0].hint


@pytest.mark.parametrize(
    ("heads", "lines", "code", "line", "words"),
    [
        ("heads a = rest\n", "a: keep sink(n)\nrest: keep all\nat step", "K602", 4, "share heads"),
        (
            'heads a = table("f")\nheads b = a\n',
            "a: keep all\nb: keep sink(n)\nrest: keep all\nat step",
            "K602",
            5,
            "`a`",
        ),
        ('heads a = rest | table("f")\n', "a: keep sink(n)\nat step", "K602", 1, "stand alone"),
        ('heads a = table("f")\n', "a: keep sink(n)\nat step", "K603", 3, "rest: keep all"),
        ('heads a = table("f")\n', "layers 0:\n    a: keep sink(n)\nat step", "K603", 4, "rest: keep all"),
        ("heads a = b\nheads b = a\n", "a: keep sink(n)\nrest: keep all\nat step", "K108", 2, "a -> b -> a"),
        ("heads a = c\n", "a: keep sink(n)\nrest: keep all\nat step", "K601", 1, "no head class `c`"),
        ('heads a = tabel("f")\n', "a: keep sink(n)\nrest: keep all\nat step", "K604", 1, "did you mean `table`"),
        ("heads a = table(4)\n", "a: keep sink(n)\nrest: keep all\nat step", "K604", 1, "one string"),
        ('heads a = probe("eco", top=1%)\n', "a: keep all\nrest: keep all\nat step", "K604", 1, "did you mean `echo`"),
        ('heads a = probe("echo")\n', "a: keep all\nrest: keep all\nat step", "K604", 1, "which part of the heads"),
        ('heads a = probe("echo", top=1%, tokens=0.5)\n', "a: keep all\nrest: keep all", "K109", 1, "tokens=1k"),
        ('heads a = table("f", top=30)\n', "a: keep sink(n)\nrest: keep all\nat step", "K210", 1, "top=30%"),
    ],
)
def test_head_classes(heads: str, lines: str, code: str, line: int, words: str) -> None:
    matches = [d for d in found(body(lines, heads=heads)) if d.code == code]
    assert matches and matches[0].line == line
    assert words in f"{matches[0].message} {matches[0].hint}"
    assert matches[0].hint


def test_head_classes_that_fit_are_silent() -> None:
    heads = 'heads a = table("f", top=30%)\nheads b = rest\n'
    for lines in ("a: keep all\nb: keep sink(n)\nat step", "a: keep all\nkeep sink(n)\nat step"):
        assert not [d for d in found(body(lines, heads=heads)) if d.code.startswith("K6")]


def test_reserved_and_option_names() -> None:
    assert [d.column for d in found(body("keep sink(prompt)\nat step", "prompt=4")) if d.code == "K105"] == [10]
    taken = [d for d in found(body("keep sink(batch)\nat step", "batch=4")) if d.code == "K105"]
    assert taken and "option" in taken[0].message


def test_a_parameter_and_a_unit_may_share_a_name() -> None:
    assert not [d for d in found("quest") if d.severity != "note"]


def test_a_score_below_a_prefix_may_replace_one_without() -> None:
    lines = "score s = norm(k)\nkeep top(n) by s\nlayers 0:\n    score s = norm(v)\n    keep top(n) by s\nat step"
    assert [d.code for d in found(body(lines)) if d.severity != "note"] == []


def test_several_findings_come_in_the_order_of_the_text() -> None:
    source = body("score s = attnn\nkeep snk(n) | top(n) by s per heds\nat stepp")
    codes = [d.code for d in found(source) if d.severity == "error"]
    assert codes == ["K101", "K103", "K111", "K112"]


def test_cycles_of_scores_are_said_once_where_they_close() -> None:
    cycle = [d for d in found(body("score a = b\nscore b = a\nkeep top(n) by a\nat step")) if d.severity == "error"]
    assert [(d.code, d.line) for d in cycle] == [("K108", 3)] and "a -> b -> a" in cycle[0].message


# What the language allows and the checker must not stumble over.
ACCEPTED = [
    "keep recent(64) | top(n) by norm(k)\nat prefill.end\nkeep recent(64)\nat step",
    'state r = learned("w.safetensors", q, k, v)\nkeep top(n) by r\nat prefill.end, step',
    'state r = 0\non insert: r = learned("w.safetensors", k)\nkeep top(n) by r\nat prefill.end, step',
    "keep sink(n) else merge into nearest by distance(pos) when sim >= ema(mean(sim), 0.5) weight sim * count\n"
    "at step\npositions compact",
    "keep recent(64)\nat when cos(q, prev.q) < 0.5",
    "keep recent(64)\nat every(4) if len > 64 and step > 8",
    "share b = n by softmax(-var[i] norm(k))\nkeep sink(b / 4) | recent(b - 1) | top(3 * b / 4) by norm(k)\nat step",
    "keep random(64, 3) | cover(95%) by norm(k) | where norm(v) > 3\nat step",
    "pick t = top(n) by norm(k)\nkeep t | recent(64)\nat step",
    "keep recent(64) else fold dct(50%)\nat full(128)\npositions compact",
    "unit entry(4)\nkeep top(n) entries by mean[i] norm(k)\nat step",
]


@pytest.mark.parametrize("lines", ACCEPTED)
def test_nothing_is_wrong(lines: str) -> None:
    assert [str(d) for d in found(body(lines)) if d.severity != "note" and d.code != "K117"] == []


def test_several_keeps_need_triggers_of_their_own() -> None:
    twice = [d for d in found(body("keep sink(n)\nat step, chunk\nkeep recent(n)\nat chunk, step")) if d.code == "K106"]
    assert [(d.line, d.column) for d in twice] == [(4, 5)]


def test_a_prefixed_score_means_what_its_prefix_says() -> None:
    lines = "score s = norm(k)\nkeep top(n) by s\nlayers 0:\n    score s = k\n    keep top(n) by s\nat step"
    wrong = [d for d in found(body(lines)) if d.severity == "error"]
    assert [(d.code, d.line) for d in wrong] == [("K202", 5)]
    lines = "layers 0:\n    score s = sum[q in last(4)] attn\n    keep top(n) by s\nlayers rest:\n"
    lines += "    score s = norm(k)\n    keep top(n) by s\nat step"
    notes = [d.message for d in found(body(lines)) if d.code == "K501"]
    assert ["few queries" in note for note in notes] == [True, False]


def test_attend_is_held_against_the_keep_of_its_own_rows() -> None:
    heads = 'heads a = table("f", top=30%)\n'
    wide = "a: keep all\nrest: keep recent(64)\nat step\nattend recent(128)\nat step"
    assert [d.code for d in found(body(wide, heads=heads)) if d.severity == "error"] == ["K206"]
    narrow = "a: keep all\nrest: keep recent(64)\nat step\na: attend recent(128)\nrest: attend recent(8)\nat step"
    assert not [d for d in found(body(narrow, heads=heads)) if d.severity == "error"]
    # Between two triggers new entries stay, so the window may be wider than what is left at the trigger.
    assert not [
        d for d in found(body("keep recent(64)\nat prefill.end\nattend recent(128)\nat step")) if d.code == "K206"
    ]


def test_definitions_that_grow_are_bounded() -> None:
    doubled = "\n".join(["score s0 = norm(k)", *(f"score s{i} = s{i - 1} + s{i - 1}" for i in range(1, 60))])
    assert [d.code for d in found(body(doubled + "\nkeep top(n) by s59\nat step")) if d.severity == "error"] == ["K008"]
    long = "\n".join(["score s0 = norm(k)", *(f"score s{i} = exp(s{i - 1})" for i in range(1, 900))])
    assert [d.code for d in found(body(long + "\nkeep top(n) by s899\nat step")) if d.severity == "error"] == ["K008"]


def test_no_more_errors_than_one_can_read() -> None:
    lines = "\n".join(f"score s{i} = unknown{i}" for i in range(300))
    assert sum(d.severity == "error" for d in found(body(lines + "\nkeep sink(n)\nat step"))) == MOST


def test_overrides_can_break_a_policy() -> None:
    faults = [d for d in found("snapkv", budget=32) if d.severity == "error"]
    assert [(d.code, d.span.text) for d in faults] == [("K205", "budget - observe")]
    assert "take 64" in faults[0].hint
    assert [d.code for d in found("snapkv", pool=6) if d.severity == "error"] == ["K209"]
    assert not [d for d in found("snapkv", budget=64) if d.severity == "error"]


def test_last_queries_under_chunk_are_found_through_scores() -> None:
    source = body("score s = mean[g] sum[q in last(16)] attn\nkeep frozen | top(n) by s\nat chunk(64)")
    assert [(d.line, d.span.text) for d in found(source) if d.code == "K301"] == [(2, "q in last(16)")]


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("streaming", None),
        ("knorm", "entries"),
        ("lagkv", "entries"),
        ("snapkv", "queries"),
        ("tova", "queries"),
        ("h2o", "everything"),
        ("sampleattention", "sampled"),
        ("quest", "landmarks"),
        ("moba", "landmarks"),
        ("tidal", "logits"),
        ("vertical", "queries"),
        ("powerattention", None),
    ],
)
def test_cost_classes(name: str, cost: str | None) -> None:
    context = Context.of(resolve(load(name)))
    costs = [
        cost_of(context, term.by, placed, clause)
        for placed, clause in context.sets()
        for term in clause.set.terms
        if hasattr(term, "by")
    ]
    assert costs == ([cost] if cost else [])


def test_every_class_but_the_cheapest_names_a_cheaper_one() -> None:
    assert list(CHEAPER) == list(COSTS)[1:]
    for name in ("knorm", "snapkv", "sampleattention", "quest"):
        assert all(d.hint.startswith("cheaper: ") for d in found(name) if d.code == "K501")


def test_a_share_that_the_entries_divide_has_a_cost() -> None:
    assert [d.message.split(":")[0] for d in found("d2o") if d.code == "K501"] == [
        "cost of this share",
        "cost of this score",
    ]


def test_second_pass_names_a_cheaper_neighbour() -> None:
    note = next(d for d in found("h2o") if d.code == "K501")
    assert "second pass" in note.message and "snapkv" in note.hint


@pytest.mark.parametrize(
    ("expression", "axes"),
    [
        ("4", ""),
        ("10% of prompt", ""),
        ("k", "id"),
        ("q", "gqd"),
        ("attn", "gqi"),
        ("sum[d] q * k", "gqid"),
        ("sum[d] (q * k)", "gqi"),
        ("mean[g] sum[q in last(4)] attn", "i"),
        ("mean[h] sum[q] attn", "i"),
        ("softmax[i] norm(k)", "i"),
        ("cos(k, mean[i] (k / norm(k)))", "i"),
        ("dot(q, k)", "gqi"),
        ("var[i] acc", ""),
        ("max(q * k, pos)", "gqid"),
        ("maxpool(acc, 3)", "i"),
        ("next.k - prev.v", "id"),
    ],
)
def test_axes_without_units(expression: str, axes: str) -> None:
    assert axes_of(parse_value(expression), Env({"acc": "i"})) == axes


@pytest.mark.parametrize(
    ("expression", "axes"),
    [
        ("min[i] k", "ud"),
        ("mean[i] acc", "u"),
        ("softmax[i] std[d] ((k - lo) / lo)", "ui"),
        ("sum[d] max(q * lo, q * lo)", "gqu"),
        ("max[g] softmax[u] dot(q, lo)", "qu"),
    ],
)
def test_axes_with_units(expression: str, axes: str) -> None:
    assert axes_of(parse_value(expression), Env({"acc": "i", "lo": "ud"}, units=True)) == axes


def test_units_in_the_plural() -> None:
    units = {"page", "box", "entry", "index"}
    plurals = {"page": "page", "pages": "page", "boxes": "box", "entries": "entry", "indices": "index", "pag": None}
    assert {word: unit_of(word, units) for word in plurals} == plurals


def test_constant_arithmetic() -> None:
    assert constant(parse_value("3 * (4 - 1) / 2")) == 4.5
    assert constant(parse_value("len - len + 2")) == 2
    assert constant(parse_value("4 / 0")) == 0
    assert linear(parse_value("len * len")) is None
    assert negative(linear(parse_value("4 - 8")) or {})
    assert not negative(linear(parse_value("len - 8")) or {})


def test_every_code_is_documented() -> None:
    for code, entry in CATALOGUE.items():
        assert len(code) == 4 and code[0] == "K" and code[1:].isdigit()
        assert entry.severity in ("error", "warning", "note") and entry.explanation.endswith(".")


def test_check_never_raises_on_a_bare_tree() -> None:
    assert check(resolve(load(parse("policy p():\n    keep all\n"))))
