"""Corners in which a policy once went wrong on a model; each test says what happened."""

from __future__ import annotations

import pytest

import kvcompile
from kvcompile.dsl import PolicyError
from tests.driving import BACKENDS, drive, one_by_one
from tests.models import random_model, tokens


def policy(*lines: str) -> str:
    return "policy p():\n" + "".join(f"    {line}\n" for line in lines)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "second",
    [
        ("keep recent(1) | top(2) by cos(k, mean[i] k) per query_head", "    else fold mean weight count"),
        ("keep top(2) by mean[g] max[q in last(2)] attn",),
        ("keep top(2) pages by norm(k)", "unit page(4)"),
        ("keep top(b) by maxpool(norm(k), 3) across layers", "share b = 4 by softmax(now - len)"),
    ],
)
def test_rows_that_dropped_all_can_be_judged_again(backend: str, second: tuple[str, ...]) -> None:
    """A keep after one that had left nothing met rows without a single column, which no reduction takes."""
    model = random_model()
    declared = [line for line in second if not line.startswith(("keep", " "))]
    judged = [line for line in second if line not in declared]
    text = policy(*declared, "keep top(0) by norm(k)", "at prefill.end, step", *judged, "at prefill.end, every(2)")
    kvcompile.optimize(model, text, backend=backend, compile="off")
    turns = [tokens(9), *one_by_one(tokens(4, seed=1))]
    for seen in drive(model, *turns):
        assert not seen.logits.isnan().any()
        assert seen.kept[0] == (((),) * 2,) * 3


@pytest.mark.parametrize("size", ["step + 1", "10% of len", "now / 4"])
def test_pyramids_beside_regions_that_move_are_refused(size: str) -> None:
    """A pyramid leaves room for the regions of its set, once; sizes that move ended in a KeyError."""
    text = policy("share b = 4 by pyramid(2)", f"keep recent({size}) | top(b) by norm(k)", "at prefill.end, step")
    with pytest.raises(PolicyError) as caught:
        kvcompile.optimize(random_model(), text, backend="reference", compile="off")
    assert [(finding.code, finding.span.text) for finding in caught.value.diagnostics] == [("K914", size)]
