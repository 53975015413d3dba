"""A prompt's piece by generated C++: attention by intervals, what queries say of entries, and who wins.

Takes what the operators take; None, or the definition, where something has no C++ form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.choose import prefill_spec, score_specs, select_spec, state_spec
from kvcompile.kernels.compete import Contest
from kvcompile.kernels.cpp_backend import prefill, scores
from kvcompile.kernels.cpp_backend.library import CppLibrary, cpp_library
from kvcompile.kernels.formulas import sources_of
from kvcompile.kernels.gather import Fresh
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import Expr, PolicyPlan, Selection, StatePlan, UnitPlan
from kvcompile.kernels.rows import Rows, as_read_by
from kvcompile.kernels.select import Means, Plainly
from kvcompile.kernels.states import Growth, growth

_LONG = 4096  # entries of a row from which one token's read is left to torch
_NORM = Expr("unary", (Expr("field", (), "k"),), "norm")


def attend_prefill(plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """As `reference.attend_prefill`; None where reading is more than attention over entries as they lie.

    One call for all rows, whatever their lengths. Measured against torch's flash attention (one thread, head_dim 64
    and 128): 0.44 of the time for many short rows, 0.7 to 0.8 for pieces of 128 tokens and more. One token alone
    reads each key once, so tiles gain nothing: 0.9 with a past of 1000, 1.1 with one of 16000, which torch is given.
    """
    facts, layer = plan.facts, int(site.layer)
    plain = not (facts.softcap or facts.sinks or facts.windows)
    if plain and q.shape[2] == 1 and int(site.length.max()) > _LONG:
        return None
    library = cpp_library(plan).find(prefill_spec)
    asked = f"torch.{plan.facts.dtype}"
    if library is None or any(str(t.dtype) != asked for t in (q, k, v, site.k)):
        return None
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    sink = site.sink[layer] if facts.sinks else None
    out = prefill.read(library, q, k, v, scale, site=site, sink=sink, cap=facts.softcap, reach=facts.reach(layer))
    for b, (new, peek, start) in enumerate(site.clock[:, :3].tolist()) if site.ring.shape[2] else ():
        reference.file_queries(site, b, q[b, :, q.shape[2] - new - peek :], new, start)
    return out


def growth_of(plan: PolicyPlan) -> Growth:
    """What a piece's queries add to states, as `states.growth`."""
    library = cpp_library(plan)

    def grown(states: tuple[StatePlan, ...], rows: Rows, fresh: Fresh) -> dict[str, Tensor]:
        found, rest = {}, []
        for state in states:
            kernel = None if state.add is None else library.find(state_spec, state)
            if kernel is None or not _as_planned(plan, rows):
                rest.append(state)
                continue
            q, qpos = fresh.q[:, :, : fresh.real], fresh.pos[: fresh.real]
            found[state.name] = _columns(kernel, q, qpos, rows)
        return found | growth(tuple(rest), rows, fresh)

    return grown


def means_of(plan: PolicyPlan, cls: int) -> Means:
    """Scores and winners of a piece, as `select.Plainly`."""
    return _Kernels(plan, cls, cpp_library(plan))


def _as_planned(plan: PolicyPlan, rows: Rows) -> bool:
    """Whether keys are what the kernels take: of the plan's dtype, read as they lie, by all queries alike."""
    plain = rows.bias is None and rows.narrow is None
    return rows.k is not None and plain and str(rows.k.dtype) == f"torch.{plan.facts.dtype}"


def _columns(kernel: scores.Library, q: Tensor, qpos: Tensor, rows: Rows) -> Tensor:
    """q [rows, group, W, D], qpos [W]: float32 [rows, n]."""
    assert rows.k is not None
    return scores.columns(
        kernel, q.flatten(0, 1)[None], rows.k[None], _places(rows)[None], qpos.int()[None], rows.scale, cap=rows.cap,
        sink=None if rows.sink is None else rows.sink.flatten(), reach=rows.reach,
    )[0]  # fmt: skip


def _places(rows: Rows) -> Tensor:
    """Positions of what may be read, resident or peeked, int32 [rows, n]; -1 marks a column that holds neither."""
    return rows.pos.masked_fill(~rows.readable, -1).int()


@dataclass(frozen=True)
class _Kernels(Plainly):
    """Scores and winners by kernel; what has no C++ form, and units, by the definition."""

    plan: PolicyPlan
    cls: int
    library: CppLibrary

    def score(self, term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor:  # type: ignore[override]
        stages = self._stages(term) if unit is None and _as_planned(self.plan, rows) else None
        if stages is None:
            return super().score(term, rows, candidates, unit)
        value = torch.empty(0)
        for template, kernel in stages:
            if template == "columns":
                # One source at most, or the score would have no form; of sequences that are equally far.
                (source,) = sources_of([term.score])
                queries = (rows.queries or {})[source]
                value = _columns(kernel, queries.q, queries.pos[0], as_read_by(rows, source))
            elif template == "keys":
                assert rows.k is not None
                value = scores.keys(kernel, rows.k[None], _places(rows)[None])[0]
            else:
                value = scores.pool(kernel, value, _places(rows), candidates)
        return value

    def _stages(self, term: Selection) -> list[tuple[str, scores.Library]] | None:
        """(template, kernel) of each stage of a score; None where one is missing, or the score is a state.

        A bare norm of float32 keys is one pass over memory in torch, and took it a quarter of the kernel's time.
        """
        found = self.library.stages(score_specs, term)
        if not found or any(kernel is None for _, kernel in found):
            return None
        if self.plan.facts.dtype == "float32" and any(hole == _NORM for spec, _ in found for _, hole in spec.holes):
            return None
        return [(spec.template, kernel) for spec, kernel in found if kernel is not None]

    def choose(  # type: ignore[override]
        self, term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor, versus: Contest | None
    ) -> Tensor:
        ((spec, kernel),) = self.library.stages(select_spec, self.cls, term) or ((None, None),)
        if spec is None or kernel is None or values.ndim > 2:
            return super().choose(term, rows, values, candidates, n, versus)
        count = len(rows.pos) // rows.sequences  # rows of a sequence, which decide together where any do
        alone, width = term.scope == "head", spec.number("heads")
        n = n.clamp(max=values.numel())  # more than there are is all of them
        if term.scope == "across" and term.fraction is None:
            if bool((n % count).any()):  # what heads were told to keep of their newest differs
                return super().choose(term, rows, values, candidates, n, versus)
            n = n // count  # the kernel takes the number per head
        heads = torch.arange(len(rows.pos), dtype=torch.int32).view(-1, 1 if alone else count)
        if heads.shape[1] > width:
            return super().choose(term, rows, values, candidates, n, versus)
        heads = torch.nn.functional.pad(heads, (0, width - heads.shape[1]), value=-1)
        return scores.select(kernel, values.float(), candidates, rows.pos.int(), n.long(), heads)
