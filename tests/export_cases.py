"""Policy steps of a small model, seen from outside: what went into one layer, what came out, and what stayed.

The reference backend runs; its entry points are watched, so that any other meaning of the same step can be held to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

import kvcompile
from kvcompile.kernels import ops
from kvcompile.kernels.decomposed import DecomposedLayer
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan
from tests.models import random_model, tokens

LAYER = 1


@dataclass(slots=True)
class Step:
    """One forward of one layer of one sequence: rows before it, its tokens, the clock; what reference made of them."""

    plan: PolicyPlan
    phase: str
    before: Site
    q: Tensor  # [q_heads, m, head_dim]
    k: Tensor
    v: Tensor
    scale: float
    out: Tensor  # [m, q_heads, head_dim]
    after: Site


def watched(policy: str, phase: str, prompt: int, steps: int, **params: object) -> Step:
    """The prompt's forward, or the last step, of layer LAYER of a random model under a policy, by the reference."""
    model = kvcompile.optimize(random_model(), policy, backend="reference", compile="off", **params)
    found: list[dict] = []
    kind = "attend_prefill" if phase == "prefill" else "attend_step"
    real = getattr(ops.Reference, kind)

    def attend(plan, site, q, k, v, scale, *rest):
        before = _copy(site)
        out = real(plan, site, q, k, v, scale, *rest)
        if int(site.layer) == LAYER:
            found.append({"before": before, "q": q, "k": k, "v": v, "scale": scale, "out": out, "site": site})
        return out

    with mock.patch.object(ops.Reference, kind, staticmethod(attend)):
        new = 1 if phase == "prefill" else 1 + steps
        model.generate(torch.tensor([tokens(prompt)]), max_new_tokens=new, do_sample=False)
        last = found[-1]
    plan = kvcompile.inspect(model).plan
    q, k, v, out = (last[name][0].clone() for name in ("q", "k", "v", "out"))
    return Step(plan, phase, last["before"], q, k, v, last["scale"], out, _copy(last["site"]))


def _copy(site: Site) -> Site:
    return Site(*(t.clone() for t in site))


def rows_of(plan: PolicyPlan, site: Site) -> list[dict[int, tuple[Tensor, Tensor, Tensor, bool]]]:
    """Of each KV head: position -> key, value, states, whether it has won before."""
    rows = []
    for head in range(plan.facts.kv_heads):
        row = site.base(plan.facts.kv_heads) + head
        slots = site.slots(row, 0, int(site.length[row]))
        rows.append({int(site.pos[s]): (site.k[s], site.v[s], site.state[:, s], bool(site.frozen[s])) for s in slots})
    return rows


def inputs_of(step: Step, layer: DecomposedLayer, entries: int, seed: int = 0) -> list[Tensor]:
    """The decomposed layer's inputs for a step: entries in columns drawn at random, the rest filled with rubbish."""
    plan, clock = step.plan, step.before.clock[0].tolist()
    start, heads = clock[Clock.START], plan.facts.kv_heads
    held = rows_of(plan, step.before)
    generator = torch.Generator().manual_seed(seed)
    given = {port.name: torch.zeros(port.shape, dtype=port.dtype) for port in layer.inputs}
    given["pos"].fill_(-1)
    given["k"].fill_(7.0)
    given["v"].fill_(-7.0)
    for head in range(heads):
        fresh = {start + i: (step.k[head, i], step.v[head, i], None, False) for i in range(clock[Clock.NEW])}
        if head == 0 or not layer.aligned:
            columns = torch.randperm(entries, generator=generator).tolist()
        for column, (pos, (key, value, state, won)) in zip(columns, {**held[head], **fresh}.items(), strict=False):
            given["pos"][head, column], given["resident"][head, column] = pos, True
            given["k"][head, column], given["v"][head, column] = key, value
            if "states" in given:
                given["states"][:, head, column] = 99.0 if state is None else state
            if "frozen" in given:
                given["frozen"][head, column] = won
    given["at"].fill_(-1)
    real = clock[Clock.NEW]
    width = given["at"].shape[0]
    given["at"][width - real :] = torch.arange(start, start + real)
    given["q"][:, width - real :] = step.q[:, -real:]
    ring = step.before.ring[0]
    for back in range(1, width) if step.phase == "step" else ():  # earlier queries that a score asks for
        given["at"][width - 1 - back] = start - back
        given["q"][:, width - 1 - back] = ring[:, (start - back) % ring.shape[1]]
    if "counts" in given:
        given["counts"].copy_(step.before.counts[LAYER, layer.given, 0])
    for name, column in (("prompt", Clock.PROMPT), ("step", Clock.STEP)):
        if name in given:
            given[name].fill_(clock[column])
    return [given[port.name] for port in layer.inputs]


def differences(step: Step, layer: DecomposedLayer, inputs: list[Tensor], results: list[Tensor]) -> dict[str, object]:
    """Largest errors of out and states (of survivors), and whether every KV head keeps what the reference keeps."""
    given = {port.name: tensor for port, tensor in zip(layer.inputs, inputs, strict=True)}
    made = {port.name: tensor for port, tensor in zip(layer.outputs, results, strict=True)}
    real = int(step.before.clock[0, Clock.NEW])
    found = {"out": float((made["out"][-real:] - step.out[-real:]).abs().max()), "kept": True, "states": 0.0}
    dropped = 0
    for head, row in enumerate(rows_of(step.plan, step.after)):
        kept = made["keep"][head]
        found["kept"] &= sorted(given["pos"][head, kept].tolist()) == sorted(row)
        dropped += int(given["resident"][head].sum()) - len(row)
        for i in range(len(step.plan.states)):
            for column in kept.nonzero().flatten().tolist():
                truth = row[int(given["pos"][head, column])][2][i]
                found["states"] = max(found["states"], float((made["states"][i, head, column] - truth).abs()))
    return found | {"dropped": dropped}
