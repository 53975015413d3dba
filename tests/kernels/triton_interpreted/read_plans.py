"""Plans of reads by units written by hand, as the lowering makes them: no kernel and no reference code in here."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    ReadPlan,
    ReadRule,
    Region,
    Selection,
    Term,
    Trigger,
    UnitPlan,
)
from tests.kernels.triton_interpreted.plans import PAGE, STEP, binary, const, named, reduce

K, Q = named("field", "k"), Expr("queries", (), QuerySource("own"))
CHUNK = Trigger("chunk")


def mark(unit: str, name: str) -> Expr:
    return Expr("landmark", (), (unit, name))


def dot(a: Expr, b: Expr) -> Expr:
    return Expr("pair", (a, b), "dot")


def asked(score: Expr) -> Expr:
    """A score of the query that reads: there is one."""
    return reduce("sum", "q", score)


def reading(
    terms: tuple[Term, ...],
    units: tuple[UnitPlan, ...],
    counts: tuple[int, ...] = (),
    *,
    triggers: tuple[Trigger, ...] = (CHUNK, STEP),
    keep: ClassPlan | None = None,
    layers: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    dtype: str = "float32",
    read_of: tuple[tuple[int, ...], ...] | None = None,
) -> PolicyPlan:
    """One read of all heads, or of those that `read_of` names; every row keeps all unless `keep` says otherwise."""
    facts = ModelFacts(layers, kv_heads * group, kv_heads, head_dim, dtype)
    kept = keep or ClassPlan("all", (Region("all"),), (), (), True)
    numbers = tuple(Count(f"n{i}", const(n)) for i, n in enumerate(counts))
    return PolicyPlan(
        "test", "0" * 16, facts, (kept,), ((0,) * kv_heads,) * layers, numbers, units=units, page=PAGE,
        reads=(ReadPlan("some", (ReadRule(terms, triggers),)),), read_of=read_of or ((0,) * kv_heads,) * layers,
    )  # fmt: skip


def quest(size: int = 16, n: int = 2, **facts: object) -> PolicyPlan:
    """Pages by the bounds of their keys (arXiv 2406.10774)."""
    unit = UnitPlan("page", size, 0, (("lo", reduce("min", "i", K)), ("hi", reduce("max", "i", K))))
    best = binary("max", binary("*", Q, mark("page", "lo")), binary("*", Q, mark("page", "hi")))
    choice = Selection("top", asked(reduce("sum", "d", best)), 0, scope="query_head", whole="page")
    return reading((Region("newest", unit="page"), choice), (unit,), (n,), **facts)  # type: ignore[arg-type]


def moba(size: int = 32, n: int = 2, rank: str = "top", **facts: object) -> PolicyPlan:
    """Blocks by their mean key (arXiv 2502.13189)."""
    unit = UnitPlan("block", size, 0, (("c", reduce("mean", "i", K)),))
    choice = Selection(rank, asked(dot(Q, mark("block", "c"))), 0, scope="query_head", whole="block")  # type: ignore[arg-type]
    return reading((Region("own", unit="block"), choice), (unit,), (n,), **facts)  # type: ignore[arg-type]


def infllm(n: int = 2, sink: int = 8, recent: int = 20, **facts: object) -> PolicyPlan:
    """Blocks by overlapping kernels (arXiv 2509.24663)."""
    kernel, block = UnitPlan("kernel", 8, 0, (("c", reduce("mean", "i", K)),), 4), UnitPlan("block", 16, 0)
    soft = reduce("sum", "g", reduce("softmax", "u", dot(Q, mark("kernel", "c"))))
    score = asked(Expr("regroup", (soft,), ("kernel", "block")))
    choice = Selection("top", score, 0, scope="head", whole="block")
    return reading((Region("sink", 1), Region("recent", 2), choice), (kernel, block), (n, sink, recent), **facts)  # type: ignore[arg-type]


def seer(tau: Fraction = Fraction(1, 5), size: int = 16, **facts: object) -> PolicyPlan:
    """Blocks above a threshold (arXiv 2410.13276), with the identity in place of the trained gate."""
    marks = tuple((name, reduce(fn, "i", K)) for name, fn in (("lo", "min"), ("hi", "max"), ("c", "mean")))
    unit, (lo, hi, c) = UnitPlan("block", size, 0, marks), (dot(Q, mark("block", name)) for name in ("lo", "hi", "c"))
    soft = reduce("mean", "g", reduce("softmax", "u", binary("+", binary("+", lo, hi), c)))
    choice = Selection("where", asked(binary(">", soft, const(tau))), scope="head", whole="block")
    return reading((Region("own", unit="block"), choice), (unit,), **facts)  # type: ignore[arg-type]


def cover(part: Fraction = Fraction(2, 5), size: int = 16, scope: str = "head", **facts: object) -> PolicyPlan:
    """The fewest pages that hold a part of the mass: no half, where two heads that are sure of one page each stop."""
    unit = UnitPlan("page", size, 0, (("c", reduce("mean", "i", K)),))
    soft = reduce("softmax", "u", dot(Q, mark("page", "c")))
    score = asked(soft if scope == "query_head" else reduce("mean", "g", soft))
    choice = Selection("cover", score, fraction=part, scope=scope, whole="page")  # type: ignore[arg-type]
    return reading((choice,), (unit,), **facts)  # type: ignore[arg-type]


def share(part: Fraction = Fraction(1, 3), size: int = 8, **facts: object) -> PolicyPlan:
    """A part of the candidates, the worst ones, beside what a stride takes."""
    unit = UnitPlan("page", size, 0, (("c", reduce("sum", "i", K)),))
    choice = Selection("bottom", asked(reduce("max", "g", dot(Q, mark("page", "c")))), fraction=part, whole="page")
    return reading((Region("stride", 0), Region("sink", 1), choice), (unit,), (5, 11), **facts)  # type: ignore[arg-type]


def power(size: int = 16, sink: int = 4, recent: int = 24, **facts: object) -> PolicyPlan:
    """Sink, window and blocks at powers of two (arXiv 2503.03588): nothing is chosen."""
    terms = (Region("sink", 0), Region("recent", 1), Region("pow2", unit="block"))
    return reading(terms, (UnitPlan("block", size, 0),), (sink, recent), triggers=(), **facts)  # type: ignore[arg-type]


def fixed(size: int = 64, step: int = 7, **facts: object) -> PolicyPlan:
    """The query's own block, which is as long as a span, and every so-many-th entry (arXiv 1904.10509)."""
    terms = (Region("own", unit="block"), Region("stride", 0), Region("generated"))
    return reading(terms, (UnitPlan("block", size, 0),), (step,), triggers=(), **facts)  # type: ignore[arg-type]


EVERY: dict[str, Callable[..., PolicyPlan]] = {
    "quest": quest, "moba": moba, "infllm": infllm, "seer": seer, "cover": cover, "share": share, "power": power,
    "fixed": fixed,
}  # fmt: skip
