"""Refactoring: the text of every kernel that a few library policies need is on record, for each target that has it.

A change of a template or of what fills it shows here. Where it is meant, look at the diff of a rendered file, then
write the record anew: `pytest tests/kernels/test_rendered_text.py --update-golden`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from kvcompile.kernels.choose import project_spec, specs_for
from kvcompile.kernels.choose_listed import listed_specs
from kvcompile.kernels.choose_reads import read_specs
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.kernels.render import Target, render
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.stages import Unprintable
from kvcompile.passes import compile_policy
from kvcompile.passes.slide import slide

# Reads have specs of their own: on Triton those of `choose_listed`, in C++ those of `choose_reads`.
READERS = {
    "triton": ("infllm_v2", "moba", "powerattention", "seerattention"),
    "cpp": ("infllm_v2", "moba", "powerattention", "quest"),
}
POLICIES = ("adakv", "h2o", "keep_all", "keydiff", "knorm", "lagkv", "prulong", "snapkv", "streaming", "tova")
FACTS = ModelFacts(2, 8, 2, 96, "bfloat16")
ROOT = Path(__file__).parents[2]
EVERY = replace(FACTS, softcap=50.0, windows=(256, 0), sinks=True)
ANEW = f"was meant, write the record anew: pytest {Path(__file__).relative_to(ROOT)} --update-golden"


def plans(place: Path, names: tuple[str, ...]) -> list[PolicyPlan]:
    """Policies on one model's shape; a table of heads is written into `place`."""
    table = place / "heads.tsv"
    table.write_text("0.9 0.1\n0.2 0.7\n")
    tables = {"prulong": {"retrieval": table}}
    deep = {"quest": replace(FACTS, layers=3)}  # it begins at layer 2
    return [compile_policy(name, deep.get(name, FACTS), tables=tables.get(name, {})).plan for name in names]


def specs(plan: PolicyPlan, target: Target) -> list[KernelSpec]:
    """What a policy needs, and what it needs beside that for a model with all variants of attention."""
    windows = EVERY.windows + (0,) * (plan.facts.layers - EVERY.layers)
    other = slide(replace(plan, facts=replace(EVERY, layers=plan.facts.layers, windows=windows)))
    of = listed_specs if target == "triton" else read_specs
    beside = [project_spec(plan)] if target == "cpp" else []
    return list(dict.fromkeys([*specs_for(plan), *specs_for(other, "fp16"), *of(plan), *of(other), *beside]))


def texts(target: Target, place: Path, names: tuple[str, ...]) -> dict[str, str]:
    """POLICY/KERNEL -> text, for all that the target has a form of."""
    found = {}
    for plan in plans(place, names):
        for spec in specs(plan, target):
            try:
                found[f"{plan.name}/{spec.name}"] = render(spec, header_for(plan, spec, target=target), target)
            except Unprintable:
                continue  # the target has no such kernel; its own tests hold the list
    return found


def digests(target: Target, place: Path, names: tuple[str, ...] = POLICIES) -> dict[str, str]:
    """POLICY/KERNEL -> 16 hexadecimal digits of its text."""
    rendered = sorted(texts(target, place, names).items())
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in rendered}


@pytest.mark.parametrize("target", get_args(Target))
def test_the_text_is_the_one_on_record(target: Target, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    made = digests(target, tmp_path, POLICIES + READERS[target])
    templates = {name.split("/")[1].split("_")[0] for name in made}
    assert templates >= {"decode", "evict", "columns", "keys", "pool", "select", "marks", "units", "spans", "blocks"}
    name = f"kernels/{target}.json"
    try:
        golden(name, json.dumps(made, indent=1) + "\n")
    except AssertionError:
        path = ROOT / "tests" / "golden" / name
        kept = json.loads(path.read_text()) if path.exists() else {}
        changed = sorted(key for key in made.keys() | kept.keys() if made.get(key) != kept.get(key))
        pytest.fail(f"the text of {len(changed)} kernels changed ({', '.join(changed[:5])}, ...); where that {ANEW}")


def test_two_processes_render_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.kernels.test_rendered_text import digests\n"
    code += "for target in ('triton', 'cpp'): print(digests(target, Path(sys.argv[1]), ('adakv', 'h2o')))"
    answers = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        answers.append(done.stdout)
    assert answers[0] == answers[1] and len(answers[0]) > 1000
