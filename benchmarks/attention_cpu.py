"""One attention layer on a CPU, kernel against kernel: decode, ragged rows, scores, prefill with local heads, eviction.

    python benchmarks/attention_cpu.py [--only decode ragged ...] [--without FlexAttention ...] [--rounds N]

All contestants of a comparison run in this process and take turns; what compiles does so before. Between two calls a
buffer larger than the caches is written. Writes benchmarks/results/attention_cpu.json, .md and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from _common import machine, versions
from _turns import Claim, Contestant, Section, Sweep, judge, race

RESULTS = Path(__file__).parent / "results"
Q_HEADS, KV_HEADS, WIDTH = 32, 8, 128
GROUP = Q_HEADS // KV_HEADS
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes in tokens; `sweep` in MiB. `rounds` and `calls` of decode; prefills take `slow_rounds` of one call."""

    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    prompt: int = 8192
    sink: int = 128
    window: int = 1024
    rounds: int = 7
    calls: int = 5
    slow_rounds: int = 3
    threads: int = 2
    sweep: int = 64
    backend: str = "cpu"


def entries(n: int, dtype: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """q [1, Q_HEADS, 1, WIDTH], k and v [KV_HEADS, n, WIDTH]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, Q_HEADS, 1, WIDTH), (KV_HEADS, n, WIDTH), (KV_HEADS, n, WIDTH))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def decode_peers(q: Any, k: Any, v: Any) -> list[Contestant]:
    """What torch offers for one query a head on uniform rows, and the traffic that none of them can go without."""
    import torch
    import torch.nn.functional as F
    from _flex import flex

    rows = k.shape[0]
    packed = q.view(rows, 1, GROUP, WIDTH), k[:, None], v[:, None]
    plain = q, k[None], v[None]
    heads = q.view(1, rows, GROUP, WIDTH), *plain[1:]
    words = [t.view(torch.float32).view(-1) for t in (k, v)]
    there = [torch.empty_like(t) for t in (k, v)]
    read = 2 * k.numel() * k.element_size()
    one, grouped = flex(), flex()

    def flat(out: Any) -> Any:
        return out.reshape(-1)

    attention = {
        "packed SDPA": lambda: F.scaled_dot_product_attention(*packed),
        "SDPA enable_gqa": lambda: F.scaled_dot_product_attention(*plain, enable_gqa=True),
        "FlexAttention packed": lambda: one(*heads),
        "FlexAttention enable_gqa": lambda: grouped(*plain, enable_gqa=True),
    }
    return [
        *(Contestant(name, run, bytes=read, like="packed SDPA", view=flat) for name, run in attention.items()),
        Contestant("read", lambda: [w.sum() for w in words], bytes=read, view=nothing_of),
        Contestant("copy", lambda: [a.copy_(b) for a, b in zip(there, (k, v), strict=True)], bytes=2 * read,
                   view=nothing_of),
    ]  # fmt: skip


def nothing_of(_: object) -> None:
    """The view of a result that is compared with no other."""


def stepping(name: str, rows: Any, q: Any, like: str | None) -> Contestant:
    """Our decode op on these rows."""
    return Contestant(
        name, lambda: rows.step(q), rows.shorten, rows.entry_bytes, like, lambda out: out.reshape(-1).clone()
    )


def decode(setting: Setting) -> Iterator[Section]:
    """One query a head at several lengths."""
    import torch
    from _rows import Rows

    for name in DTYPES:
        for n in setting.lengths:
            q, k, v = entries(n, getattr(torch, name))
            ours = stepping("kvcompile", Rows("keep_all", list(k), list(v), GROUP, setting.backend), q, "packed SDPA")
            claims = (Claim("kvcompile", "packed SDPA", 0.65),) if n == max(setting.lengths) else ()
            facts = {"dtype": name, "entries": n}
            yield Section(
                "decode",
                f"Decode, {name}, {n} entries a row",
                facts,
                "packed SDPA",
                [ours, *decode_peers(q, k, v)],
                claims,
            )


def ragged(setting: Setting) -> Iterator[Section]:
    """Rows from a sixteenth of the mean length to almost twice it, against rows of equal length and as many bytes."""
    import torch
    import torch.nn.functional as F
    from _rows import Rows

    n = max(setting.lengths)
    low, high = n // 16, 2 * n - n // 16
    lengths = [low + (high - low) * i // (KV_HEADS - 1) for i in range(KV_HEADS)]
    lengths[-1] += n * KV_HEADS - sum(lengths)
    for name in DTYPES:
        q, k, v = entries(n, getattr(torch, name))
        keys, values = (list(t.reshape(-1, WIDTH).split(lengths)) for t in (k, v))
        alone = list(q.view(KV_HEADS, 1, 1, GROUP, WIDTH))

        def loop(alone: Any = alone, keys: Any = keys, values: Any = values) -> Any:
            parts = zip(alone, keys, values, strict=True)
            return torch.cat([F.scaled_dot_product_attention(a, b[None, None], c[None, None]) for a, b, c in parts])

        loops = Contestant(
            "packed SDPA, row by row", loop, bytes=2 * k.numel() * k.element_size(), view=lambda out: out.reshape(-1)
        )
        uneven = Rows("keep_all", keys, values, GROUP, setting.backend)
        even = Rows("keep_all", list(k), list(v), GROUP, setting.backend)
        contestants = [
            stepping("kvcompile ragged", uneven, q, loops.name), stepping("kvcompile uniform", even, q, None), loops,
        ]  # fmt: skip
        title = f"Decode of ragged rows, {name}, {min(lengths)} to {max(lengths)} entries, mean {n}"
        claims = (Claim("kvcompile ragged", "kvcompile uniform", 1.15),)
        yield Section(
            "ragged", title, {"dtype": name, "entries": n, "lengths": lengths}, "kvcompile uniform", contestants, claims
        )


def scores(setting: Setting) -> Iterator[Section]:
    """Decode that also adds each entry's mean probability to its accumulated score (h2o), against decode without."""
    import torch
    from _rows import Rows

    n = max(setting.lengths)
    for name in DTYPES:
        q, k, v = entries(n, getattr(torch, name))
        summed = torch.zeros(KV_HEADS, n)

        def by_hand(q: Any = q, k: Any = k, v: Any = v, summed: Any = summed) -> Any:
            p = torch.softmax(q.view(KV_HEADS, GROUP, WIDTH) @ k.transpose(1, 2) * WIDTH**-0.5, -1, torch.float32)
            summed.add_(p.mean(1))
            return p.to(v.dtype) @ v

        matmuls = Contestant(
            "matmul, softmax, matmul, with scores", by_hand, bytes=2 * k.numel() * k.element_size(),
            view=lambda out: out.reshape(-1),
        )  # fmt: skip
        kinds = {"kvcompile with scores": "h2o", "kvcompile without": "keep_all"}
        ours = [
            stepping(title, Rows(policy, list(k), list(v), GROUP, setting.backend), q, matmuls.name)
            for title, policy in kinds.items()
        ]
        title = f"Decode with scores, {name}, {n} entries a row"
        yield Section("scores", title, {"dtype": name, "entries": n}, matmuls.name, [*ours, matmuls])


def prefill(setting: Setting) -> Iterator[Section]:
    """A causal prompt in which all, half or none of the KV heads read sink and window only."""
    import torch
    from _prefill_cases import contestants

    claims = (
        Claim("kvcompile, all local", "SDPA, dense causal", 0.40),
        Claim("kvcompile, half local", "SDPA, dense causal", 0.70),
    )
    sizes = (Q_HEADS, KV_HEADS, WIDTH)
    n, sink, window = setting.prompt, setting.sink, setting.window
    read = sum(min(i, window) + min(max(i - window, 0), sink) for i in range(1, n + 1))
    part = 2 * read / (n * (n + 1))
    for name in DTYPES:
        title = f"Prefill, {name}, {n} tokens, sink {sink}, window {window}: {part:.0%} of the causal pairs"
        parts = contestants(n, sink, window, sizes, getattr(torch, name))
        yield Section(
            "prefill", title, {"dtype": name, "tokens": n, "pairs": part}, claims[0].theirs, parts, claims, slow=True
        )


def evict(setting: Setting) -> Iterator[Section]:
    """From all entries to the newest and the best by score: ours in place, topk and gather into new memory."""
    import torch
    from _rows import Rows

    n = max(setting.lengths)
    for name in DTYPES:
        for part in (10, 50):
            q, k, v = entries(n, getattr(torch, name))
            kept, newest = n * (part - 5) // 100, n * 5 // 100
            rows = Rows("h2o", list(k), list(v), GROUP, setting.backend, heavy=kept, local=newest)
            rows.step(q)  # the newest entry is in its row, so a row's entries are those of k and v
            rows.keep()
            starts = rows.site.table[:, 0].tolist()
            by_row = torch.stack([rows.site.state[0, start : start + n] for start in starts])

            def topk(k: Any = k, v: Any = v, by_row: Any = by_row, kept: int = kept, newest: int = newest) -> Any:
                best = by_row[:, : n - newest].topk(kept, sorted=False).indices
                last = torch.arange(n - newest, n).expand(KV_HEADS, -1)
                index = torch.cat([best, last], 1)
                found = [t.gather(1, index[..., None].expand(-1, -1, WIDTH)) for t in (k, v)]
                return index, found

            peer = Contestant("topk + gather", topk, view=lambda out: out[0].sort().values.reshape(-1))
            ours = Contestant(
                "kvcompile, in place", rows.evict, rows.put_back, like=peer.name, view=lambda _, rows=rows: rows.left()
            )
            title = f"Eviction, {name}, {n} entries a row, {part} % kept"
            yield Section("evict", title, {"dtype": name, "entries": n, "percent": part}, peer.name, [ours, peer])


KINDS = {"decode": decode, "ragged": ragged, "scores": scores, "prefill": prefill, "evict": evict}


def measure(setting: Setting, kinds: list[str], without: list[str]) -> dict[str, Any]:
    """All sections, one after the other: rows, claims, machine and versions."""
    import torch
    from _flex import forget
    from _rows import kernels

    torch.set_num_threads(setting.threads)
    sections, sweep = [], Sweep(setting.sweep)
    for kind in kinds:
        for section in KINDS[kind](setting):
            running = [c for c in section.contestants if not any(c.name.startswith(name) for name in without)]
            rounds, calls = (setting.slow_rounds, 1) if section.slow else (setting.rounds, setting.calls)
            rows = race(running, rounds, calls, sweep)
            forget()
            claims = [judge(claim, rows) for claim in section.claims]
            found = {"kind": section.kind, "title": section.title, "base": section.base, **section.facts}
            sections.append({**found, "rows": rows, "claims": claims})
            for name, row in rows.items():
                said = f"{row['ms']:10.3f} ms" if "ms" in row else row["error"]
                print(f"{section.title}: {name:36s} {said}", file=sys.stderr)
    used = versions("torch", "kvcompile")
    said = {"setting": asdict(setting), "machine": machine(), "versions": used, "kernels": kernels(setting.backend)}
    return {**said, "sections": sections}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), default=list(KINDS), help="kinds of comparison")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contestants whose names begin so")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(Setting().lengths), help="entries of a row")
    for field in fields(Setting):
        if field.name != "lengths":
            default = field.default
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args(argv)
    if not args.lengths or min(args.lengths) < 32 or args.prompt < 32 or min(args.rounds, args.calls) < 1:
        parser.error("lengths and prompt are at least 32, rounds and calls at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    given = {field.name: getattr(args, field.name) for field in fields(Setting)}
    setting = Setting(**{**given, "lengths": tuple(args.lengths)})
    found = measure(setting, args.only, args.without)
    from _attention_page import page, plot

    args.out.mkdir(parents=True, exist_ok=True)
    json_file, picture, page_file = (args.out / f"attention_cpu.{suffix}" for suffix in ("json", "png", "md"))
    json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found, plot(found, picture))
    page_file.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
