"""Rows of a model as sets of positions, decided by chance: an independent count of what a plan keeps.

Written from the language's rules, entry by entry; shares no code with `passes` but the arithmetic of counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

from kvcompile.kernels.counts import count_value, layer_shares, number, weighted
from kvcompile.kernels.plan import ClassPlan, Expr, PolicyPlan, Region, Selection, Trigger

Row = tuple[int, int]  # layer, KV head


class Model:
    """All rows of one sequence. `held(layer, head)` is what a row holds, entries without position among it."""

    def __init__(self, plan: PolicyPlan, dice: random.Random) -> None:
        self.plan, self.dice = plan, dice
        every = [(x, h) for x in range(plan.facts.layers) for h in range(plan.facts.kv_heads)]
        self.rows: dict[Row, set[int]] = {row: set() for row in every}
        self.frozen: dict[Row, set[int]] = {row: set() for row in every}
        self.folded: set[Row] = set()
        self.slots: dict[tuple[int, int], set[int]] = {}
        self.ranks: dict[tuple[int, Row], list[float]] = {}
        self.arrived = dict.fromkeys(range(len(plan.classes)), 0)
        self.judged: dict[tuple[int, str], int] = {}
        self.measured: dict[int, tuple[int, ...]] = {}
        self.seen = self.prompt = 0

    def held(self, row: Row) -> int:
        return len(self.rows[row]) + (row in self.folded)

    @property
    def total(self) -> int:
        return sum(self.held(row) for row in self.rows)

    # -- forwards ----------------------------------------------------------------------------------------------------

    def run(self, prompt: int, steps: int) -> list[int]:
        """Totals after each forward of one more prompt and so many steps."""
        self.prompt = self.seen + prompt
        size = self.plan.chunk or prompt
        out = []
        for start in range(0, prompt, size):
            n = min(size, prompt - start)
            self.forward(n, "prefill.end" if start + n == prompt else "chunk", 0)
            out.append(self.total)
        for step in range(1, steps + 1):
            self.forward(1, "step", step)
            out.append(self.total)
        return out

    def forward(self, tokens: int, phase: str, step: int) -> None:
        plan = self.plan
        for row in self.rows.values():
            row.update(range(self.seen, self.seen + tokens))
        self.seen += tokens
        self.now = {"prompt": self.prompt, "now": self.seen - 1, "chunk": tokens, "step": step}
        self.phase = phase
        self.inserted()
        fired: dict[int, list[Trigger]] = {}
        for rule, cls in enumerate(plan.classes):
            self.arrived[rule] += tokens
            some = [t for t in cls.triggers if self.fires(rule, t)]
            if some and not cls.keeps_all:
                fired[rule] = some
        if phase == "prefill.end":
            self.measure()
        for layer in range(plan.facts.layers):
            for rule in plan.site_classes(layer):
                if rule in fired and not plan.spans(rule):
                    self.decide(rule, fired[rule], [layer])
        for rule in fired:
            if plan.spans(rule):
                self.decide(rule, fired[rule], list(plan.class_layers(rule)))
            if all(t.kind == "slide" for t in fired[rule]):
                continue  # nothing was decided
            self.arrived[rule] = 0
            for unit in {t.unit for t in plan.classes[rule].triggers if t.unit}:
                self.judged[rule, unit] = self.ready(plan.classes[rule], unit)

    def inserted(self) -> None:
        """Called when a forward's entries are in all rows and nothing is decided yet."""

    def fires(self, rule: int, t: Trigger) -> bool:
        n, step = t.n or 0, self.now["step"]
        if t.kind == "full":
            owner = [(x, h) for x in self.plan.class_layers(rule) for h in self.plan.heads(x, rule)]
            return max(self.held(row) for row in owner) >= n
        if t.kind == "filled" and t.unit:
            return self.full(t.unit) - self.judged.get((rule, t.unit), 0) >= n
        return {
            "chunk": self.phase != "step",
            "every": bool(step) and step % max(n, 1) == 0,
            "filled": self.arrived[rule] >= n,
            "when": True,
            "slide": self.seen >= self.plan.class_reach(rule) and step % max(n, 1) == 0,
        }.get(t.kind, t.kind == self.phase)

    def measure(self) -> None:
        """Shares that follow from entries get parts by chance: all that is sure is their sum."""
        for index, share in enumerate(self.plan.shares):
            if share.measured:
                using = [x for x in range(self.plan.facts.layers) if self.uses(x, index)]
                total = int(number(share.total, {"prompt": self.prompt})) * len(using)
                parts = weighted(total, tuple(Fraction(self.dice.choice((0, 1, 3, 50))) for _ in using))
                by_layer = dict(zip(using, parts, strict=True))
                self.measured[index] = tuple(by_layer.get(x, 0) for x in range(self.plan.facts.layers))

    def uses(self, layer: int, share: int) -> bool:
        return any(share in self.plan.shares_of(rule) for rule in self.plan.site_classes(layer))

    def full(self, unit: str) -> int:
        found = self.plan.unit(unit)
        return max(0, self.seen - found.offset) // found.size

    def ready(self, cls: ClassPlan, unit: str) -> int:
        scores = [n for t in cls.selections if unit in (t.unit, t.whole) for n in t.score.walk()]
        marks = [n for _, mark in self.plan.unit(unit).landmarks for n in mark.walk()]
        ahead = any(str(n.value).startswith("next.") for n in scores + (marks if scores else []))
        return max(0, self.full(unit) - ahead)

    # -- one rule ----------------------------------------------------------------------------------------------------

    def decide(self, rule: int, fired: list[Trigger], layers: list[int]) -> None:
        cls = self.plan.classes[rule]
        rows = [(x, h) for x in layers for h in self.plan.heads(x, rule)]
        before = dict(self.rows)
        if reach := self.plan.class_reach(rule):
            self.rows |= {row: {p for p in self.rows[row] if p > self.seen - reach} for row in rows}
        fired = [t for t in fired if t.kind != "slide"]
        rows = [row for row in rows if any(self.holds(t.cond, row) for t in fired)]
        kept = {row: {p for p in self.rows[row] if any(self.inside(t, p, row) for t in cls.keep)} for row in rows}
        won: dict[Row, set[int]] = {row: set() for row in rows}
        for term in cls.selections:
            unit = term.unit or term.whole
            open_ = {row: self.rows[row] - kept[row] for row in rows}
            if unit is not None:
                for row in rows:
                    waiting = {p for p in open_[row] if not 0 <= self.unit_of(unit, p) < self.ready(cls, unit)}
                    kept[row] |= waiting
                    open_[row] -= waiting
            for row, chosen in self.choose(term, rule, open_).items():
                kept[row] |= chosen
                won[row] |= chosen
                if cls.only_picks and term.pick is not None:
                    self.slots[term.pick, row[1]] = set(chosen)
        if cls.only_picks:
            self.rows = before
            return
        for row in rows:
            lost = sorted(self.rows[row] - kept[row])
            self.frozen[row] |= won[row]
            self.rows[row] = kept[row] | self.left(cls, row, lost)

    def left(self, cls: ClassPlan, row: Row, lost: list[int]) -> set[int]:
        for loser in cls.losers if lost else ():
            if loser.kind == "drop" or (loser.kind == "merge" and loser.when is None):
                break
            if loser.kind == "merge":
                lost = [p for p in lost if self.dice.random() < 0.5]
            elif loser.fn == "mean" and lost:
                self.folded.add(row)
                break
            elif lost:
                m = max(1, int(len(lost) * loser.part)) if loser.fn == "dct" else math.ceil(len(lost) * loser.part)
                return {lost[i * len(lost) // m] for i in range(m)}
        return set()

    def holds(self, cond: Expr | None, row: Row) -> bool:
        if cond is None:
            return True
        if any(n.op == "evidence" for n in cond.walk()):
            return self.dice.random() < 0.5
        a, b = (number(arg, self.scalars(row)) for arg in cond.args)
        return {">": a > b, ">=": a >= b, "<": a < b}[str(cond.value)]

    def scalars(self, row: Row) -> dict[str, int]:
        return {**self.now, "len": self.held(row)}

    def count(self, index: int, row: Row) -> int:
        shares = layer_shares(self.plan, self.now, self.measured)
        return count_value(self.plan.counts[index], self.scalars(row), [share[row[0]] for share in shares])

    # -- regions -----------------------------------------------------------------------------------------------------

    def unit_of(self, unit: str, p: int) -> int:
        found = self.plan.unit(unit)
        return (p - found.offset) // found.size

    def inside(self, term: object, p: int, row: Row) -> bool:
        if not isinstance(term, Region):
            return False
        n = self.count(term.count, row) if term.count is not None else 0
        tests: dict[str, Callable[[], bool]] = {
            "all": lambda: True,
            "sink": lambda: p < n,
            "recent": lambda: p >= self.seen - n,
            "prompt": lambda: p < self.prompt,
            "generated": lambda: p >= self.prompt,
            "frozen": lambda: p in self.frozen[row],
            "stride": lambda: p % n == 0,
            "newest": lambda: self.unit_of(str(term.unit), p) == self.unit_of(str(term.unit), self.seen - 1),
            "random": lambda: p in self.smallest(term.seed, row, n),
            "picked": lambda: p in self.slots.get((int(term.pick or 0), row[1]), ()),
        }
        return tests[term.kind]()

    def smallest(self, seed: int, row: Row, n: int) -> set[int]:
        ranks = self.ranks.setdefault((seed, row), [])
        ranks += [self.dice.random() for _ in range(self.seen - len(ranks))]
        return set(sorted(range(self.seen), key=lambda p: ranks[p])[:n])

    # -- selections --------------------------------------------------------------------------------------------------

    def choose(self, term: Selection, rule: int, open_: dict[Row, set[int]]) -> dict[Row, set[int]]:
        if term.layers != "shared":
            return self.fresh(term, open_)
        assert term.pick is not None
        every, out = self.plan.class_layers(rule), {}
        for layer in sorted({x for x, _ in open_}):
            here = {row: found for row, found in open_.items() if row[0] == layer}
            if every.index(layer) % term.sharing:
                chosen = {row: found & self.slots[term.pick, row[1]] for row, found in here.items()}
            else:
                chosen = self.fresh(term, here)
                self.slots |= {(term.pick, head): won for (_, head), won in chosen.items()}
            out |= chosen
        return out

    def fresh(self, term: Selection, open_: dict[Row, set[int]]) -> dict[Row, set[int]]:
        out: dict[Row, set[int]] = {row: set() for row in open_}
        for pool in self.pools(term, list(open_)):
            for row, chosen in self.of_pool(term, pool, open_).items():
                out[row] |= chosen
        return out

    def pools(self, term: Selection, rows: list[Row]) -> list[list[Row]]:
        wide = term.layers == "across"
        match term.scope:
            case "across":
                return [rows] if wide else [[r for r in rows if r[0] == x] for x in sorted({x for x, _ in rows})]
            case "shared":
                return [rows] if wide else [[r for r in rows if r[0] == x] for x in sorted({x for x, _ in rows})]
            case "query_head":
                return [[row] for row in rows for _ in range(self.plan.facts.group)]
        return [[r for r in rows if r[1] == h] for h in sorted({h for _, h in rows})] if wide else [[r] for r in rows]

    def of_pool(self, term: Selection, pool: list[Row], open_: dict[Row, set[int]]) -> dict[Row, set[int]]:
        """Winners of those that compete; rows that share a decision are stood for by the first of their layer."""
        shown = {row[0]: row for row in reversed(pool)} if term.scope == "shared" else {row: row for row in pool}
        stand = sorted(shown.values())
        n = sum(self.count(term.count, row) for row in stand) if term.count is not None else 0
        things = [(row, p) for row in stand for p in sorted(open_[row])]
        out: dict[Row, set[int]] = {row: set() for row in pool}
        if term.unit is not None:
            for unit in {self.unit_of(term.unit, p) for _, p in things}:
                group = [(row, p) for row, p in things if self.unit_of(term.unit, p) == unit]
                for row, p in self.best(term, group, n, 0):
                    out[row].add(p)
        elif term.whole is not None:
            units = sorted({(row, self.unit_of(term.whole, p)) for row, p in things})
            chosen = set(self.best(term, units, n, 0))
            for row, p in things:
                if (row, self.unit_of(term.whole, p)) in chosen:
                    out[row].add(p)
        else:
            watched = []
            if term.observed and self.phase == "prefill.end":
                watched = [(row, p) for row, p in things if p >= self.seen - term.observed]
            rest = [thing for thing in things if thing not in set(watched)]
            for row, p in [*watched, *self.best(term, rest, n, len(watched))]:
                out[row].add(p)
        if term.scope == "shared":
            out = {row: out[shown[row[0]]] & open_[row] for row in pool}
        return out

    def best(self, term: Selection, things: list[tuple[Row, int]], n: int, taken: int) -> list[tuple[Row, int]]:
        if term.rank == "where":
            return [thing for thing in things if self.dice.random() < 0.5]
        if term.rank == "cover":
            assert term.fraction is not None
            flat = self.dice.random() < 0.5  # equal scores need the most entries
            scores = sorted((1.0 if flat else self.dice.random() ** 4 for _ in things), reverse=True)
            everything = math.fsum(scores)
            n = sum(math.fsum(scores[:k]) < term.fraction * everything for k in range(len(scores)))
        elif term.fraction is not None:
            n = int((len(things) + taken) * term.fraction)
        return self.dice.sample(things, min(max(0, n - taken), len(things)))
