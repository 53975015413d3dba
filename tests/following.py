"""Product and oracle side by side on policies that are texts: turn by turn, and padded in a batch.

A rule is what `oracle_policies` describes; `policy` writes the text of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import kvcompile
from tests.driving import NEAR_TIE, call, drive, one_by_one, padded, same
from tests.models import random_model, tokens
from tests.oracle import Oracle
from tests.oracle_policies import KeepAll

Case = tuple[str, Callable[[], KeepAll]]  # a policy's text, and the rule that it must follow

# A prompt, steps, a second prompt on the same cache, and steps again.
TURNS = [tokens(31, seed=1), *one_by_one(tokens(5, seed=2)), tokens(7, seed=3), *one_by_one(tokens(4, seed=4))]
H2O = ("state acc = 0", "on attend: acc += sum[q] attn")
END, STEPS = "at prefill.end", "at prefill.end, step"


def policy(*clauses: str) -> str:
    return "policy p():\n" + "".join(f"    {clause}\n" for clause in clauses)


def follows(text: str, rule: KeepAll, backend: str) -> None:
    """Asserts the kept positions and logits of the oracle after each of `TURNS`."""
    truth = Oracle(random_model("llama64"), rule)
    model = random_model("llama64")
    kvcompile.optimize(model, text, backend=backend, compile="off")
    for i, (turn, found) in enumerate(zip(TURNS, drive(model, *TURNS), strict=True)):
        logits = truth.feed(turn)
        assert truth.closest > NEAR_TIE, "a near tie: choose another seed"
        assert found.kept[0] == truth.kept(), f"kept positions after call {i}"
        same(found.logits[0], logits, f"call {i}")


def batch_is_alone(text: str, backend: str) -> None:
    """Asserts that a padded batch of three prompts gives what each gives alone, through three steps."""
    model = random_model("llama64")
    kvcompile.optimize(model, text, backend=backend, compile="off")
    prompts = [tokens(n, seed=20 + n) for n in (29, 8, 17)]
    steps = [tokens(3, seed=30 + b) for b in range(3)]
    alone = [drive(model, prompt, *one_by_one(mine)) for prompt, mine in zip(prompts, steps, strict=True)]
    ids, mask = padded(prompts, "left")
    found, cache = call(model, ids, mask=mask)
    for step in range(4):
        for b in range(3):
            logits = found.logits[b, mask[b].bool()] if step == 0 else found.logits[b]
            assert found.kept[b] == alone[b][step].kept[0], f"row {b}, call {step}"
            same(logits, alone[b][step].logits[0], f"row {b}, call {step}")
        if step < 3:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            found, cache = call(model, torch.tensor([[mine[step]] for mine in steps]), cache, mask)
