"""What the kernels reach on a GPU, beside the copy of the same run, SDPA, FlexAttention and topk with gather.

    python benchmarks/gpu [--part NAME ...] [--quick] [--out benchmarks/results] [--seconds N]
    python benchmarks/gpu --dry [--part NAME ...]     tries the code on the CPU at tiny sizes; its times are not filed
    python benchmarks/gpu --blank                     files the page of a machine without a GPU

Writes gpu.json, gpu.md and gpu.png after every row, so that an interrupted run loses the row in flight; parts that
are not asked for stay what they were.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if "--dry" in sys.argv:  # Triton decides at import whether it interprets
    os.environ["TRITON_INTERPRET"] = "1"

import copying  # noqa: E402
import decoding  # noqa: E402
import evicting  # noqa: E402
import generating  # noqa: E402
import page  # noqa: E402
import prefilling  # noqa: E402
import reading  # noqa: E402
import torch  # noqa: E402
from measuring import Bench, Part, machine  # noqa: E402

PARTS: tuple[Part, ...] = (
    copying.PART, decoding.PART, prefilling.PART, evicting.PART, generating.PART, reading.PAGED, reading.BLOCKED,
)  # fmt: skip


def main() -> int:
    """The exit status: 1 where a row of a dry run failed."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--part", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    asked.add_argument("--quick", action="store_true", help="fewer sizes")
    asked.add_argument("--dry", action="store_true", help="on the CPU, tiny, nothing is filed")
    asked.add_argument("--blank", action="store_true", help="file the page without figures")
    asked.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    asked.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    given = asked.parse_args()
    if given.blank:
        file(given.out, {"machine": None, "parts": {part.name: page.unmeasured(part) for part in PARTS}})
        return 0
    if not given.dry and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu: torch sees no CUDA device here; nothing was run (--dry tries the code on the CPU)")
    bench = Bench("dry" if given.dry else "quick" if given.quick else "full")
    wanted = [part for part in PARTS if not given.part or part.name in given.part]
    return run(bench, wanted, given.out, time.monotonic() + given.seconds)


def run(bench: Bench, parts: list[Part], out: Path, until: float) -> int:
    """Measure the parts, filing each row as it comes; a dry run prints what it would file."""
    here = machine(bench)
    results: dict[str, Any] = {"machine": here, "parts": {}} if bench.dry else before(out, here)
    failed = 0
    for part in parts:
        rows = results["parts"][part.name] = []
        for cell in part.cells(bench.size):
            if time.monotonic() > until:
                rows.append({"cell": cell, "figures": None, "status": "unmeasured: the time was up"})
                continue
            figures, status = row(bench, part, cell)
            rows.append({"cell": cell, "figures": figures, "status": status})
            failed += status != "measured" or bool((figures or {}).get("notes"))
            print(f"{part.name} {json.dumps(cell)}: {status} {json.dumps(figures)}", flush=True)
            if not bench.dry:
                gc.collect()  # models and caches hold each other
                torch.cuda.empty_cache()
                file(out, results)
        if not bench.dry:
            file(out, results)
    if bench.dry:
        page.markdown(results, PARTS, None)
        print("dry run: nothing was measured, nothing was filed")
    return 1 if bench.dry and failed else 0


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
