"""Sliding windows: a plan for a model of which some layers read only the newest tokens.

Takes a frozen plan, gives one whose classes each belong to layers of one window, with the trigger `slide` where there
is one. Guarantees: a model without windows keeps its plan as it is; what would let layers of different windows decide
together, or keep what a window has left, is refused with K706 and the reason.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from kvcompile.dsl.diagnostics import PolicyError, fail, outside
from kvcompile.kernels.formulas import sources_of
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Trigger, formulas_of

SLACK = 64  # steps for which entries may wait after they have left a window; an eighth of a small one


def slide(plan: PolicyPlan) -> PolicyPlan:
    """The plan with a class of its own for every (class, window); the meaning is the policy's inside each window."""
    windows = plan.facts.windows
    if not any(windows):
        return plan
    for cls in range(len(plan.classes)):
        _refuse(plan, cls)
    parts = [
        (cls, window)
        for cls in range(len(plan.classes))
        for window in sorted({windows[layer] for layer in plan.class_layers(cls)} or {0})
    ]
    index = {part: i for i, part in enumerate(parts)}
    at_once = {
        part.rows_of if part.rows_of is not None else cls for cls, part in enumerate(plan.classes) if _sees(part)
    }
    classes = tuple(_inside(plan.classes[cls], window, index, 1 if cls in at_once else SLACK) for cls, window in parts)
    # Of a layer that is off it is all the same what stands there.
    class_of = tuple(
        tuple(0 if layer in plan.off else index[cls, windows[layer]] for cls in row)
        for layer, row in enumerate(plan.class_of)
    )
    # Scores that wait for all layers are named by their class, which has one window and so one new place.
    names = {f"@score:{cls}": f"@score:{place}" for (cls, _), place in index.items()}
    states = tuple(replace(state, name=_renamed(state.name, names)) for state in plan.states)
    digest = hashlib.sha256(f"{plan.digest} slides {SLACK}".encode()).hexdigest()[:16]
    return replace(plan, classes=classes, class_of=class_of, states=states, digest=digest)


def _sees(part: ClassPlan) -> bool:
    """Whether a rule would decide by whether what has left the window is still in memory: `full(n)` counts it, and a
    later rule of the same rows finds it gone or not, when it asks earlier queries again."""
    newest = part.rows_of is not None and any(source.kind == "last" for source in sources_of(formulas_of(part)))
    return newest or any(trigger.kind == "full" for trigger in part.triggers)


def _renamed(state: str, names: dict[str, str]) -> str:
    head, colon, place = state.rpartition(":")
    return names[head] + colon + place if head in names else state


def _inside(part: ClassPlan, window: int, index: dict[tuple[int, int], int], slack: int) -> ClassPlan:
    if part.rows_of is not None:
        return replace(part, rows_of=index[part.rows_of, window])
    if not window:
        return part
    # A little slack, because to drop one entry at every step would cost a step more than it frees.
    steps = max(1, min(slack, window // 8))
    return replace(part, triggers=(*part.triggers, Trigger("slide", steps)))


def _refuse(plan: PolicyPlan, cls: int) -> None:
    part = plan.classes[cls]
    windows = {plan.facts.windows[layer] for layer in plan.class_layers(cls)}
    together = plan.spans(cls) or any(t.layers != "each" for t in part.selections)
    picked = part.only_picks or any(isinstance(t, Region) and t.kind == "picked" for t in part.keep)
    if len(windows) > 1 and (together or picked):
        raise _refusal(
            part.name,
            "decides for several layers together, of which some have a sliding window and some have not",
            "give the layers with a window a `layers` block of their own",
        )
    if any(windows) and any(loser.kind == "fold" for loser in part.losers):
        raise _refusal(
            part.name,
            "folds what it drops into entries that stay, in layers with a sliding window, which would read them on",
            "let those layers `drop`",
        )


def _refusal(name: str, reason: str, hint: str) -> PolicyError:
    return fail("K706", f"`{name}` {reason}", outside("model"), hint)
