"""What the kernels reach on a GPU, beside the copy of the same run, SDPA, FlexAttention and topk with gather.

    python benchmarks/gpu [--part NAME ...] [--quick] [--out benchmarks/results] [--seconds N] [--resume]
    python benchmarks/gpu --dry [--part NAME ...]     tries the code on the CPU at tiny sizes; its times are not filed
    python benchmarks/gpu --blank                     files the page of a machine without a GPU

Writes gpu.json, gpu.md and gpu.png after every row, so that an interrupted run loses the row in flight; parts that
are not asked for stay what they were. The sizes of --quick come first, over all parts; --resume goes on where a run on
the same machine ended. Rows are measured in a process of their own (`apart.py`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if "--dry" in sys.argv:  # Triton decides at import whether it interprets
    os.environ["TRITON_INTERPRET"] = "1"

import apart  # noqa: E402
import copying  # noqa: E402
import decoding  # noqa: E402
import evicting  # noqa: E402
import generating  # noqa: E402
import page  # noqa: E402
import prefilling  # noqa: E402
import reading  # noqa: E402
import torch  # noqa: E402
from measuring import Bench, Part, machine  # noqa: E402

LATER = "unmeasured: the time was up"
PARTS: tuple[Part, ...] = (
    copying.PART, decoding.PART, prefilling.PART, evicting.PART, generating.PART, reading.PAGED, reading.BLOCKED,
)  # fmt: skip


def main() -> int:
    """The exit status: 1 where a row of a dry run failed; results say what else did."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--part", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    asked.add_argument("--quick", action="store_true", help="fewer sizes")
    asked.add_argument("--dry", action="store_true", help="on the CPU, tiny, nothing is filed")
    asked.add_argument("--blank", action="store_true", help="file the page without figures")
    asked.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    asked.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    asked.add_argument("--row-seconds", type=float, default=180.0, help="a row that takes longer has failed")
    asked.add_argument("--resume", action="store_true", help="leave rows that are filed as measured")
    asked.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.blank:
        file(given.out, {"machine": None, "parts": {part.name: page.unmeasured(part) for part in PARTS}})
        return 0
    if not given.dry and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu: torch sees no CUDA device here; nothing was run (--dry tries the code on the CPU)")
    bench = Bench("dry" if given.dry else "quick" if given.quick else "full")
    if given.serve:
        known = {part.name: part for part in PARTS}
        apart.serve(lambda name, cell: row(bench, known[name], cell), cleared, sys.stdin)
        return 0
    wanted = [part for part in PARTS if not given.part or part.name in given.part]
    if given.dry:
        return dry(bench, wanted)
    results = before(given.out, machine(bench))
    for part in wanted:
        results["parts"][part.name] = fresh(
            part, bench.size, results["parts"].get(part.name, ()) if given.resume else ()
        )
    rows = apart.Apart([sys.executable, str(Path(__file__).parent), "--serve", *["--quick"] * given.quick])
    try:
        run(rows, wanted, results, given.out, time.monotonic() + given.seconds, given.row_seconds)
    finally:
        rows.end()
    return 0


def run(rows: apart.Apart, parts: list[Part], results: dict[str, Any], out: Path, until: float, limit: float) -> None:
    """Measure what is open, filing each row as it comes; none begins after `until`."""
    for part, entry in in_order(parts, results["parts"]):
        left = until - time.monotonic()
        if left > 0:
            entry["figures"], entry["status"] = rows.row(part.name, entry["cell"], min(left, limit))
            print(
                f"{part.name} {json.dumps(entry['cell'])}: {entry['status']} {json.dumps(entry['figures'])}", flush=True
            )
            file(out, results)
    file(out, results)


def in_order(parts: list[Part], entries: dict[str, Any]) -> list[tuple[Part, dict[str, Any]]]:
    """Rows that are open: of all parts those that a quick run has, too, then the others."""
    found = []
    for part in parts:
        quick = [sizes(cell) for cell in part.cells("quick")]
        found += [(sizes(entry["cell"]) not in quick, part, entry) for entry in entries[part.name]]
    some = [item for item in found if item[2]["status"] == LATER]
    return [(part, entry) for _, part, entry in sorted(some, key=lambda item: item[0])]


def sizes(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell without whom it runs against."""
    return {name: value for name, value in cell.items() if name != "flex"}


def fresh(part: Part, size: str, old: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A part's rows, those of `old` that were measured as they are."""
    done = [entry for entry in old if entry["status"] == "measured"]
    blank = [{"cell": cell, "figures": None, "status": LATER} for cell in part.cells(size)]
    return [next((entry for entry in done if entry["cell"] == new["cell"]), new) for new in blank]


def cleared() -> bool:
    """Give memory back after a row; whether the device is well."""
    gc.collect()  # models and caches hold each other
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return False
    return True


def dry(bench: Bench, parts: list[Part]) -> int:
    """Try the code; 1 where a row failed."""
    failed, results = 0, {"machine": machine(bench), "parts": {}}
    for part in parts:
        rows = results["parts"][part.name] = []
        for cell in part.cells(bench.size):
            figures, status = row(bench, part, cell)
            rows.append({"cell": cell, "figures": figures, "status": status})
            failed += status != "measured" or bool((figures or {}).get("notes"))
            print(f"{part.name} {json.dumps(cell)}: {status} {json.dumps(figures)}", flush=True)
    page.markdown(results, PARTS, None)
    print("dry run: nothing was measured, nothing was filed")
    return 1 if failed else 0


def row(bench: Bench, part: Part, cell: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Figures and status of one row; one that fails as a whole says why and costs no other."""
    try:
        return part.measure(bench, cell), "measured"
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        return None, f"failed: {type(error).__name__}: {text[:200]}"


def before(out: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Results that are filed already, if they are of this machine and these versions; else none."""
    path = out / "gpu.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if old.get("machine") == here:
        return {"machine": here, "parts": old["parts"]}
    return {"machine": here, "parts": {part.name: page.unmeasured(part) for part in PARTS}}


def file(out: Path, results: dict[str, Any]) -> None:
    """Write JSON, page and plot, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    results["claims"] = [claim.judged(page.flat(results["parts"])) for claim in page.CLAIMS]
    plotted = page.plot(results, out / "gpu.png")
    texts = {
        "gpu.json": json.dumps(results, indent=1),
        "gpu.md": page.markdown(results, PARTS, "gpu.png" if plotted else None),
    }
    for name, text in texts.items():
        partly = out / f"{name}.tmp"
        partly.write_text(text.rstrip() + "\n", encoding="utf-8")
        partly.replace(out / name)


if __name__ == "__main__":
    sys.exit(main())
