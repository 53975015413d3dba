"""The words of the language: what is reserved, and what each construct knows.

Read by the checks and by hints that name the nearest known word. Gives plain tables, nothing else.
"""

from __future__ import annotations

AXES = "hgquid"  # in the order in which open axes are written

# Open axes of what a formula may read. `i` is the row's entries, `u` units, `d` channels, `g` grouped query heads.
FIELDS: dict[str, str] = {
    "q": "gqd",
    "k": "id",
    "v": "id",
    "attn": "gqi",
    "logit": "gqi",
    "pos": "i",
    "age": "i",
    "count": "i",
    "now": "",
    "len": "",
    "prompt": "",
    "chunk": "",
    "step": "",
}
OWNERS: dict[str, frozenset[str]] = {
    "raw": frozenset({"k"}),
    "next": frozenset({"k", "v"}),
    "prev": frozenset({"q", "k", "v"}),
}
PORTIONS = frozenset({"prompt", "len", "chunk"})

REDUCTIONS = frozenset({"sum", "mean", "max", "min", "var", "std", "softmax"})
QUERY_SOURCES = frozenset({"last", "peek", "sample"})
ELEMENTWISE = frozenset({"exp", "log", "sigmoid", "sqrt", "abs"})
POOLS = frozenset({"maxpool", "avgpool"})
PAIRS = frozenset({"dot", "cos"})
# Name -> least and largest number of arguments.
FUNCTIONS: dict[str, tuple[int, int]] = (
    dict.fromkeys((*ELEMENTWISE, "norm", "gumbel"), (1, 1))
    | dict.fromkeys((*PAIRS, *POOLS), (2, 2))
    | {"min": (2, 8), "max": (2, 8), "learned": (2, 9)}
)
# How a call reads, for hints.
SHAPES: dict[str, str] = (
    {name: f"{name}(x)" for name in ELEMENTWISE}
    | {name: f"{name}(x, 7)" for name in POOLS}
    | {"norm": "norm(k)", "dot": "dot(q, k)", "cos": "cos(k, mean[i] k)", "gumbel": "gumbel(0)"}
    | {"min": "min(x, y)", "max": "max(x, y)", "learned": 'learned("weights.safetensors", q, k, v)'}
)
# Inside the `when` and `weight` of a loser: the mean over the losers of a row, and a number that goes on over time.
OVER_LOSERS = frozenset({"mean", "ema"})
# What a merge may call near: a likeness of keys or values, or nearness in position.
SIMILARITIES: dict[str, tuple[str, ...]] = {"cos": ("k", "v"), "dot": ("k", "v"), "distance": ("pos",)}
SHARES: dict[str, tuple[int, int]] = {"pyramid": (1, 1), "softmax": (1, 1), "cover": (1, 1), "table": (1, 1)}
SHARE_SHAPES: dict[str, str] = {
    "pyramid": "pyramid(20)",
    "softmax": "softmax(-var[i] acc)",
    "cover": "cover(s)",
    "table": 'table("layers.txt")',
}

# Region -> number of arguments; the unit regions name a unit instead.
REGIONS: dict[str, int] = {
    "all": 0,
    "rest": 0,
    "prompt": 0,
    "generated": 0,
    "frozen": 0,
    "sink": 1,
    "recent": 1,
    "stride": 1,
    "random": 2,
    "span": 1,
}
UNIT_REGIONS = frozenset({"newest", "own", "pow2"})

# Trigger -> least and largest number of arguments.
TRIGGERS: dict[str, tuple[int, int]] = {
    "prefill.end": (0, 0),
    "chunk": (0, 1),
    "step": (0, 0),
    "every": (1, 1),
    "filled": (1, 2),
    "full": (1, 1),
    "when": (0, 0),
}
DECODE_TRIGGERS = frozenset({"step", "every", "filled", "full", "when"})
EVENTS = frozenset({"attend", "insert", "step"})
POSITIONS = frozenset({"original", "compact"})

FORMATS = frozenset(
    {
        "fp32",
        "bf16",
        "fp16",
        "fp8",
        "int8",
        "int4",
        "int2",
        "int",
        "lowrank",
        "prerope",
        "rotate",
        "hadamard",
        "outliers",
        "slerp",
    }
)
GRAINS = frozenset({"channel", "token", "layers"})
TIERS = frozenset({"cpu", "disk"})
FOLDS: dict[str, tuple[int, int]] = {"mean": (0, 0), "dct": (1, 1), "pool": (1, 1)}
FOLD_SHAPES: dict[str, str] = {"mean": "mean", "dct": "dct(50%)", "pool": "pool(4)"}

SCOPES: dict[str, frozenset[str]] = {
    "per": frozenset({"head", "query_head"}),
    "shared": frozenset({"heads", "layers"}),
    "across": frozenset({"heads", "layers"}),
}
HEAD_SOURCES = frozenset({"table", "probe"})
PROBES = frozenset({"induction", "echo"})

# Gate of a learn block -> its options, and how it reads.
GATES: dict[str, tuple[str, ...]] = {
    "hard_concrete": ("init", "low", "high", "temperature"),
    "clamp01": ("init",),
    "sparsemax": ("keep", "init", "temperature", "ramp"),
}
GATE_SHAPES: dict[str, str] = {
    "hard_concrete": "hard_concrete(init=4.0)",
    "clamp01": "clamp01(init=1)",
    "sparsemax": "sparsemax(keep=30%)",
}
# Gates of units that a learn block of a trained score asks for -> their options, and how they read.
BLOCK_GATES: dict[str, tuple[str, ...]] = {"block_gate": ("width",), "query_gate": ("width",)}
BLOCK_GATE_SHAPES: dict[str, str] = {"block_gate": "block_gate(width=128)", "query_gate": "query_gate(width=128)"}
# Terms of its loss, of a gate called z.
LOSSES: dict[str, str] = {
    "next_token": "next_token",
    "hidden_mse": "hidden_mse(answer_tokens)",
    "lagrange": "lagrange(mean(z), target=30%, ramp=80%)",
    "mean": "0.05 * mean(z)",
}

_VERBS = (
    "policy",
    "heads",
    "learn",
    "extends",
    "keep",
    "attend",
    "store",
    "at",
    "score",
    "unit",
    "share",
    "pick",
    "state",
    "on",
    "positions",
    "off",
    "layers",
    "gate",
    "mix",
    "loss",
    "freeze",
)
_JOINING = (
    "top",
    "bottom",
    "cover",
    "where",
    "by",
    "else",
    "as",
    "if",
    "when",
    "with",
    "from",
    "into",
    "and",
    "or",
    "not",
    "of",
    "in",
)
RESERVED = frozenset(
    [*_VERBS, *_JOINING, *FIELDS, *OWNERS, *AXES, *REGIONS, *UNIT_REGIONS, *SCOPES, "head", "query_head", "floor"]
)
# Names of options of the Python interface: a parameter so named could never be given.
OPTIONS = frozenset(
    {
        *("model", "policy", "backend", "compile", "name", "tables", "max_bytes"),
        *("generate", "batch", "gpu", "facts", "base", "dump", "probes"),
    }
)
