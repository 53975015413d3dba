"""Which rows of a model can be counted together, because what they hold follows from the same numbers.

Takes a plan and a prompt length; gives `Group`s. Guarantees: every row of every layer is in exactly one group, in
the order of the groups' first layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.counts import layer_shares
from kvcompile.kernels.plan import PolicyPlan, Selection

Parts = tuple[int, ...]  # of every share, a layer's part


@dataclass(frozen=True, slots=True)
class Member:
    """Rows of one layer: how many are counted, the layer's parts of the shares, and whose parts decide for it.

    leads: for each number m of `shared layers(m)` the parts of the layer that decides; alike: the two layers have
    the same heads and parts, so that both really hold the same.
    """

    rows: int
    parts: Parts
    leads: tuple[tuple[int, Parts], ...] = ()
    alike: bool = True

    def of(self, term: Selection) -> Parts:
        """The parts that a selection counts with."""
        return dict(self.leads)[term.sharing] if term.layers == "shared" else self.parts


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one rule or of several (`rules`, classes in the order in which they judge) in some layers.

    members: what is counted as one: one row where each row is decided by itself, the rows of a layer where its heads
    compete, all rows where layers do. `times`: how often the model has that; `pooled`: layers are counted together.
    """

    rules: tuple[int, ...]
    layers: tuple[int, ...]
    members: tuple[Member, ...]
    times: int
    competes: bool = False
    pooled: bool = False

    @property
    def rows(self) -> int:
        return sum(member.rows for member in self.members)

    def share_of(self, total: int) -> list[int]:
        """The entries that each layer of the group has of the group's `total`; where layers compete, in equal parts."""
        each, rest = divmod(total, len(self.layers))
        return [each + (place < rest) for place in range(len(self.layers))]


def groups(plan: PolicyPlan, prompt: int) -> tuple[Group, ...]:
    """Layers of a class that have as many heads and equal parts of every share; all its layers where they compete."""
    shares = layer_shares(plan, {"prompt": prompt}, {})
    parts = [tuple(share[layer] for share in shares) for layer in range(plan.facts.layers)]
    found: list[Group] = []
    for owner, cls in enumerate(plan.classes):
        if cls.rows_of is None and plan.class_size(owner):
            found += _of_class(plan, owner, parts)
    return tuple(sorted(found, key=lambda group: group.layers[0]))


def _of_class(plan: PolicyPlan, owner: int, parts: list[Parts]) -> list[Group]:
    rules = tuple(i for i, cls in enumerate(plan.classes) if owner in (i, cls.rows_of))
    terms = [term for rule in rules for term in plan.classes[rule].selections]
    layers = plan.class_layers(owner)
    members = {layer: _member(plan, owner, layer, terms, parts) for layer in layers}
    competes = any(term.scope == "across" for term in terms)
    if any(plan.spans(rule) for rule in rules):
        return [Group(rules, layers, tuple(members.values()), 1, competes=True, pooled=True)]
    alike: dict[Member, list[int]] = {}
    for layer, member in members.items():
        alike.setdefault(member, []).append(layer)
    return [
        Group(rules, tuple(same), (member,), len(same), competes=True)
        if competes
        else Group(rules, tuple(same), (_single(member),), len(same) * member.rows)
        for member, same in alike.items()
    ]


def _single(member: Member) -> Member:
    return Member(1, member.parts, member.leads, member.alike)


def _member(plan: PolicyPlan, owner: int, layer: int, terms: list[Selection], parts: list[Parts]) -> Member:
    layers = plan.class_layers(owner)
    sharing = sorted({term.sharing for term in terms if term.layers == "shared"})
    leaders = [layers[layers.index(layer) // m * m] for m in sharing]
    alike = all(
        plan.heads(first, owner) == plan.heads(layer, owner) and parts[first] == parts[layer] for first in leaders
    )
    leads = tuple((m, parts[first]) for m, first in zip(sharing, leaders, strict=True))
    return Member(len(plan.heads(layer, owner)), parts[layer], leads, alike)
