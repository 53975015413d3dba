"""Tunes the kernels that ship, for the GPU at hand: `kvcompile tune` over policies and sizes, best worth first.

    python benchmarks/gpu/tune.py [--effort full] [--seconds 540] [--into kernels/tuned] [--list]

Each job is one `kvcompile tune` in a process of its own, with the shape of Llama-3.1-8B in bfloat16, and files what it
found when it ends: an interrupted run loses the job in flight. With `--effort full` all jobs come quickly first and
then in full, which replaces what was found. Jobs that no time is left for are named, none is silent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
# (policy, sequences, entries of a row): a neighbour of up to two doublings is served by the same choice.
JOBS = (
    ("keep_all", 16, 32768),
    ("h2o", 16, 8192),
    ("keep_all", 1, 8192),
    ("snapkv", 1, 8192),
    ("tova", 16, 8192),
    ("streaming", 16, 8192),
)


def main() -> int:
    """The exit status: 1 where a job failed; one that no time was left for is none."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--effort", choices=["none", "quick", "full"], default="full")
    asked.add_argument("--seconds", type=float, default=540.0, help="for all jobs together")
    asked.add_argument("--into", type=Path, default=ROOT / "kernels" / "tuned", help="folder of the JSON")
    asked.add_argument("--gpu", help="with --effort none: a GPU that need not be here")
    asked.add_argument("--list", action="store_true", help="print the jobs and run none")
    given = asked.parse_args()
    end, failed = time.monotonic() + given.seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        efforts = ("quick", "full") if given.effort == "full" else (given.effort,)
        for effort, (policy, batch, tokens) in product(efforts, JOBS):
            says = f"{policy}, {batch} x {tokens}, {effort}"
            left = end - time.monotonic()
            if given.list or left < 5:
                print(says if given.list else f"not tuned, the time was up: {says}", flush=True)
                continue
            options = ["--effort", effort, "--batch", str(batch), "--tokens", str(tokens)]
            options += ["--gpu", given.gpu] if given.gpu else []
            print(f"tuning {says}", flush=True)
            failed += not _tuned([policy, "--model", folder, *options], given.into, left)
    return 1 if failed else 0


def _tuned(arguments: list[str], into: Path, seconds: float) -> bool:
    """Whether the job ended well; one that was cut off files nothing and counts as no failure."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"KVC_TUNED": str(into), "PYTHONPATH": path}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvcompile", "tune", *arguments], env=environment, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        print("cut off, the time was up", flush=True)
        return True
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
