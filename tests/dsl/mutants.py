"""Policy texts with faults of every kind, and what the language does with each.

`python -m tests.dsl.mutants COUNT SEED` prints one JSON object: how many texts of what outcome, the slowest, the
memory at its highest, and every breach of the promise that nothing but findings comes out, in good time.
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvcompile.dsl import Diagnostic, PolicyError, check, library, load, resolve
from kvcompile.dsl.format import format_text
from kvcompile.dsl.lower import lower

EXAMPLES = (
    """\
heads far = probe("induction", top=14%, tokens=1k) | probe("echo", top=1%)
policy one(n=512, w=32k, part=30%):
    share b = n by cover(mean[h] sum[q] attn)
    far: keep all
    rest:
        keep sink(4) | recent(max(64, now / 5)) | top(b / 4 - 5) by norm(k) per query_head
            else merge into nearest by cos(k) when sim >= ema(mean(sim), 0.5) weight sim * count
            else fold mean weight count
        keep random(64, 3) | frozen | bottom(part) by age
        at every(32) if len > n, full(4096)
    at prefill.end, step
""",
    """\
policy two(seed=0):
    unit page(16) from 4 with lo = min[i] k, hi = max[i] next.k
    state trained = learned("w.safetensors", q, k, v), gap = 1
    on attend where max[g] attn > 0.0001: gap = max(gap, age), trained += sum[q] softmax[i] (logit + gumbel(seed))
    on insert:
        trained = norm(k) / (1 + step)
    layers 0, 2..last-1:
        pick t = top(4) pages by sum[d] max(q * lo, q * hi) shared heads shared layers(8)
    keep t | newest page | cover(95%) by trained across heads floor 20% | where std[d] v < 3 and not pos > 8
    at chunk(8k), when cos(q, prev.q) < 0.5, filled(page, 2)
    store rest as k int2 per channel(32) lowrank(160), v fp16 move cpu
    attend own page | generated
    at step
    layers 21..27: off
    positions compact
""",
    """\
heads a = table("masks.tsv", top=30%)
heads b = rest
policy three(n=128) extends snapkv:
    a: keep all
    b: keep sink(n) | span("question") | stride(8)
    at chunk(n * 8), step
learn a for three:
    gate z = hard_concrete(init=4.0) per head
    mix z * a + (1 - z) * b
    loss next_token + lagrange(mean(z), target=30%, ramp=80%)
    freeze weights
""",
)
TEXTS = tuple(library.read(name) for name in library.names()) + EXAMPLES
WORDS = tuple(sorted({word for text in TEXTS for word in re.findall(r'\w+|"[^"]*"|[^\w\s]+', text)}))
ODD = tuple("()[]{}:|,=%#\"'\\;&^!~`$@?.-+*/<>\t\r\x00\x0b\x0c\x1b\x7f\x85\xa0\u2028\u200f\ufeff\u2603\ud800\U0001f600")
NUMBERS = ("0", "-1", "9" * 18, "9" * 30, "1e30", "1e-30", "1e9999", "0.1", "130%", "0%", "100%", "7g", "64GiB", "3")
MEGABYTE = 1 << 20
SECONDS = 1.0
_WORD = re.compile(r"\w+|[^\w\s]")


def mutant(draw: random.Random) -> str:
    """A text with one to four faults; one in two hundred has a line of a megabyte."""
    text = draw.choice(TEXTS)
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        text = draw.choice(_FAULTS)(draw, text)
    return _megabyte(draw, text) if draw.random() < 0.005 else text


def _cut(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return text[:at] + text[at + draw.choice((1, 1, 2, 5, 20, 200)) :]


def _truncated(draw: random.Random, text: str) -> str:
    return text[: draw.randrange(len(text) + 1)]


def _odd(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(ODD) * draw.choice((1, 1, 1, 3, 70)) + text[at:]


def _swapped_words(draw: random.Random, text: str) -> str:
    spans = [match.span() for match in _WORD.finditer(text)]
    if len(spans) < 2:
        return text
    (a, b), (c, d) = sorted(draw.sample(spans, 2))
    return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


def _swapped_lines(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "\n".join(lines)


def _doubled_lines(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    return "\n".join(lines[:at] + lines[at : at + draw.choice((1, 3))] * draw.choice((2, 2, 50)) + lines[at + 1 :])


def _indented(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    lines[at] = " " * draw.randrange(12) + lines[at].lstrip(" ")
    return "\n".join(lines)


def _another_word(draw: random.Random, text: str) -> str:
    spans = [match.span() for match in _WORD.finditer(text)]
    if not spans:
        return draw.choice(WORDS)
    a, b = draw.choice(spans)
    word = text[a:b]
    near = word[:1] + word[2:] if draw.random() < 0.3 else draw.choice(WORDS)
    return text[:a] + near + text[b:]


def _another_number(draw: random.Random, text: str) -> str:
    spans = [match.span() for match in re.finditer(r"[0-9][0-9.]*%?", text)]
    if not spans:
        return text
    a, b = draw.choice(spans)
    return text[:a] + draw.choice(NUMBERS) + text[b:]


def _deep(draw: random.Random, text: str) -> str:
    """Nesting in one of its forms, below and above each limit."""
    depth = draw.choice((5, 30, 60, 64, 65, 150, 400, 3000))
    names = [match.span() for match in re.finditer(r"\b[a-z_]+\b", text)]
    if not names:
        return text
    a, b = draw.choice(names)
    word = text[a:b]
    form = draw.randrange(6)
    if form == 0:
        return text[:a] + "(" * depth + word + ")" * depth + text[b:]
    if form == 1:
        return text[:a] + "-" * depth + word + text[b:]
    if form == 2:
        return text[:a] + f"{word} + " * depth + word + text[b:]
    if form == 3:
        return text[:a] + "exp(" * depth + word + ")" * depth + text[b:]
    if form == 4:
        return "policy d():\n" + "".join(" " * (i + 1) + f"layers {i}:\n" for i in range(depth)) + text
    chain = "".join(f"    score s{i} = s{i - 1} + s{i - 1}\n" for i in range(1, depth))
    return f"policy d():\n    score s0 = norm(k)\n{chain}    keep top(4) by s{depth - 1}\n    at step\n"


def _chained(draw: random.Random, text: str) -> str:
    """Definitions that name each other: parameters, policies, picks, head classes."""
    n = draw.choice((3, 30, 300))
    form = draw.randrange(4)
    if form == 0:
        params = ", ".join(["p0=1", *(f"p{i}=p{i - 1} + p{i - 1}" for i in range(1, n))])
        return f"policy d({params}):\n    keep sink(p{n - 1})\n    at step\n"
    if form == 1:
        return "policy p0():\n    keep all\n" + "".join(f"policy p{i}() extends p{i - 1}\n" for i in range(1, n)) + text
    if form == 2:
        picks = "".join(f"    pick t{i} = t{(i + draw.choice((1, 2))) % n} | sink(4)\n" for i in range(n))
        return f"policy d():\n{picks}    keep t0\n    at step\n"
    heads = "".join(f"heads h{i} = h{i + 1}\n" for i in range(n))
    return f'{heads}heads h{n} = table("f")\npolicy d():\n    h0: keep all\n    rest: keep sink(4)\n    at step\n'


def _spliced(draw: random.Random, text: str) -> str:
    other = draw.choice(TEXTS)
    return text[: draw.randrange(len(text) + 1)] + other[draw.randrange(len(other) + 1) :]


_FAULTS = (
    *(_cut, _truncated, _odd, _swapped_words, _swapped_lines, _doubled_lines, _indented),
    *(_another_word, _another_word, _another_number, _deep, _chained, _spliced),
)


def _megabyte(draw: random.Random, text: str) -> str:
    piece = draw.choice(
        ("x", " ", "9", "(", "#", "sink(4) | ", "-", '"', "norm(k) + ", "\t", "\u2603", "keep all\n    ")
    )
    at = draw.randrange(len(text) + 1)
    size = draw.choice((MEGABYTE - len(text) - 100, MEGABYTE, MEGABYTE // 4)) // len(piece.encode())
    return text[:at] + piece * size + text[at:]


# ---------------------------------------------------------------- what comes out


def outcome(text: str) -> str:
    """What the language says of a text, in a word. Raises whatever else comes out than findings, and AssertionError
    for a finding that breaks its promises."""
    try:
        loaded = load(text + "\n")
    except PolicyError as error:
        _promises(error.diagnostics)
        return error.diagnostics[0].code
    try:
        resolved = resolve(loaded)
        found = check(resolved)
        _promises(found)
        if not any(diagnostic.severity == "error" for diagnostic in found):
            lower(resolved)
            return "fine"
        return next(diagnostic.code for diagnostic in found if diagnostic.severity == "error")
    except PolicyError as error:
        _promises(error.diagnostics)
        return error.diagnostics[0].code


def laid_out(text: str) -> None:
    """Laying out a text that parses gives a text that stays as it is; what keeps the meaning is asserted inside."""
    try:
        once = format_text(text)
    except PolicyError:
        return
    assert format_text(once) == once


def _promises(found: tuple[Diagnostic, ...]) -> None:
    assert found is not None
    for diagnostic in found[:50]:
        assert diagnostic.line >= 1 and diagnostic.column >= 1
        assert 0 <= diagnostic.span.start <= diagnostic.span.end <= len(diagnostic.span.source.text)
        assert diagnostic.message and len(str(diagnostic)) < 2000
        assert diagnostic.hint or diagnostic.severity == "note", f"{diagnostic.code} without a hint: {diagnostic}"


def attempt(breaches: dict[str, str], number: int, text: str, what: Callable[[str], str | None]) -> str | None:
    """Do it; what should never come out is held in `breaches`, one of each kind."""
    try:
        return what(text)
    except Exception as error:
        kind = f"{type(error).__name__}: {str(error)[:26]}"
        breaches.setdefault(kind, f"{number}: {traceback.format_exc()[-1500:]}\n{text[:2000]!r}")
        return None


def run(count: int, seed: int) -> dict[str, Any]:
    """Draw and try `count` texts."""
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    breaches: dict[str, str] = {}
    slowest = (0.0, "")
    lower(resolve(load("snapkv")))  # builds the grammar
    for number in range(count):
        text = mutant(draw)
        began = time.process_time()
        said = attempt(breaches, number, text, outcome)
        outcomes[str(said)] += 1
        slowest = max(slowest, (time.process_time() - began, f"{number}: {text[:300]!r}"))
        if number % 4 == 0 and len(text) < 20_000:
            attempt(breaches, number, text, laid_out)
    if slowest[0] > SECONDS:
        breaches["slow"] = f"{slowest[0]:.2f} s: {slowest[1]}"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    kinds = list(breaches.items())[:40]
    return {
        "outcomes": dict(outcomes),
        "breaches": dict(kinds),
        "seconds": slowest[0],
        "slowest": slowest[1],
        "mb": memory,
    }


if __name__ == "__main__":
    # A runaway allocation is a MemoryError here, and no trouble for the machine.
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
