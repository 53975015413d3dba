"""The memory pass: what is called bounded stops growing, and its counterpart in numbers shows it."""

from __future__ import annotations

import pytest

from kvcompile.dsl.dialect_sets import KeepOp
from kvcompile.dsl.module import from_text, ops_of
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy
from kvcompile.passes.residents import forwards

FACTS = ModelFacts(4, 8, 4, 64)


def mine(*lines: str) -> str:
    return "policy mine():\n" + "".join(f"    {line}\n" for line in lines)


CASES = [
    (["keep all", "at step"], "grows", "grows"),
    (["keep recent(16)", "at chunk, step"], "bounded", "bounded"),
    (["keep recent(16)", "at prefill.end"], "bounded", "grows"),
    (["keep recent(16)", "at step"], "grows", "bounded"),
    (["keep frozen | top(8) by norm(k)", "at filled(9)"], "bounded", "grows"),
    (["keep recent(now / 2)", "at chunk, step"], "bounded", "grows"),
    (["keep recent(4) | top(8) by norm(k)", "at every(5) if len > 20"], "grows", "bounded"),
    (["keep recent(4) | top(8) by norm(k)", "at every(5) if len < 20"], "grows", "grows"),
    (["keep recent(4) | where norm(k) > 1", "at step"], "grows", "grows"),
    (["keep sink(2) | recent(6)", "    else fold mean weight count", "at prefill.end, step"], "bounded", "bounded"),
    (
        ["share b = 8 by softmax(var[i] norm(k))", "keep top(b) by norm(k)", "at prefill.end, step"],
        "bounded",
        "bounded",
    ),
    (["keep random(5, 3) | recent(6)", "at step"], "grows", "bounded"),
]


@pytest.mark.parametrize(("lines", "prefill", "decode"), CASES)
def test_the_module_says_what_grows(lines: list[str], prefill: str, decode: str) -> None:
    module = from_text(compile_policy(mine(*lines), FACTS).modules["memory"])
    keep = next(op for op in ops_of(module) if isinstance(op, KeepOp))
    assert keep.prefill is not None and keep.decode is not None
    assert (keep.prefill.data, keep.decode.data) == (prefill, decode)


@pytest.mark.parametrize(("lines", "prefill", "decode"), CASES)
def test_what_is_bounded_is_counted_so(lines: list[str], prefill: str, decode: str) -> None:
    plan = compile_policy(mine(*lines), FACTS).plan
    totals = [sum(forward.after) for forward in forwards(plan, 60, 120)]
    assert (decode == "grows") == (max(totals[101:]) > max(totals[61:101]))
    assert (totals[0] < 60 * 16) == (prefill == "bounded")


def test_one_keep_of_several_is_enough() -> None:
    text = mine("keep recent(40)", "at prefill.end", "keep recent(16)", "at every(8)")
    module = from_text(compile_policy(text, FACTS).modules["memory"])
    found = [(op.prefill.data, op.decode.data) for op in ops_of(module) if isinstance(op, KeepOp)]  # type: ignore[union-attr]
    assert found == [("bounded", "grows"), ("grows", "bounded")]
