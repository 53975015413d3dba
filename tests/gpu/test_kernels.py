"""On a CUDA device: files of every template against their own references: dtypes, head sizes, groups, variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcompile.kernels.choose import prefill_spec, specs_for
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.kernels.render import load, render, write
from kvcompile.kernels.spec import KernelSpec
from kvcompile.passes import compile_policy

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

# Between them: decode with states and with scores, evict alone, shared and competing, pack, columns of all queries
# and of a window, keys, pool, select, prefill.
POLICIES: tuple[tuple[str, dict[str, object]], ...] = (
    ("h2o", {"heavy": 24, "local": 16}),
    ("tova", {"budget": 40}),
    ("adakv", {"budget": 40, "observe": 8}),
    ("knorm", {"budget": 40}),
    ("streaming", {"n_sink": 4, "window": 36}),
)
SHAPES = [(dtype, size, 4) for dtype in ("float32", "float16", "bfloat16") for size in (64, 96, 128, 256)]
SHAPES += [("bfloat16", 128, group) for group in (1, 2, 3, 8, 16)]
TEMPLATES = {"decode", "prefill", "evict", "pack", "columns", "keys", "pool", "select"}


def kernels(dtype: str, head_dim: int, group: int) -> Iterator[tuple[PolicyPlan, KernelSpec]]:
    """Each kernel of the policies once."""
    seen: set[str] = set()
    for policy, params in POLICIES:
        plan = compile_policy(policy, ModelFacts(2, 2 * group, 2, head_dim, dtype), **params).plan
        for spec in specs_for(plan):
            if spec.digest() not in seen:
                seen.add(spec.digest())
                yield plan, spec


def failing(plan: PolicyPlan, spec: KernelSpec, folder: Path) -> bool:
    path = write(render(spec, header_for(plan, spec)), folder / f"{spec.name}_{spec.digest()}.py")
    return bool(load(path).check())


@pytest.mark.parametrize(("dtype", "head_dim", "group"), SHAPES)
def test_every_template_is_its_reference(dtype: str, head_dim: int, group: int, tmp_path: Path) -> None:
    checked, wrong = set(), []
    for plan, spec in kernels(dtype, head_dim, group):
        checked.add(spec.template)
        if failing(plan, spec, tmp_path):
            wrong.append(spec.name)
    assert checked == TEMPLATES
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["softcap", "sinks", "sliding", "all"])
def test_variants_of_attention_are_their_reference(dtype: str, variant: str, tmp_path: Path) -> None:
    every = {"softcap": 30.0, "sinks": True, "windows": (64, 0)}
    names = {"softcap": ("softcap",), "sinks": ("sinks",), "sliding": ("windows",)}.get(variant, tuple(every))
    facts = replace(ModelFacts(2, 8, 2, 128, dtype), **{name: every[name] for name in names})
    plan = compile_policy("h2o", facts, heavy=24, local=16).plan
    specs = (*specs_for(plan), prefill_spec(plan, 128))
    assert [spec.name for spec in specs if failing(plan, spec, tmp_path)] == []
