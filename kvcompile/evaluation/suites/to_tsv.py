"""Long procedural generation: records told in messy prose must be written down as a table, row by row.

The kind of task is that of LongProc's HTML to TSV (Ye et al. 2025): long in, long out, checked by rule. Records,
text and rule of what counts as a row are ours; the score is F1 over rows, as there.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites import prose
from kvcompile.evaluation.suites.generated import Generated
from kvcompile.evaluation.suites.options import number
from kvcompile.evaluation.suites.telling import depth_of

COLUMNS = ("order", "buyer", "count", "item", "town")
ITEMS = ("lamps", "chairs", "kettles", "baskets", "ropes", "candles", "mirrors", "spoons", "ladders", "pillows")
TOWNS = ("Marlow", "Tenby", "Oakham", "Ripley", "Selby", "Whitby", "Ludlow", "Corsham", "Hythe", "Keswick")
# Each tells the number first, so that it is what a row of the prose can be found by.
TELLINGS = (
    "Order {order} came from {buyer} in {town}, who wants {count} {item}.",
    "As for order {order}: {count} {item} go to {town}, where {buyer} waits for them.",
    "Number {order} is a sale to {buyer}, namely {count} {item}, to be sent to {town}.",
    "A letter from {town} confirms order {order} of {count} {item}; {buyer} signed it.",
    "For {buyer}, order {order} was changed to {count} {item}. The parcel leaves for {town}.",
)


@dataclass(frozen=True, slots=True)
class ToTsv(Generated):
    """`rows` records all over the prompt; the whole table is one long answer."""

    rows: int = number(20, 1, 2000, "records told, rows to write")
    base: ClassVar[str] = "to_tsv"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        records = [
            (
                str(order),
                rng.choice(tales.NAMES).capitalize(),
                str(rng.randint(2, 99)),
                rng.choice(ITEMS),
                rng.choice(TOWNS),
            )
            for order in rng.sample(range(10_000, 100_000), self.rows)
        ]
        told = [rng.choice(TELLINGS).format(**dict(zip(COLUMNS, record, strict=True))) for record in records]
        header = "\t".join(COLUMNS)
        prompt = (
            "The text below tells of orders, among other things. Afterwards, write all of them down as a table.\n\n"
            f"{prose.woven(rng, told, size)}\n\n"
            f"Write one line for each of the {self.rows} orders, in the order in which the text tells them, with these "
            f"values between tabs: {', '.join(COLUMNS)}.\n\nTable:\n{header}\n"
        )
        answer = "\n".join("\t".join(record) for record in records)
        turn = Turn("", answer, tokens=prose.room_for(tokenizer, answer))
        return Sample(prompt, (turn,), depth_of(prompt, told[0]), {"needle": told[0], "rows": self.rows})

    def score(self, turn: Turn, produced: str) -> float:
        """F1 over rows. A row is a line with a tab; case and spaces around values do not count, nor the header."""
        right, said = Counter(_rows(turn.answer)), Counter(_rows(produced))
        shared = (right & said).total()
        return 2 * shared / (right.total() + said.total())


def _rows(text: str) -> list[tuple[str, ...]]:
    lines = (line.strip("\r\n ") for line in text.casefold().split("\n"))
    rows = [tuple(" ".join(value.split()) for value in line.split("\t")) for line in lines if "\t" in line]
    return [row for row in rows if row != COLUMNS]
