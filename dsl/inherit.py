"""`extends`: the line of parents of a policy, and the clauses that remain when a child has replaced some.

Takes a `Loaded`; gives its lineage, child first, and flat clauses. Guarantees: no cycle; a child's clause of
a verb or name replaces the parent's, an unprefixed one under every prefix, a prefixed one under its own (rule 25).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.dsl import ast, library
from kvcompile.dsl.diagnostics import did_you_mean, fail
from kvcompile.dsl.load import Loaded, library_file

MAX_LINE = 32


@dataclass(frozen=True, slots=True)
class Flat:
    """A clause that is no block, with the prefixes around it, outermost first."""

    prefixes: tuple[ast.Prefix, ...]
    clause: ast.Clause


def lineage(loaded: Loaded) -> tuple[Loaded, ...]:
    """The policy, its parent, and so on. PolicyError for an unknown parent or a cycle, with the cycle named."""
    line = [loaded]
    seen = {_key(loaded)}
    while (parent := line[-1].policy.parent) is not None:
        above = _parent(line[-1], parent)
        if _key(above) in seen:
            path = " -> ".join([*(link.policy.name for link in line), above.policy.name])
            raise fail(
                "K108", f"a policy cannot extend itself: {path}", parent.span, "let one of them stand on its own"
            )
        seen.add(_key(above))
        line.append(above)
        if len(line) > MAX_LINE:
            message = f"policies extend each other more than {MAX_LINE} deep"
            raise fail("K008", message, parent.span, "extend a policy nearer to the top")
    return tuple(line)


def merge(line: tuple[Loaded, ...]) -> list[Flat]:
    """The clauses of a lineage after replacement, in the order in which `at` governs them."""
    clauses = flatten(line[-1].policy.clauses)
    for child in reversed(line[:-1]):
        clauses = _replace(clauses, flatten(child.policy.clauses))
    return clauses


def flatten(clauses: tuple[ast.Clause, ...], prefixes: tuple[ast.Prefix, ...] = ()) -> list[Flat]:
    """Prefix blocks opened, `state` lists split into one assignment each."""
    out: list[Flat] = []
    for clause in clauses:
        if isinstance(clause, ast.Prefixed):
            out += flatten(clause.clauses, (*prefixes, clause.prefix))
        elif isinstance(clause, ast.State):
            out += [Flat(prefixes, ast.State((assign,), span=assign.span)) for assign in clause.assigns]
        else:
            out.append(Flat(prefixes, clause))
    return out


def _key(loaded: Loaded) -> tuple[str, str]:
    return loaded.file.source.name, loaded.policy.name


def _parent(child: Loaded, parent: ast.Name) -> Loaded:
    # A library policy may be extended by one of the same name, so the policy itself is no candidate.
    here = child.file.policy(parent.id)
    if here is not None and (here is not child.policy or parent.id not in library.names()):
        return Loaded(child.file, here, child.base)
    if parent.id in library.names():
        file = library_file(parent.id)
        found = file.policy(parent.id)
        if found is not None:
            return Loaded(file, found, None)
    known = [policy.name for policy in child.file.policies] + list(library.names())
    raise fail(
        "K107",
        f"no policy `{parent.id}` to extend, neither in this file nor in the library",
        parent.span,
        did_you_mean(parent.id, known, "known"),
    )


def _slot(clause: ast.Clause) -> str:
    """What a clause replaces: its verb, or its verb and name."""
    if isinstance(clause, ast.State):
        return f"state {clause.assigns[0].name}"
    if isinstance(clause, ast.On):
        return f"on {clause.event}"
    if isinstance(clause, ast.Declaration):
        return f"{type(clause).__name__} {clause.name}"
    return type(clause).__name__


def _replace(parent: list[Flat], child: list[Flat]) -> list[Flat]:
    by_slot: dict[str, list[Flat]] = {}
    for flat in child:
        by_slot.setdefault(_slot(flat.clause), []).append(flat)

    def replaced(flat: Flat) -> bool:
        heirs = by_slot.get(_slot(flat.clause), ())
        return any(heir.prefixes in ((), flat.prefixes) for heir in heirs)

    if "At" in by_slot:
        # The child says anew when things happen, so its own order of sets and `at` counts.
        return [flat for flat in parent if not replaced(flat) and not isinstance(flat.clause, ast.At)] + child

    out: list[Flat] = []
    placed: set[str] = set()
    for flat in parent:
        if not replaced(flat):
            out.append(flat)
            continue
        slot = _slot(flat.clause)
        if slot not in placed:
            placed.add(slot)
            out += by_slot[slot]
    fresh = [flat for flat in child if _slot(flat.clause) not in placed]
    last_at = max((i for i, flat in enumerate(out) if isinstance(flat.clause, ast.At)), default=len(out))
    return out[:last_at] + fresh + out[last_at:]
