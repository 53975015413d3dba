"""Candidates and keys: the untuned config is among them, digests follow what matters, templates read every knob."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import pytest

from kvcompile.kernels.choose import decode_spec, evict_spec, select_spec, specs_for
from kvcompile.kernels.choose_listed import listed_specs
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.plan import PolicyPlan, Region, Selection
from kvcompile.kernels.render import render
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning_space import (
    KNOBS,
    TEMPLATES,
    UNITS,
    _texts,
    default,
    facts_digest,
    kernel_digest,
    space,
    space_digest,
    tile_bytes,
    with_config,
)
from tests.kernels.test_render import adakv, h2o
from tests.kernels.triton_interpreted.plans import ACC, H2O, PREFILL_END, STEP, plan
from tests.kernels.triton_interpreted.read_plans import moba, power


def every() -> list[tuple[PolicyPlan, KernelSpec]]:
    policies = (h2o(), adakv(), plan((Region("sink", 0),), dtype="float16", head_dim=256))
    found = [(policy, spec) for policy in policies for spec in specs_for(policy)]
    return found + [(policy, spec) for policy in (moba(), power()) for spec in listed_specs(policy)]


@pytest.mark.parametrize(("policy", "spec"), every(), ids=lambda value: getattr(value, "name", ""))
def test_a_space_holds_the_untuned_config_and_no_two_alike(policy: PolicyPlan, spec: KernelSpec) -> None:
    found = space(spec)
    assert default(spec) in found and len(set(found)) == len(found) > 1
    assert found == space(spec)
    assert with_config(spec, default(spec)) is spec
    for config in (found[0], found[-1]):
        text = render(with_config(spec, config), header_for(policy, with_config(spec, config)))
        for name, value in config:
            if name != "units":
                assert re.search(rf"\b{value}\b", text), name


@pytest.mark.parametrize("template", KNOBS)
def test_templates_read_their_knobs(template: str) -> None:
    text = "".join(_texts(f"{template}.py.jinja", set()))
    for name in KNOBS[template]:
        assert (
            (f"f.{name} " in text) if name != "units" else (f"UNITS_PER_SM = {UNITS} " in text and "target or" in text)
        )


def test_a_variant_has_a_name_and_a_digest_of_its_own() -> None:
    spec = decode_spec(h2o())
    other = with_config(spec, tuple(sorted((dict(default(spec)) | {"warps": 8}).items())))
    assert other.digest() != spec.digest() and other.name.startswith(f"{spec.name}_") and other.number("warps") == 8
    assert facts_digest(other) == facts_digest(spec)
    runtime = with_config(spec, tuple(sorted((dict(default(spec)) | {"units": 1}).items())))
    assert runtime is spec, "work units are an argument of the launch, no text"


def test_tiles_that_fit_no_multiprocessor_are_no_candidates() -> None:
    spec = decode_spec(plan((Region("all"),), head_dim=256))
    sizes = [tile_bytes(spec, dict(config)) for config in space(spec)]
    assert max(sizes) <= 192 * 1024 < 128 * 2 * 256 * 4 * 3  # 128 entries, three stages under way
    assert tile_bytes(decode_spec(h2o()), {"block_n": 64, "stages": 3}) == 2 * 64 * 2 * 128 * 2


def test_the_spec_digest_leaves_run_time_numbers_out_and_keeps_the_rest() -> None:
    base = evict_spec(h2o(), 0)

    def changed(**facts: int | str | bool) -> str:
        return facts_digest(replace(base, facts=tuple(sorted((dict(base.facts) | facts).items()))))

    assert changed(warps=8) == changed(count=0) == changed(state_names="other") == facts_digest(base)
    assert changed(fraction="1/2", count=-1) == changed(fraction="1/4", count=-1) != facts_digest(base)
    assert changed(head_dim=64) != facts_digest(base) != changed(scope="across")
    assert changed(floor="1/5") == changed(floor="1/3") != facts_digest(base)
    assert facts_digest(decode_spec(h2o())) != facts_digest(decode_spec(h2o(dtype="float16")))


def test_equal_budgets_of_other_sizes_share_a_key() -> None:
    def winners(part: Fraction) -> KernelSpec:
        policy = plan((Selection("top", ACC, None, part),), (H2O,), triggers=(PREFILL_END, STEP))
        return select_spec(policy, 0, policy.classes[0].selections[0])

    assert facts_digest(winners(Fraction(1, 4))) == facts_digest(winners(Fraction(1, 2)))


def test_a_space_digest_follows_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = decode_spec(h2o())
    before = space_digest(spec)
    assert before == space_digest(with_config(spec, default(spec)))
    monkeypatch.setitem(KNOBS, "decode", KNOBS["decode"] | {"warps": (4, 8)})
    assert space_digest(spec) != before


def test_a_kernel_digest_follows_the_template_and_its_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from pathlib import Path
    from shutil import copytree

    from kvcompile.kernels import tuning_space

    place = copytree(TEMPLATES, Path(str(tmp_path)) / "templates")
    before = {template: kernel_digest(template) for template in KNOBS}
    assert len(set(before.values())) == len(before)
    monkeypatch.setattr(tuning_space, "TEMPLATES", place)
    assert {template: kernel_digest(template) for template in KNOBS} == before
    for name, users in (
        ("_choose.py.jinja", {"evict", "select", "units", "chosen"}),
        ("_count.py.jinja", {"decode", "spans", "prefill", "blocks", "units", "chosen"}),  # a macro that is imported
    ):
        part, kept = place / name, (place / name).read_text()
        part.write_text(kept + "\n# another version\n")
        assert {template for template in KNOBS if kernel_digest(template) != before[template]} == users
        part.write_text(kept)
