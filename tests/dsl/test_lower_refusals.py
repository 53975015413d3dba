"""What this version parses and cannot run: refused with its own code, at its own place, with a way out."""

from __future__ import annotations

import pytest

from kvcompile.dsl import PolicyError, load, resolve
from kvcompile.dsl.lower import lower


def clauses(*lines: str) -> str:
    return "policy mine():\n" + "".join(f"    {line}\n" for line in lines)


def lowered(policy: str) -> None:
    lower(resolve(load(policy)))


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        (["keep recent(4)", "store rest as int4", "at step"], "K909", "store rest as int4"),
        (["keep recent(4) else store as int(2)", "at step"], "K908", "store as int(2)"),
        (["keep recent(4) else move cpu", "at step"], "K908", "move cpu"),
        (["keep recent(4) else merge into first by cos(k)", "at step"], "K908", "merge into first by cos(k)"),
        (["keep recent(4) else merge into nearest by norm(k)", "at step"], "K908", "norm(k)"),
        (["keep recent(4) else merge into nearest by cos(k) weight age", "at step"], "K908", "age"),
        (["keep recent(4) else merge into nearest by cos(k) when len > 4", "at step"], "K905", "len"),
        (["keep recent(4) else merge into nearest by cos(k) when ema(sim, 0.5) > 0", "at step"], "K908", "sim"),
        (["keep recent(4) else merge into nearest by cos(k) when mean[h] sim > 0", "at step"], "K908", "mean[h] sim"),
        (["keep recent(4) else fold mean weight sim", "at step"], "K908", "fold mean weight sim"),
        (["keep recent(4) else fold dct(0%)", "at step"], "K210", "0%"),
        (["keep pow2 page", "unit page(16)", "at step"], "K902", "pow2 page"),
        (["keep own page", "unit page(16)", "at step"], "K902", "own page"),
        (["keep span(\"question\")", "at step"], "K902", 'span("question")'),
        (["keep t | recent(4)", "at step"], "K902", "t"),
        (["pick t = recent(4)", "keep t", "at step"], "K902", "recent(4)"),
        (["pick t = top(4) by norm(k) across layers", "keep t", "at step"], "K904", "top(4) by norm(k) across layers"),
        (["pick t = top(4) by logit", "keep t", "at step"], "K204", "logit"),
        (["keep recent(4)", "at full(20% of prompt)"], "K903", "full(20% of prompt)"),
        (["keep recent(4)", "at when max[i] attn > 0.5"], "K903", "attn"),
        (["keep recent(4)", "at every(4) if age > 4"], "K903", "age"),
        (["keep top(4) by norm(k) across heads", "at every(4) if len > 8"], "K903", "len > 8"),
        (["keep top(4) by norm(k) shared layers(2)", "at every(4) if len > 8"], "K903", "len > 8"),
        (["keep top(4) by norm(k) shared heads", "at when cos(q, prev.q) < 0.5"], "K903", "cos(q, prev.q) < 0.5"),
        (["keep top(4) by mean[h] norm(k)", "at when cos(q, prev.q) < 0.5"], "K903", "when cos(q, prev.q) < 0.5"),
        (["keep top(10% of now) by norm(k) * chunk", "at step"], "K905", "chunk"),
        (["keep top(4) by norm(k) * 2MB", "at step"], "K905", "2MB"),
        (["keep top(4) by norm(prev.k)", "at step"], "K905", "prev.k"),
        (["keep top(4) by mean[i in last(4)] norm(k)", "at step"], "K905", "i in last(4)"),
        (["keep top(4) by sim", "at step"], "K905", "sim"),
        (["keep cover(50%) by sum[q in peek(4)] attn", "at chunk(8)"], "K901", "cover(50%) by sum[q in peek(4)] attn"),
        (["keep cover(8) by norm(k)", "at step"], "K210", "8"),
        (['keep top(4) by learned("f.safetensors", k)', "at step"], "K906", 'learned("f.safetensors", k)'),
        (['state a = learned("f.safetensors", pos)', "keep top(4) by a", "at step"], "K906", "pos"),
        (["state a = attn", "keep top(4) by a", "at step"], "K906", "attn"),
        (["state a = 0", "on step: a += max[q] attn", "keep top(4) by a", "at step"], "K906", "attn"),
        (["state a = 0", "on step: a = sum[d] q", "keep top(4) by a", "at step"], "K905", "q"),
        (["state a = 0", "on attend: a += max[q in last(4)] attn", "keep top(4) by a", "at step"], "K906",
         "q in last(4)"),
        (["state a = 0", "on attend: a += norm(k) * len", "keep top(4) by a", "at step"], "K905", "len"),
        (["state a = 0", "on attend: a = k", "keep top(4) by a", "at step"], "K906", "k"),
        (["unit page(16) with c = mean[i] k", "state a = 0", "on attend: a += dot(k, c)", "keep top(4) by a"],
         "K906", "c"),
        (["unit page(16, stride=8)", "keep newest page", "at step"], "K913", "newest page"),
        (["unit page(16) with c = mean[i] attn", "keep newest page", "at step"], "K913", "attn"),
        (["unit page(16) with c = mean[i] k", "keep where dot(k, c) > 0", "at step"], "K913", "where dot(k, c) > 0"),
        (["unit page(16)", "keep top(4) pages by norm(k) per page", "at step"], "K904",
         "top(4) pages by norm(k) per page"),
        (["unit page(16)", "keep top(4) pages by norm(k) across layers", "at step"], "K904",
         "top(4) pages by norm(k) across layers"),
        (["share b = 4 by cover(norm(k) > 0 and len)", "keep top(4) by b", "at step"], "K914", "b"),
        (["share b = 4 by softmax(norm(k))", "keep top(b) by norm(k)", "at step"], "K914", "norm(k)"),
        (["share b = 4 by halves(2)", "keep top(b) by norm(k)", "at step"], "K914", "halves(2)"),
        (["share b = 4 by cover(s)", "score s = norm(k)", "keep recent(b) | top(b) by maxpool(s, 3)", "at step"],
         "K914", "recent(b)"),
        (["keep top(4) by norm(k) shared heads per page", "unit page(16)", "at step"], "K904",
         "top(4) by norm(k) shared heads per page"),
        (["keep top(4) by norm(k) shared heads | top(2) by norm(v)", "at step"], "K904", "top(2) by norm(v)"),
        (["keep top(4) by norm(k) shared heads | random(4, 1)", "at step"], "K904", "random(4, 1)"),
        (["keep top(4) by norm(k) shared heads", "at prefill.end", "keep top(2) by norm(v)", "at step"], "K904",
         "top(2) by norm(v)"),
        (["share b = 4 by cover(mean[h] norm(k))", "keep top(b) by norm(v)", "at step"], "K904", "top(b) by norm(v)"),
        (["keep top(2) by -pos | top(2) by norm(v) across heads | top(4) by mean[h] norm(k)", "at step"], "K904",
         "top(2) by norm(v) across heads"),
        (["keep top(4) by norm(v) * mean[h] norm(k)", "at step"], "K904", "top(4) by norm(v) * mean[h] norm(k)"),
        (["unit page(16) with c = mean[h] mean[i] k", "keep top(4) by dot(k, c) per page", "at step"], "K904",
         "top(4) by dot(k, c) per page"),
        (["state a = 0", "on attend: a += mean[h] sum[q] attn", "keep top(4) by a | top(2) by norm(k)", "at step"],
         "K906", "mean[h] sum[q] attn"),
        (["state a = 0", "on attend: a = max(a, mean[h] attn)", "keep top(4) by norm(k) | top(4) by a", "at step"],
         "K906", "max(a, mean[h] attn)"),
        (["state a = 0", "on attend: a += mean[h] sum[q] attn", "x: keep top(4) by a", "rest: keep all", "at step"],
         "K906", "mean[h] sum[q] attn"),
        # What waits for all layers comes last, and has one score per entry, of candidates known by then.
        (["keep top(4) by norm(k) across layers", "at prefill.end", "keep recent(4)", "at step"], "K904",
         "keep top(4) by norm(k) across layers"),
        (["share b = 4 by cover(norm(v))", "keep top(b) by norm(k)", "at prefill.end", "keep recent(4)", "at step"],
         "K904", "keep top(b) by norm(k)"),
        (["share b = 4 by cover(norm(v))", "keep top(b) by max[q in last(2)] attn per query_head", "at prefill.end"],
         "K904", "top(b) by max[q in last(2)] attn per query_head"),
        (["keep top(4) by norm(k) across layers | top(4) by maxpool(norm(v), 3)", "at prefill.end"], "K904",
         "top(4) by maxpool(norm(v), 3)"),
        # A new entry stands alone, with its own query; a state's weights go by its name.
        (["state a = norm(k) / max[i] norm(k)", "keep top(4) by a", "at step"], "K906", "max[i] norm(k)"),
        (["state a = 0", "on insert: a = sum[i] norm(k)", "keep top(4) by a", "at step"], "K906", "sum[i] norm(k)"),
        (["state a = 0", "on insert: a = mean[q in last(3)] dot(q, k)", "keep top(4) by a", "at step"], "K906",
         "q in last(3)"),
        (['state a = learned("f.safetensors", q) + learned("g.safetensors", q)', "keep top(4) by a", "at step"], "K906",
         'learned("g.safetensors", q)'),
        (['state a = learned("f.safetensors", q)', 'on insert: a = learned("f.safetensors", k)', "keep top(4) by a",
          "at step"], "K906", 'learned("f.safetensors", k)'),
        (["keep recent(4) | where sum[q in peek(4)] attn > 0.1", "at chunk(8)"], "K901",
         "where sum[q in peek(4)] attn > 0.1"),
        (["share b = now / 8 by pyramid(2)", "keep top(b) by norm(k)", "at prefill.end"], "K914", "now"),
        (["share b = 10% of chunk by pyramid(2)", "keep top(b) by norm(k)", "at chunk(8)"], "K914", "10% of chunk"),
        (["keep recent(0.5)", "at step"], "K205", "0.5"),
        (["keep sink(1.5 + 1)", "at step"], "K205", "1.5 + 1"),
        (["keep top(1.5) by norm(k)", "at step"], "K205", "1.5"),
        (["keep recent(50%)", "at step"], "K210", "50%"),
        (["layers 2: positions compact", "keep recent(4)", "at step"], "K911", "positions compact"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_at_its_own_place(lines: list[str], code: str, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        lowered(clauses(*lines))
    found = [(finding.code, finding.span.text) for finding in caught.value.diagnostics]
    assert (code, text) in found
    assert all(finding.hint for finding in caught.value.diagnostics), str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        # Heads that decide by the same numbers keep the same entries.
        ["keep top(4) by norm(k) shared heads | top(2) by norm(v) shared heads | top(2) by -age", "at step"],
        ["score s = mean[h] norm(k)", "keep top(4) by s | bottom(2) by s per head", "at step"],
        ["state a = 0", "on attend: a += mean[h] sum[q] attn", "keep top(4) by a | top(2) by pos + a", "at step"],
        ["layers 0: keep top(4) by norm(k) shared heads", "layers rest: keep top(4) by norm(k)", "at step"],
        ["keep top(4) by norm(k) across heads", "at step, every(64)"],
        ["keep top(4) by norm(k)", "at full(64)"],
        ["share b = 10% of prompt + 8 by pyramid(2)", "keep top(b) by norm(k)", "at prefill.end"],
        ["share b = 4 by pyramid(2)", "keep recent(b / 2) | top(b - 1) by norm(k)", "at full(64)"],
        ["keep top(4) by norm(k) across heads", "at step, full(64)"],  # by the longest row
        ["keep top(4) by mean[h] norm(k)", "at every(8) if len > 16"],  # rows that hold the same have one length
        ["keep top(4) by norm(k) across heads across layers", "at every(8) if now > 16"],
        ["keep top(4) by norm(k) shared layers(2) | random(4, 1) | where age < 8 and not pos < 2", "at step"],
        ["keep where norm(k) > 1 | cover(95%) by norm(v) | top(2MB) by step * norm(raw.k)", "at step"],
        ["keep top(20% of len) by sum[q in sample(5%)] attn | bottom(4) by var[q in last(4)] logit", "at step"],
        ["keep top(4) by sum[q in last(4)] dot(q, k) * count", "at when cos(q, prev.q) < 0.5"],
        ["unit page(16)", "keep top(4) pages by norm(k) | top(1) pages by mean[i] norm(v) across heads", "at step"],
        ["keep recent(4) else merge into nearest by dot(v) weight mean(sim) else fold pool(4)", "at step"],
        ["keep recent(4)", "at step", "keep top(4) by norm(k) across layers", "at prefill.end"],
        ["share b = 4 by cover(norm(v))", "keep top(b) by maxpool(norm(k), 3) | top(b) by norm(k)", "at prefill.end"],
        [
            'state a = learned("f.safetensors", q)',
            'on insert: a = 2 * learned("f.safetensors", q)',
            "keep top(4) by a",
            "at step",
        ],
        ["state a = 0", "on insert: a = dot(q, k) + pos", "keep top(4) by a", "at step"],
        ["keep recent(9 / 2) | top(0.5) by norm(k)", "at step"],  # a quotient is cut, a part is of the candidates
    ],
)
def test_what_lies_beside_these_refusals_lowers(lines: list[str]) -> None:
    lowered(clauses(*lines))


def test_each_refusal_about_heads_and_counts_shows_a_way_out() -> None:
    text = clauses(
        "state a = 0",
        "on attend: a += mean[h] sum[q] attn",
        "keep top(4) by a shared heads | top(2) by norm(k)",
        "at step",
    )
    with pytest.raises(PolicyError) as caught:
        lowered(text)
    assert {finding.code: finding.hint for finding in caught.value.diagnostics} == {
        "K904": "say `shared heads` at every selection of the set, or at none, without `[h]`",
        "K906": "leave out `[h]`, or let all heads share one decision",
    }


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        lowered(clauses("attend rest", "keep pow2 page", "unit page(cos(q, prev.q) < 0.5)", "off", "at step"))
    assert {finding.code for finding in caught.value.diagnostics} == {"K902", "K912", "K913"}
