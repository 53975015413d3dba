"""What one generated kernel is: a template, the facts it is specialised on, the formulas in its holes.

Takes nothing but plain values, so that a spec is hashable, comparable and a key. Two kernels that differ
by a fact share a template through a constant, those that differ by a formula share it through a hole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvcompile.kernels.plan import Expr

Fact = int | str | bool
Hole = Expr | str
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel file. `facts` and `holes` are sorted by name; `tag` is what sets its name apart.

    Holes are formulas, or text where the formula was printed already (regions).
    """

    template: str
    facts: tuple[tuple[str, Fact], ...]
    holes: tuple[tuple[str, Hole], ...] = ()
    tag: str = ""

    @classmethod
    def of(cls, template: str, holes: dict[str, Hole] | None = None, tag: str = "", **facts: Fact) -> KernelSpec:
        """Build one from names, in any order."""
        return cls(template, tuple(sorted(facts.items())), tuple(sorted((holes or {}).items())), tag)

    def fact(self, name: str) -> Fact:
        """One fact; KeyError where the template has none of that name."""
        return dict(self.facts)[name]

    def number(self, name: str) -> int:
        """One fact that is an integer."""
        return int(self.fact(name))

    @property
    def name(self) -> str:
        """Spells the facts that tell kernels apart: decode_g4_d128_p16_bf16_acc."""
        facts = dict(self.facts)
        parts = [self.template]
        parts += [f"{letter}{facts[name]}" for name, letter in _LETTERS if name in facts]
        parts += [_SHORT[str(facts["dtype"])]] if "dtype" in facts else []
        parts += [str(facts["scope"])] if "scope" in facts else []
        return "_".join([*parts, self.tag] if self.tag else parts)

    @property
    def cpp_name(self) -> str:
        """The name of the same kernel in C++, where rows are not cut into pages."""
        whole = KernelSpec(self.template, tuple(f for f in self.facts if f[0] != "page"), self.holes, self.tag)
        return f"{whole.name}_cpp"

    def digest(self) -> str:
        """Stable over processes: 16 hexadecimal digits of template, facts and formulas."""
        return hashlib.sha256(repr((self.template, self.facts, self.holes)).encode()).hexdigest()[:16]


# Facts that shape a launch on a GPU and nothing that a kernel means.
LAUNCH = frozenset({"page", "group_pad", "block_m", "block_n", "block_q", "warps", "stages", "min_chunk", "logits"})
_LETTERS = (("group", "g"), ("head_dim", "d"), ("page", "p"), ("window", "w"), ("heads", "h"))


def dtype_name(dtype: str) -> str:
    """fp32, fp16 or bf16 of a torch dtype's name."""
    return _SHORT[dtype]


def power_of_two(n: int) -> int:
    """The next power of two, at least 1: the side of a tile that holds n."""
    return 1 << max(0, n - 1).bit_length()
