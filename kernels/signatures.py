"""Argument types of the generated kernels, written into each file for compiling without a GPU.

Takes a `KernelSpec`, gives (kernel, {type: arguments}, {constant: value}, options) per kernel of its file,
types as Triton spells them: `*bf16` a pointer, `i32` a number. The names follow the templates' parameters.
"""

from __future__ import annotations

from kvcompile.kernels.plan import Expr
from kvcompile.kernels.spec import KernelSpec, dtype_name, power_of_two

Entry = tuple[str, dict[str, str], dict[str, object], dict[str, int]]


def _types(text: str, dtype: str = "fp32") -> dict[str, str]:
    """`*T: q k; i32: rows` as a table; T is the model's dtype."""
    table: dict[str, str] = {}
    for group in text.split(";"):
        kind, names = (part.strip() for part in group.split(":"))
        kind = kind.replace("T", dtype)
        table[kind] = f"{table[kind]} {names}" if kind in table else names
    return table


def offline(spec: KernelSpec) -> tuple[Entry, ...]:
    """One entry per kernel of the spec's file."""
    return _TABLES[spec.template](spec)


def registers(spec: KernelSpec) -> int:
    """The most registers of a thread that leave room for one program, or as many as `programs` says.

    Left to itself, the assembler spills a few bytes wherever that lets one more program onto a multiprocessor.
    """
    return min(255, 65536 // (32 * programs(spec) * spec.number("warps")) // 8 * 8)


def programs(spec: KernelSpec) -> int:
    """How many programs a multiprocessor has to have room for.

    Where queries of a piece choose it is eight warps: one program multiplies or waits while another one counts. With
    more of them, and so less than 255 registers, a thread cannot keep 64 scores and what belongs to them.
    """
    return max(1, 8 // spec.number("warps")) if spec.template == "chosen" else 1


def registers_of_three(spec: KernelSpec) -> int:
    """The most registers of a thread that leave room for three programs of a decode on Hopper; 0: no limit.

    Three are launched for each multiprocessor. Left to itself, the assembler takes 150 to 220, by how many rows there
    are, and mostly two fit. With more in each step, or other numbers of warps, a limit would spill. On Blackwell it
    would, too, but where entries come by lists, whose tiles are half as large: without one a few bytes spill there.
    """
    facts = dict(spec.facts)
    more = spec.template not in ("decode", "spans") or facts.get("softcap") or facts.get("sliding") or wide(spec)
    return 0 if more or spec.number("warps") != 4 else 65536 // (32 * 3 * 4) // 8 * 8


def wide(spec: KernelSpec) -> bool:
    """Whether tiles of decode take so many registers that a limit keeps no program off a multiprocessor."""
    return spec.fact("dtype") == "float32" or spec.number("head_dim") > 128


def _options(spec: KernelSpec) -> dict[str, int]:
    return {"num_warps": spec.number("warps"), "num_stages": 3, "maxnreg": registers(spec)}


COMBINE = {"num_warps": 4, "num_stages": 3, "maxnreg": 128}
_EXTRA = {
    "cap": ("softcap", "fp32"),
    "sink": ("sinks", "*fp32"),
    "reach": ("sliding", "i32"),
    "reaches": ("sliding", "*i32"),  # one for each layer
}


def _extra(spec: KernelSpec, *names: str) -> str:
    """Types of the arguments that a variant of attention adds, where the spec has it."""
    facts = dict(spec.facts)
    return "".join(f"; {_EXTRA[name][1]}: {name}" for name in names if facts.get(_EXTRA[name][0]))


def counts_near(spec: KernelSpec) -> bool:
    """Whether a formula reads `len` where a sliding window decides which entries count."""
    formulas = [hole for _, hole in spec.holes if isinstance(hole, Expr)]
    reads = any(n.op == "scalar" and n.value == "len" for hole in formulas for n in hole.walk())
    return reads and bool(dict(spec.facts).get("sliding"))


def padded(size: int) -> int:
    """Side of a tile that holds so many channels: a power of two, and no less than what a matrix instruction takes."""
    return max(16, power_of_two(size))


def combine_units(spec: KernelSpec) -> int:
    """Partial outputs that the second launch of decode adds at a time: 32 float32 a thread, or registers spill."""
    return min(32, 4096 // padded(spec.number("head_dim")))


def _decode(spec: KernelSpec) -> tuple[Entry, ...]:
    dtype = dtype_name(str(spec.fact("dtype")))
    logits = "fp16" if spec.fact("logits") == "fp16" else "fp32"
    shape: dict[str, object] = {
        "ROWS_PAD": 16,
        "GROUP": spec.fact("group"),
        "GROUP_PAD": spec.fact("group_pad"),
        "D": spec.fact("head_dim"),
        "D_PAD": padded(spec.number("head_dim")),
        "PAGE": spec.fact("page"),
    }
    pool = "*i32: pos table length free top plan; *u8: frozen; *fp32: state part_acc part_max part_sum"
    first = _types(
        f"*T: q k_new v_new k v; {pool}; *i64: now active layer; *{logits}: logits; fp32: scale; "
        "i32: q_b q_h k_b k_h v_b v_h now_b active_b table_row slots capacity rows kv_heads target min_chunk"
        + _extra(spec, "cap", "reaches"),
        dtype,
    )
    second = _types(
        "*fp32: part_acc part_max part_sum lse state score; *i32: plan pos table length top; "
        f"*{logits}: logits; *T: out; *i64: layer now; "
        "i32: out_b out_h lse_b table_row slots capacity score_row rows kv_heads now_b"
        + _extra(spec, "sink", *["reaches"] * counts_near(spec)),
        dtype,
    )
    options = {"num_warps": spec.number("warps"), "num_stages": spec.number("stages")}
    options["maxnreg" if wide(spec) else "maxnreg_of_mma"] = registers(spec)
    if three := registers_of_three(spec):
        options |= {"maxnreg_of_wgmma": three} | ({"maxnreg_of_tcgen05": three} if spec.template == "spans" else {})
    keeps = spec.fact("logits") != "none"
    combine = {"GROUP_TILE": power_of_two(spec.number("group")), "BLOCK_S": 128, "BLOCK_U": combine_units(spec)}
    return (
        ("decode_kernel", first, shape | {"BLOCK_N": spec.fact("block_n"), "KEEP_LOGITS": keeps}, options),
        ("combine_kernel", second, shape | combine, COMBINE),
    )


def _spans(spec: KernelSpec) -> tuple[Entry, ...]:
    """Decode with the lists that its heads read by."""
    (name, types, constants, options), *rest = _decode(spec)
    regions = [str(hole) for key, hole in spec.holes if key.startswith("regions ")]
    more = "*i32: reading spans span_count; i32: span_row"
    if any(text != "(at < 0)" for text in regions):
        more += "; *i64: prompt counts; i32: counts_l counts_n counts_b prompt_b"
    for kind, names in _types(more).items():
        types[kind] = f"{types[kind]} {names}"
    return ((name, types, constants | {"SPAN": spec.fact("span")}, options), *rest)


def _prefill(spec: KernelSpec) -> tuple[Entry, ...]:
    listed = dict(spec.facts).get("listed")
    types = _types(
        "*T: q k_new v_new k v out; *i64: new peek start layer; *i32: pos table length first window; *fp32: lse; "
        "i32: q_b q_h q_n k_b k_h k_n v_b v_h v_n out_b out_n clock_b table_row columns rows kv_heads; fp32: scale"
        + ("; *i32: lists counts; i32: most list_blocks" if listed else "")
        + _extra(spec, "cap", "sink", "reaches"),
        dtype_name(str(spec.fact("dtype"))),
    )
    constants: dict[str, object] = {
        "ROWS_PAD": 16,
        "GROUP": spec.fact("group"),
        "PACK": 1,
        "D": spec.fact("head_dim"),
        "D_PAD": padded(spec.number("head_dim")),
        "PAGE": spec.fact("page"),
        "BLOCK_M": spec.fact("block_m"),
        "BLOCK_N": spec.fact("block_n"),
        "LOCAL": True,
        "LSE": True,
    }
    options = {"num_warps": spec.number("warps"), "num_stages": spec.number("stages")}
    constants |= {"LISTED": listed} if listed else {}
    return (("prefill_kernel", types, constants, options),)


def _blocks(spec: KernelSpec) -> tuple[Entry, ...]:
    """Attention of a piece with the lists that its queries read by."""
    ((name, types, constants, options),) = _prefill(spec)
    more = "*i32: by lists totals bits; *i64: order prompt numbers; "
    more += "i32: begins_at stretch blocks_q most words prompt_b numbers_l numbers_n numbers_b"
    for kind, names in _types(more).items():
        types[kind] = f"{types[kind]} {names}"
    listed: dict[str, object] = {"TILE": spec.fact("tile"), "LISTS": spec.fact("sets"), "LOCAL": False}
    listed |= {"SIZE": spec.fact("size"), "SETS": spec.fact("sets")}
    return ((name, types, constants | listed, options),)


def _evict(spec: KernelSpec) -> tuple[Entry, ...]:
    types = _types(
        "*T: k v; *i32: pos table length free top sites scratch; *u8: frozen fires; *fp32: state score; "
        "*i64: counts now prompt; i32: counts_l counts_n counts_b fires_b now_b prompt_b table_row slots score_row "
        "capacity batch kv_heads" + _extra(spec, "reaches"),
        dtype_name(str(spec.fact("dtype"))),
    )
    constants: dict[str, object] = {
        "HEADS": spec.fact("heads"),
        "D": spec.fact("head_dim"),
        "D_PAD": padded(spec.number("head_dim")),
        "PAGE": spec.fact("page"),
        "STATES": spec.fact("states"),
        "BLOCK": 2048,
        "BLOCK_M": 32,
    }
    return (("evict_kernel", types, constants, _options(spec)),)


def _select(spec: KernelSpec) -> tuple[Entry, ...]:
    types = _types("*fp32: scores; *u8: candidates keep; *i32: pos heads keys; *i64: wanted; i32: all_heads n groups")
    constants: dict[str, object] = {"HEADS": spec.fact("heads"), "BLOCK": 4096}
    return (("select_kernel", types, constants, _options(spec)),)


def _pack(spec: KernelSpec) -> tuple[Entry, ...]:
    options = _options(spec)
    page = spec.fact("page")
    first = _types("*u8: keep; *i32: before length table free top; *i64: layer; i32: rows n tiles table_row")
    second = _types(
        "*T: k_in v_in k v; *i32: pos_in before pos table; *u8: frozen_in keep frozen; *fp32: state_in state; "
        "*i64: layer; i32: k_b k_h k_n v_b v_h v_n state_s slots table_row rows kv_heads n tiles",
        dtype_name(str(spec.fact("dtype"))),
    )
    constants: dict[str, object] = {
        "D": spec.fact("head_dim"),
        "D_PAD": padded(spec.number("head_dim")),
        "PAGE": page,
        "STATES": spec.fact("states"),
        "TILE": 1024,
        "BLOCK": 32,
    }
    return (
        ("reserve_kernel", first, {"PAGE": page, "TILE": 1024}, options),
        ("pack_kernel", second, constants, options),
    )


def _columns(spec: KernelSpec) -> tuple[Entry, ...]:
    dtype = dtype_name(str(spec.fact("dtype")))
    first = _types(
        "*T: q k; *i32: pos qpos; *fp32: lse; fp32: scale; i32: q_b q_h q_n k_b k_h k_n n n_q heads stretch"
        + _extra(spec, "cap", "sink", "reach"),
        dtype,
    )
    second = _types(
        "*T: q k; *i32: pos qpos; *fp32: lse out; fp32: scale lse_scale; "
        "i32: q_b q_h q_n k_b k_h k_n n n_q kv_heads splits" + _extra(spec, "cap", "reach"),
        dtype,
    )
    constants: dict[str, object] = {
        "GROUP": spec.fact("group"),
        "D": spec.fact("head_dim"),
        "D_PAD": padded(spec.number("head_dim")),
        "BLOCK_N": spec.fact("block_n"),
        "BLOCK_Q": spec.fact("block_q"),
    }
    options = _options(spec)
    both = (("lse_kernel", first, constants, options), ("columns_kernel", second, constants, options))
    return both if spec.fact("window") else both[1:]


def _keys(spec: KernelSpec) -> tuple[Entry, ...]:
    dtype = dtype_name(str(spec.fact("dtype")))
    types = _types("*T: k; *i32: pos; *fp32: out; i32: k_b k_h k_n n kv_heads", dtype)
    size = spec.number("head_dim")
    constants: dict[str, object] = {"D": size, "D_PAD": padded(size), "BLOCK": spec.fact("block_n")}
    return (("keys_kernel", types, constants, {"num_warps": spec.number("warps"), "num_stages": 3}),)


def _pool(spec: KernelSpec) -> tuple[Entry, ...]:
    types = _types("*fp32: score out; *i32: pos order count; i32: n")
    constants: dict[str, object] = {"WIDTH": spec.fact("width"), "BLOCK": 512}
    return (("pool_kernel", types, constants, {"num_warps": spec.number("warps"), "num_stages": 3}),)


def _marks(spec: KernelSpec) -> tuple[Entry, ...]:
    dtype = dtype_name(str(spec.fact("dtype")))
    kept = dtype if spec.fact("own") else "fp32"
    first = _types(
        f"*T: k k_new; *{kept}: marks; *i32: pos table length readers edges marked; *i64: layer new peek start; "
        "i32: k_b k_h k_n clock_b table_row blocks columns rows kv_heads",
        dtype,
    )
    second = _types("*i64: layer new start; *i32: readers marked; i32: clock_b rows kv_heads")
    kinds = [part.split(":") for part in str(spec.fact("kinds")).split()]
    shape: dict[str, object] = {
        "WIDTH": spec.fact("width"),
        "EDGES": spec.fact("edges"),
        "KINDS": len(kinds),
        "D": spec.fact("head_dim"),
        "D_PAD": padded(spec.number("head_dim")),
        "PAGE": spec.fact("page"),
        "BLOCK": spec.fact("block_n"),
        "PIECE": True,
    }
    found: list[Entry] = []
    for i, (name, size, stride, _, each, begin, edge, channels) in enumerate(kinds):
        numbers = {"SIZE": size, "STRIDE": stride, "EACH": each, "FIRST": begin, "EDGE": edge, "CHANNELS": channels}
        own: dict[str, object] = {**shape, **{key: int(value) for key, value in numbers.items()}, "KIND": i}
        if int(channels) or spec.fact("edges"):
            found.append((f"{name}_kernel", first, own, _options(spec)))
    seal: dict[str, object] = {"KINDS": len(kinds), "PIECE": True, "ROWS": 128}
    return (*found, ("seal_kernel", second, seal, {"num_warps": 1, "num_stages": 3}))


def _units(spec: KernelSpec) -> tuple[Entry, ...]:
    """As `launch` of the template passes them; the two kernels of a rule that chooses take more."""
    from kvcompile.kernels import contexts_reads  # which reads this module

    score = dict(spec.holes).get("score") is not None
    kept = dtype_name(str(spec.fact("dtype"))) if score and spec.fact("own") else "fp32"
    clock = "*i64: now active counts layer; *i32: length reading; *u8: flags; "
    sizes = "i32: clock_b counts_l counts_n counts_b units rows kv_heads read"
    first = clock + f"*T: q; *i64: prompt; *i32: pos table; {sizes} q_b q_h table_row"
    second = clock + f"*i32: spans total; {sizes}"
    if score:
        first += f" blocks score_units; *i32: readers edges; *{kept}: marks; *fp32: scores"
        second += " blocks score_units; *i32: readers edges keys; *fp32: scores wholes"
    dtype, group = dtype_name(str(spec.fact("dtype"))), spec.number("group")
    made = contexts_reads.units(spec)
    size = int(made["u_size"])
    heads: dict[str, object] = {"GROUP": group, "GROUP_PAD": power_of_two(group)}
    kinds: dict[str, object] = {}
    own: dict[str, object] = {}
    if score:
        names = {"MARK_SIZE": "inner_size", "MARK_STRIDE": "inner_stride", "MARK_EACH": "inner_each"}
        names |= {"UNIT_EACH": "each", "UNIT_EDGE": "edge", "EDGES": "edges"}
        kinds = heads | {key: spec.fact(name) for key, name in names.items()} | {"EACH": made["each_heads"]}
        own = {"CHANNELS": spec.fact("inner_channels"), "WIDTH": spec.fact("width"), "FIRST": spec.fact("inner_first")}
    width = spec.number("head_dim")
    tile: dict[str, object] = {
        "D": width,
        "D_PAD": padded(width),
        "PAGE": spec.fact("page"),
        "SIZE": size,
        "BLOCK_U": spec.fact("block_n"),
    }
    tile |= {"BLOCK_X": min(32, power_of_two(size))}
    lines: dict[str, object] = (
        {"MARK_EDGE": spec.fact("inner_edge"), "WHOLE": made["whole_lines"], "LINES": made["lines"]}
        | {"KEPT": made["kept"]}
        if score
        else {}
    )
    block: dict[str, object] = {"SIZE": size, "BLOCK": 1024 if power_of_two(group) <= 8 else 256}
    chosen = ("choose_kernel", _types(second, dtype), kinds | lines | block, _options(spec))
    if not score and not made["flagged"]:
        return (chosen,)
    return (("units_kernel", _types(first, dtype), (kinds or heads) | own | tile, _options(spec)), chosen)


def _chosen(spec: KernelSpec) -> tuple[Entry, ...]:
    """The second kernel alone lists tiles for a rule that chooses nothing."""
    from kvcompile.kernels import contexts_pieces  # which reads this module

    made, score = contexts_pieces.chosen(spec), dict(spec.holes).get("score") is not None
    clock = "*i64: new start prompt counts layer; *i32: length by"
    sizes = "i32: clock_b counts_l counts_n counts_b columns rows kv_heads read"
    second = f"{clock} pos table lists totals; {sizes} table_row blocks_q begins_at opens most"
    shape: dict[str, object] = {"PAGE": spec.fact("page"), "TILE": spec.fact("tile"), "QUERIES": 128}
    shape |= {"LISTS": made["heads"] if score else 1, "BLOCK_T": 16 if spec.fact("drops") else 128}
    options = _options(spec) | {"num_warps": 4}
    if not score:
        return (("tiles_kernel", _types(second), shape, options),)
    sets = spec.number("group") if made["heads"] > 1 else 1
    own = {"SIZE": spec.fact("size"), "SETS": sets, "BLOCK_Q": made["block_q"]}
    shape |= own | {"LISTS": sets}
    last = ("tiles_kernel", _types(second.replace(" lists", " anys lists") + " chunks words"), shape, options)
    dtype = dtype_name(str(spec.fact("dtype")))
    kept, width = dtype if spec.fact("own") else "fp32", spec.number("head_dim")
    first = f"*T: q; *{kept}: marks; *i64: peek; *i32: readers keys bits anys; *fp32: scores wholes; {clock}; {sizes}"
    first += " q_b q_h q_n stretch begins_at chunks blocks score_units units words"
    types = _types(f"{first}; *T: split; *fp32: scales" if made["n_split"] else first, dtype)
    constants: dict[str, object] = {"GROUP": spec.fact("group"), "GROUP_PAD": made["group_pad"], "D": width}
    constants |= own | {"D_PAD": padded(width), "BLOCK_U": spec.fact("block_n")}
    constants |= {"BLOCK": max(16, made["block_s"] // made["block_q"]), "KEPT": made["kept"]}
    constants |= {"LONGEST": 2048, "ONCE": True}
    names = {"MARK_SIZE": "inner_size", "MARK_STRIDE": "inner_stride", "MARK_EACH": "inner_each", "WIDTH": "width"}
    names |= {"CHANNELS": "inner_channels", "FIRST": "inner_first"}
    constants |= {key: spec.fact(name) for key, name in names.items()}
    constants |= {"EACH": made["each_heads"], "WHOLE": made["whole_heads"], "HEADS": made["heads"]}
    found: tuple[Entry, ...] = (("chosen_kernel", types, constants, _options(spec) | {"num_stages": 2}), last)
    if not made["n_split"]:
        return found
    typed = _types(
        f"*i64: new start layer; *i32: by readers; *{kept}: marks; *T: split; *fp32: scales; i32: clock_b blocks "
        "score_units rows kv_heads read",
        dtype,
    )
    block: dict[str, object] = {key: spec.fact(name) for key, name in names.items()}
    block |= {"D": width, "D_PAD": padded(width), "BLOCK": spec.fact("block_n")}
    return (("split_kernel", typed, block, options), *found)


_TABLES = {
    "decode": _decode,
    "prefill": _prefill,
    "evict": _evict,
    "select": _select,
    "pack": _pack,
    "columns": _columns,
    "keys": _keys,
    "pool": _pool,
    "marks": _marks,
    "units": _units,
    "spans": _spans,
    "chosen": _chosen,
    "blocks": _blocks,
}


def offline_lines(spec: KernelSpec) -> list[str]:
    """The table as a person reads it in the file."""
    lines = []
    for kernel, types, constants, options in offline(spec):
        lines += ["    (", f'        "{kernel}",', "        {"]
        lines += [f'            "{kind}": "{names}",' for kind, names in types.items()]
        lines += ["        },", *_table(constants), f"        {_braced(dict(options))},", "    ),"]
    return lines


def _table(values: dict[str, object]) -> list[str]:
    """On one line, or in rows of six where that line would be long."""
    line = f"        {_braced(values)},"
    if len(line) <= 120:
        return [line]
    pairs = [f'"{name}": {value!r}' for name, value in values.items()]
    rows = [", ".join(pairs[at : at + 6]) for at in range(0, len(pairs), 6)]
    return ["        {", *(f"            {row}," for row in rows), "        },"]


def _braced(values: dict[str, object]) -> str:
    return "{" + ", ".join(f'"{name}": {value!r}' for name, value in values.items()) + "}"
