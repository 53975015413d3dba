"""Memory bounds: never below what is really held, and None where a row grows without end."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.dsl.dialect_sets import KeepOp
from kvcompile.dsl.module import from_text, ops_of
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy
from kvcompile.passes.memory import bounds
from kvcompile.passes.residents import forwards, groups

FACTS = ModelFacts(4, 8, 4, 64)


def mine(*lines: str) -> str:
    return "policy mine():\n" + "".join(f"    {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("lines", "prompt", "prefill", "step", "overshoot"),
    [
        (["keep all"], 100, 100, None, 0),
        (["keep sink(4) | recent(16)", "at chunk, step"], 100, 20, 20, 1),
        (["keep sink(4) | recent(16)", "at chunk, step"], 12, 12, 20, 1),
        (["keep sink(4) | recent(16)", "at prefill.end"], 100, 20, None, 0),
        (["keep recent(8) | top(10% of prompt) by norm(k)", "at every(5)"], 100, 100, 18, 5),
        (["keep recent(8) | top(8) by norm(k)", "at full(40)"], 100, 16, 16, 24),
        (["keep top(8) by norm(k) across heads", "at prefill.end, step"], 100, 32, 32, 1),
        (["keep frozen | top(8) by norm(k)", "at chunk(10), step"], 100, 80, None, 1),
        (["keep prompt", "at step"], 100, 100, 100, 1),
        (["keep generated | recent(4)", "at step"], 100, 100, None, 1),
        (["keep recent(now / 2)", "at step"], 100, 100, None, 1),
        (["unit lot(8)", "keep sink(4) | newest lot", "at filled(lot, 2)"], 100, 8, 12, 16),
        (["share b = 10 by pyramid(5)", "keep top(b) by norm(k)", "at prefill.end, step"], 100, 18, 18, 1),
    ],
)
def test_bounds(lines: list[str], prompt: int, prefill: int, step: int | None, overshoot: int) -> None:
    (bound,) = bounds(compile_policy(mine(*lines), FACTS).plan, prompt)
    assert (bound.after_prefill, bound.step_cap, bound.overshoot) == (prefill, step, overshoot)


def test_layer_totals_say_what_competing_heads_hold_together() -> None:
    (bound,) = bounds(compile_policy("adakv", FACTS, budget=24, observe=8).plan, 100)
    assert bound.after_prefill == 96  # one row may win all
    assert bound.layer_totals == (96, 96, 96, 96)


def test_classes_are_bounded_apart(tmp_path: Path) -> None:
    table = tmp_path / "heads.tsv"
    table.write_text("1 0 0 0\n0 0 0 0\n1 1 1 1\n0 0 0 1\n")
    plan = compile_policy("prulong", FACTS, tables={"retrieval": table}, n_sink=2, window=6).plan
    far, near = bounds(plan, 50)
    assert (far.name, far.after_prefill, far.step_cap, far.layer_totals) == ("retrieval", 50, None, (50, 0, 200, 50))
    assert (near.name, near.after_prefill, near.step_cap, near.layer_totals) == ("local", 8, 8, (24, 32, 0, 24))


@pytest.mark.parametrize("name", ["streaming", "h2o", "tova"])
def test_steps_never_exceed_their_cap(name: str) -> None:
    params = {"streaming": {"n_sink": 4, "window": 20}, "tova": {"budget": 24}}.get(name, {})
    plan = compile_policy(name, FACTS, **params).plan
    for prompt in (1, 7, 33, 150):
        (bound,) = bounds(plan, prompt)
        assert bound.step_cap is not None
        heads = [group.heads for group in groups(plan, prompt)]
        for forward in forwards(plan, prompt, 40):
            longest = max(-(-total // n) for total, n in zip(forward.after, heads, strict=True))
            limit = bound.step_cap if forward.phase == "step" else bound.after_prefill
            assert longest <= limit


@pytest.mark.parametrize(
    ("lines", "prefill", "decode"),
    [
        (["keep all", "at step"], "grows", "grows"),
        (["keep recent(16)", "at chunk, step"], "bounded", "bounded"),
        (["keep recent(16)", "at prefill.end"], "bounded", "grows"),
        (["keep recent(16)", "at step"], "grows", "bounded"),
        (["keep frozen | top(8) by norm(k)", "at filled(9)"], "bounded", "grows"),
        (["keep recent(now / 2)", "at chunk, step"], "bounded", "grows"),
    ],
)
def test_the_module_says_what_grows(lines: list[str], prefill: str, decode: str) -> None:
    module = from_text(compile_policy(mine(*lines), FACTS).modules["memory"])
    keep = next(op for op in ops_of(module) if isinstance(op, KeepOp))
    assert keep.prefill is not None and keep.decode is not None
    assert (keep.prefill.data, keep.decode.data) == (prefill, decode)
