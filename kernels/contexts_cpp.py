"""What each C++ template is filled with: printed formulas and constants. The counterpart of `contexts` for the CPU.

Takes a `KernelSpec`, gives the names that its template reads. One function per template.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kvcompile.kernels import contexts, contexts_cpp_reads
from kvcompile.kernels.contexts import LOG2E, SLIDES, Context, attention, expressions
from kvcompile.kernels.holes import init_hole, print_hole, row_hole, spell, step_hole
from kvcompile.kernels.plan import Expr
from kvcompile.kernels.printers import Axis
from kvcompile.kernels.printers_cpp import CPP
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.stages import Unprintable


def context(spec: KernelSpec) -> Context:
    """The template's names beside the facts; `formulas` are the lines of the header.

    Raises:
        Unprintable: the template or a formula has no C++ form.
    """
    if spec.template not in _CONTEXTS:
        raise Unprintable(f"{spec.template} has no C++ form")
    return {"formulas": (), **_CONTEXTS[spec.template](spec)}


def _decode(spec: KernelSpec) -> Context:
    formulas = expressions(spec)
    states = str(spec.fact("state_names")).split()
    inits = [init_hole(name, formulas[f"init {name}"], CPP) for name in states]
    grown = [name for name in states if f"add {name}" in formulas]
    updates = [step_hole(name, formulas[f"add {name}"], states.index(name), CPP) for name in grown]
    score = step_hole("score", formulas["score"], dialect=CPP) if "score" in formulas else None
    uses = frozenset[str]().union(*(hole.uses for hole in [*updates, *([score] if score else [])]))
    read = sorted({use.removeprefix("state_") for use in uses if use.startswith("state_")} | set(grown))
    return {
        "formulas": tuple((f"state {hole.name} +", hole.says) for hole in updates)
        + ((("score", score.says),) if score else ()),
        "log2e": LOG2E,
        "inits": inits,
        "updates": updates,
        "score": score,
        "scores": bool(updates or score),
        "uses": uses | ({"pos_i", "now_b_value"} if "age" in uses else set()),
        "state_loads": [(name, states.index(name)) for name in read],
        **attention(spec),
    }


_JOIN = {
    "mean": ("0.0f", "joint + judged"),
    "sum": ("0.0f", "joint + judged"),
    "max": ("-INFINITY", "max_of(joint, judged)"),
    "min": ("INFINITY", "min_of(joint, judged)"),
}


def _selection(spec: KernelSpec) -> Context:
    """Facts of a selection that evict and select share."""
    scope, join = str(spec.fact("scope")), str(spec.fact("join"))
    fraction, floor = ([int(x) for x in str(spec.fact(name)).split("/")] for name in ("fraction", "floor"))
    return {
        "select": None if scope == "none" else {"fraction": fraction, "floor": floor},
        "wanted": "0" if fraction[1] else f"is.n{spec.fact('count')}",
        "shared": scope == "shared",
        "join": join,
        "join_start": _JOIN[join][0],
        "join_step": _JOIN[join][1],
    }


def _evict(spec: KernelSpec) -> Context:
    holes, chosen = dict(spec.holes), _selection(spec)
    bottom, sliding = spec.fact("rank") == "bottom", attention(spec)["sliding"]
    row, regions = holes.get("row"), str(holes["regions"])
    judged = row_hole(row, CPP, bottom) if isinstance(row, Expr) and chosen["select"] else None
    uses = judged.uses if judged else frozenset[str]()
    counts = [line.split(" ", 1) for line in str(holes["counts"]).split("\n") if line]
    states = str(spec.fact("state_names")).split()
    return {
        "formulas": ((("kept", regions.replace("at_now", "now")),) if regions != "(at < 0)" else ())
        + ((("score", ("-" if bottom else "") + judged.says),) if judged else ())
        + tuple((f"n{index}", says) for index, says in counts)
        + ((("dropped", "at <= now + 1 - the window of the layer"),) if sliding else ()),
        "counts": [(int(index), says) for index, says in counts],
        "region": re.sub(r"at % (n\d+) == 0", r"multiples(at, \1)", regions.replace("//", "/")),
        "judged": judged,
        "sliding": sliding,
        "slides": SLIDES,
        "uses": uses | ({"pos_i", "now_b_value"} if "age" in uses else set()),
        "state_loads": [(name, index) for index, name in enumerate(states) if f"state_{name}" in uses],
        **chosen,
    }


def _prefill(spec: KernelSpec) -> Context:
    if dict(spec.facts).get("listed"):
        raise Unprintable("block lists have no C++ form")
    return {"log2e": LOG2E, **attention(spec)}


_FOLD = {
    "sum": ("0.0f", "{0} + {1}"),
    "mean": ("0.0f", "{0} + {1}"),
    "max": ("-INFINITY", "max_of({0}, {1})"),
    "min": ("INFINITY", "min_of({0}, {1})"),
}
_POS = {("field", "pos"): "pos_i"}


def _columns(spec: KernelSpec) -> Context:
    formulas = expressions(spec)
    q_fn, g_fn = str(spec.fact("over_q")), str(spec.fact("over_g"))
    evidence = {("evidence", "attn"): "p", ("evidence", "logit"): "logit"}
    pre = print_hole("pre", formulas["pre"], evidence | _POS, layout="i", dialect=CPP)
    mid = print_hole("mid", formulas["mid"], {("tile", "q"): "over_q"} | _POS, layout="i", dialect=CPP)
    post = print_hole("post", formulas["post"], {("tile", "g"): "over_g"} | _POS, layout="i", dialect=CPP)
    return {
        "formulas": (("score", spell(formulas["whole"])),),
        "log2e": LOG2E,
        "pre": pre,
        "mid": mid,
        "post": post,
        "uses": pre.uses | mid.uses | post.uses,
        # A query that sees nothing of a block adds attn 0 to a sum: it may be passed over.
        "skips": formulas["pre"].op == "evidence" and "p" in pre.uses and q_fn in ("sum", "mean"),
        "q_start": _FOLD[q_fn][0],
        "g_start": _FOLD[g_fn][0],
        "q_step": _FOLD[q_fn][1].format("over_q", pre.result),
        "g_step": _FOLD[g_fn][1].format("over_g", mid.result),
        "q_mean": q_fn == "mean",
        "g_mean": g_fn == "mean",
        **attention(spec),
    }


def _keys(spec: KernelSpec) -> Context:
    formula = expressions(spec)["formula"]
    reach = {("field", "k"): "kt"} | _POS
    axes, leaves = {"d": Axis("D")}, {"kt": "id"}
    hole = print_hole("t", formula, reach, layout="id", axes=axes, leaf_axes=leaves, dialect=CPP)
    return {"formulas": (("score", spell(formula)),), "log2e": LOG2E, "hole": hole, "uses": hole.uses}


def _pool(spec: KernelSpec) -> Context:
    formulas, average = expressions(spec), spec.fact("kind") == "avg"
    near = {("tile", "0"): "near_score", ("field", "pos"): "near_pos"}
    own = {("tile", "0"): "score_i", ("tile", "pooled"): "pooled"} | _POS
    outer = print_hole("t", formulas["outer"], own, layout="i", dialect=CPP)
    inner = print_hole("near", formulas["inner"], near, layout="i", dialect=CPP) if "inner" in formulas else None
    start, step = _FOLD["sum" if average else "max"]
    return {
        "formulas": (("score", spell(formulas["whole"])),),
        "inner": inner,
        "outer": outer,
        "uses": outer.uses,
        "average": average,
        "start": start,
        "step": step.format("pooled", "load(&near[c + o])"),
    }


def _select(spec: KernelSpec) -> Context:
    return {"formulas": contexts.context(spec)["formulas"], **_selection(spec)}


FEW = 4  # rows up to which lines that are read once were faster than torch's product in every dtype tried


def _project(spec: KernelSpec) -> Context:
    return {"few": FEW}


_CONTEXTS: dict[str, Callable[[KernelSpec], Context]] = {
    "decode": _decode,
    "evict": _evict,
    "prefill": _prefill,
    "columns": _columns,
    "keys": _keys,
    "pool": _pool,
    "select": _select,
    "marks": contexts_cpp_reads.marks,
    "units": contexts_cpp_reads.units,
    "entries": contexts_cpp_reads.entries,
    "spans": contexts_cpp_reads.spans,
    "blocks": contexts_cpp_reads.blocks,
    "project": _project,
}
