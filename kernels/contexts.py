"""What each template is filled with: printed formulas, constants, signatures for offline compilation.

Takes a `KernelSpec`, gives the names that its template reads. One function per template.
"""

from __future__ import annotations

from typing import Any

from kvcompile.kernels import contexts_pieces, contexts_reads
from kvcompile.kernels.holes import Hole, init_hole, print_hole, row_hole, spell, step_hole
from kvcompile.kernels.plan import Expr
from kvcompile.kernels.printers import TORCH, TRITON, Axis, extreme_of
from kvcompile.kernels.signatures import (
    combine_units,
    counts_near,
    offline_lines,
    padded,
    programs,
    registers,
    registers_of_three,
    wide,
)
from kvcompile.kernels.spec import KernelSpec, power_of_two

Context = dict[str, Any]
LOG2E = "1.4426950408889634"
OVERRUN = "-1073741824"
SLIDES = "128"  # judge.SLIDES, which would bring torch along
VARIANTS = ("softcap", "sinks", "sliding")


def context(spec: KernelSpec) -> Context:
    """The template's names beside the facts; `formulas` are the lines of the header."""
    made = _CONTEXTS[spec.template](spec)
    base: Context = {"formulas": (), "log2e": LOG2E, "overrun": OVERRUN, "offline": offline_lines(spec)}
    return base | {"registers": registers(spec), "programs": programs(spec)} | _size(spec) | attention(spec) | made


def _size(spec: KernelSpec) -> Context:
    """`d_pad`, the side of a tile that holds all channels."""
    return {"d_pad": padded(spec.number("head_dim"))} if "head_dim" in dict(spec.facts) else {}


def attention(spec: KernelSpec) -> dict[str, bool]:
    """Which variants of attention a kernel has: `softcap`, `sinks`, `sliding`; facts that are absent mean none."""
    facts = dict(spec.facts)
    return {name: bool(facts.get(name)) for name in VARIANTS}


def expressions(spec: KernelSpec) -> dict[str, Expr]:
    """The holes of a spec that are formulas, by name."""
    return {name: hole for name, hole in spec.holes if isinstance(hole, Expr)}


def _texts(spec: KernelSpec) -> dict[str, str]:
    return {name: hole for name, hole in spec.holes if isinstance(hole, str)}


def _state_names(spec: KernelSpec) -> list[str]:
    return [name for name in str(spec.fact("state_names")).split() if name]


def _decode(spec: KernelSpec) -> Context:
    formulas, states = expressions(spec), _state_names(spec)
    inits = [init_hole(name, formulas[f"init {name}"]) for name in states]
    grown = [name for name in states if f"add {name}" in formulas]
    updates = [step_hole(name, formulas[f"add {name}"], states.index(name)) for name in grown]
    score = step_hole("score", formulas["score"]) if "score" in formulas else None
    uses = frozenset().union(*(hole.uses for hole in [*updates, *([score] if score else [])]))
    read = sorted({use.removeprefix("state_") for use in uses if use.startswith("state_")} | set(grown))
    torch_holes = [step_hole(name, formulas[f"add {name}"], states.index(name), TORCH) for name in grown]
    nears = counts_near(spec)
    narrowed = spec.template == "spans"
    lists: Context = {"spans": 0, "regions": [], "read_says": ()}
    lists = contexts_reads.spans(spec) if narrowed else lists
    return lists | {
        "work": "work" if narrowed else "old",
        "formulas": tuple(
            [(f"state {name} +", spell(formulas[f"add {name}"])) for name in grown]
            + ([("score", spell(formulas["score"]))] if score else [])
        )
        + lists["read_says"],
        "inits": inits,
        "updates": updates,
        "score": score,
        "uses": uses | ({"pos_i"} if "age" in uses else set()),
        "scores": bool(updates or score),
        "nears": nears,
        "n_all": "n_all" if nears else "n_len",
        "seen": "seen" if attention(spec)["sliding"] else "there",
        "block_u": combine_units(spec),
        "group_tile": power_of_two(spec.number("group")),
        "wide": wide(spec),
        "three": registers_of_three(spec),
        "state_loads": [(name, states.index(name)) for name in read],
        "updated": [states.index(name) for name in grown],
        # Beyond fp16's range a logit would be infinite, and what is made of it NaN.
        "kept": "tl.minimum(%s, 65504.0)" if spec.fact("logits") == "fp16" else "%s",
        "logits_dtype": {"none": "None", "fp32": "torch.float32", "fp16": "torch.float16"}[str(spec.fact("logits"))],
        "torch_updates": torch_holes,
        "torch_inits": [init_hole(name, formulas[f"init {name}"], TORCH) for name in states],
        "torch_score": step_hole("score", formulas["score"], dialect=TORCH) if score else None,
    }


_JOIN = {
    "mean": ("0.0", "joint + judged", "torch.stack(scores).mean(0)"),
    "sum": ("0.0", "joint + judged", "torch.stack(scores).sum(0)"),
    "max": ("float('-inf')", "tl.maximum(joint, judged, tl.PropagateNan.ALL)", "torch.stack(scores).amax(0)"),
    "min": ("float('inf')", "tl.minimum(joint, judged, tl.PropagateNan.ALL)", "torch.stack(scores).amin(0)"),
}


def _selection(spec: KernelSpec) -> Context:
    """Facts of a selection that evict and select share."""
    scope, join = str(spec.fact("scope")), str(spec.fact("join"))
    num, den = (int(x) for x in str(spec.fact("fraction")).split("/"))
    floor = tuple(int(x) for x in str(spec.fact("floor")).split("/"))
    start, step, torch_join = _JOIN[join]
    wanted = "0" if den else f"n{spec.fact('count')}"
    return {
        "select": None if scope == "none" else {"wanted": wanted, "fraction": (num, den), "floor": floor},
        "shared": scope == "shared",
        "join": join,
        "join_start": start,
        "join_step": step,
        "reference_join": torch_join,
        "fraction_of": lambda text: f"{text} * {num} // {max(den, 1)}",
    }


def _prefill(spec: KernelSpec) -> Context:
    size, softcap = spec.number("head_dim"), attention(spec)["softcap"]
    return {
        "group_pad": power_of_two(spec.number("group")),
        "whole_mask": ", mask=real_d, other=0.0" if padded(size) != size else "",
        "listed": dict(spec.facts).get("listed", 0),
        "reads": contexts_pieces.blocks(spec) if spec.template == "blocks" else None,
        "cap": "cap, " if softcap else "",
        "times_scale": "" if softcap else " * scale",  # softened logits have it already
    }


def _evict(spec: KernelSpec) -> Context:
    formulas, texts, states = expressions(spec), _texts(spec), _state_names(spec)
    made = _selection(spec)
    negate = spec.fact("rank") == "bottom"
    judged = row_hole(formulas["row"], negate=negate) if made["select"] else None
    torch_judged = row_hole(formulas["row"], TORCH, negate) if made["select"] else None
    regions = texts["regions"]
    used = [line.split(" ", 1) for line in texts["counts"].split("\n") if line]
    uses, sliding = judged.uses if judged else frozenset(), attention(spec)["sliding"]
    return made | {
        "formulas": tuple(
            ([("kept", regions.replace("at_now", "now"))] if regions != "(at < 0)" else [])
            + ([("dropped", "at <= now + 1 - the window of the layer")] if sliding else [])
            + ([("score", ("-" if negate else "") + spell(formulas["row"]))] if judged else [])
            + [(f"n{index}", says) for index, says in used]
        ),
        "counts": [(int(index), says) for index, says in used],
        "n_counts": max([int(index) for index, _ in used], default=-1) + 1 or 1,
        "region": regions,
        "region_uses": {"prompt"} if "at_prompt" in regions else set(),
        "judge": "\n".join(_judge(regions, judged, uses, states, sliding)),
        "nears": counts_near(spec),
        "slides": SLIDES,
        "key": "key_of(judged)" if judged else "EMPTY",
        "reference_judge": "\n".join(_torch_judge(torch_judged, states)) if torch_judged else "",
        "reference_region": regions,
        "reference_wanted": f"[{made['select']['wanted']}] * len(rows)"
        if made["select"] and not made["select"]["fraction"][1]
        else "None",
        "aligned": made["shared"],
    }


def _judge(regions: str, judged: Hole | None, uses: frozenset[str], states: list[str], sliding: bool) -> list[str]:
    lines = [
        "page = tl.load(table + row.to(tl.int64) * table_row + i // PAGE, mask=there, other=0)",
        "slot = page.to(tl.int64) * PAGE + i % PAGE",
        "at = tl.load(pos + slot, mask=there, other=0)",
    ]
    if "was_frozen" in regions:
        lines.append("was_frozen = tl.load(frozen + slot, mask=there, other=0) != 0")
    if judged is None:
        return lines
    if uses & {"pos_i", "age"}:
        lines.append("pos_i = at.to(tl.float32)")
    if "age" in uses:
        lines.append("age = at_now.to(tl.float32) - pos_i")
    if "now_b_value" in uses:
        lines.append("now_b_value = at_now.to(tl.float32)")
    if "n_len" in uses:
        n_len = "tl.load(length + row)"
        if sliding:
            n_len = f"count_near(pos, table + row.to(tl.int64) * table_row, {n_len}, far, PAGE, BLOCK)"
        lines.append(f"n_len = {n_len}.to(tl.float32)")
    if "score_i" in uses:
        lines.append("score_i = tl.load(score + row.to(tl.int64) * score_row + i, mask=there, other=0.0)")
    for index, name in enumerate(states):
        if f"state_{name}" in uses:
            at = f"state + {index} * slots.to(tl.int64) + slot"
            lines.append(f"state_{name} = tl.load({at}, mask=there, other=0.0)")
    return [*lines, *judged.lines, f"judged = {judged.result}"]


def _torch_judge(judged: Hole, states: list[str]) -> list[str]:
    lines = ["score_i = score[row, : len(at)]"] if "score_i" in judged.uses else []
    for index, name in enumerate(states):
        if f"state_{name}" in judged.uses:
            lines.append(f'state_{name} = pools["state"][{index}, slot]')
    return [*lines, *judged.lines, f"judged = {judged.result}"]


def _select(spec: KernelSpec) -> Context:
    return _selection(spec) | {"formulas": (("winners", _rule(spec)),)}


def _rule(spec: KernelSpec) -> str:
    heads = {"head": "each head alone", "shared": "heads decide once, by their joint score"}
    floor = str(spec.fact("floor"))
    scope = heads.get(str(spec.fact("scope")), f"heads compete for n times the heads, {floor} of n theirs first")
    return f"{spec.fact('rank')} by score, {scope}; ties to the older position, then the lower head"


def _pack(spec: KernelSpec) -> Context:
    return {}


_FOLD = {
    "sum": ("0.0", "{acc} + {x}"),
    "mean": ("0.0", "{acc} + {x}"),
    "max": ("float('-inf')", "tl.maximum({acc}, {x}, tl.PropagateNan.ALL)"),
    "min": ("float('inf')", "tl.minimum({acc}, {x}, tl.PropagateNan.ALL)"),
}


def _columns(spec: KernelSpec) -> Context:
    formulas = expressions(spec)
    q_fn, g_fn = str(spec.fact("over_q")), str(spec.fact("over_g"))
    reach = {("evidence", "attn"): "p", ("evidence", "logit"): "logit", ("field", "pos"): "pos_i"}
    pre = print_hole("pre", formulas["pre"], reach, layout="iq", leaf_axes={"p": "iq", "logit": "iq"})
    below = {("tile", "q"): "over_q", ("field", "pos"): "pos_i"}
    mid = print_hole("mid", formulas["mid"], below, layout="i")
    post = print_hole("post", formulas["post"], {("tile", "g"): "over_g", ("field", "pos"): "pos_i"}, layout="i")
    axes = {"q": Axis("s.shape[1]"), "g": Axis("GROUP")}
    table = {"p": "iqg", "logit": "iqg"}
    whole = print_hole("t", formulas["whole"], reach, layout="iqg", axes=axes, leaf_axes=table, dialect=TORCH)
    return {
        "formulas": (("score", spell(formulas["whole"])),),
        "pre": pre,
        "mid": mid,
        "post": post,
        "whole": whole,
        "uses": pre.uses | mid.uses | post.uses,
        # A query that sees nothing of a block adds attn 0 to a sum: it may be passed over.
        "skips": formulas["pre"].op == "evidence" and "p" in pre.uses and q_fn in ("sum", "mean"),
        "q_start": _FOLD[q_fn][0],
        "g_start": _FOLD[g_fn][0],
        "q_step": _fold_tile(q_fn, formulas["pre"]),
        "g_step": _FOLD[g_fn][1].format(acc="over_g", x="y"),
        "q_mean": q_fn == "mean",
        "g_mean": g_fn == "mean",
    }


def _fold_tile(fn: str, pre: Expr) -> str:
    word = extreme_of("sum" if fn == "mean" else fn, pre)
    return _FOLD[fn][1].format(acc="over_q", x=TRITON.reduce[word].format("x", axis=1))


def _keys(spec: KernelSpec) -> Context:
    formula = expressions(spec)["formula"]
    reach = {("field", "k"): "kt", ("field", "pos"): "pos_i"}
    size = spec.number("head_dim")
    tile = Axis("D", "real" if padded(size) > size else None)  # channels that pad a tile enter no reduction
    hole, whole = (
        print_hole("t", formula, reach, layout="id", axes={"d": axis}, leaf_axes={"kt": "id"}, dialect=dialect)
        for dialect, axis in ((TRITON, tile), (TORCH, Axis("HEAD_DIM")))
    )
    return {"formulas": (("score", spell(formula)),), "hole": hole, "whole": whole, "uses": hole.uses}


def _pool(spec: KernelSpec) -> Context:
    formulas, kind = expressions(spec), str(spec.fact("kind"))
    near = {("tile", "0"): "near_score", ("field", "pos"): "near_pos"}
    own = {("tile", "0"): "score_i", ("tile", "pooled"): "pooled", ("field", "pos"): "pos_i"}
    made: Context = {"formulas": (("score", spell(formulas["whole"])),), "inner": None, "average": kind == "avg"}
    for prefix, dialect in (("", TRITON), ("torch_", TORCH)):
        if "inner" in formulas:
            made[f"{prefix}inner"] = print_hole("near", formulas["inner"], near, layout="i", dialect=dialect)
        made[f"{prefix}outer"] = print_hole("t", formulas["outer"], own, layout="i", dialect=dialect)
    made["uses"] = made["outer"].uses
    if made["inner"]:
        start, step = ("float('-inf')", "tl.maximum(pooled, {})") if kind == "max" else ("0.0", "pooled + {}")
        absent = "tl.where(near, {}, " + start + ")"
        text = step.format(absent.format(made["inner"].result))
        made["step"] = text[:-1] + ", tl.PropagateNan.ALL)" if kind == "max" else text
        made["start"] = start
        made["torch_step"] = "torch.stack(values).amax()" if kind == "max" else "torch.stack(values).sum() / WIDTH"
    return made


_CONTEXTS = {
    "decode": _decode,
    "prefill": _prefill,
    "evict": _evict,
    "select": _select,
    "pack": _pack,
    "columns": _columns,
    "keys": _keys,
    "pool": _pool,
    "marks": contexts_reads.marks,
    "units": contexts_reads.units,
    "spans": _decode,
    "chosen": contexts_pieces.chosen,
    "blocks": _prefill,
}
