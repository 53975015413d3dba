"""What `explain` says of reads: entries of a step, landmarks, lengths, bytes, the ceiling; of layers that are off."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from kvcompile.passes.explain import Explanation, explain

TINY = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=64, head_dim=8,
                   intermediate_size=64, vocab_size=32)  # fmt: skip
PAGE = "unit page(4) with c = mean[i] k"
BY_PAGE = "top({n}) pages by dot(q, c) per query_head"


def config(**changes: object) -> SimpleNamespace:
    base = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64,
            "model_type": "llama", "dtype": "float32"}  # fmt: skip
    return SimpleNamespace(**(base | changes))


def explained(*lines: str, prompt: int = 64, generate: int = 0, **options: Any) -> Explanation:
    text = "policy mine():\n" + "".join(f"    {line}\n" for line in lines)
    return explain(text, options.pop("config", config()), prompt=prompt, generate=generate, **options)


# ---------------------------------------------------------------- entries of a step, beside plain loops


def by_loops(seen: int, prompt: int, drawn: random.Random, sizes: dict[str, int]) -> int:
    """Entries that the newest query reads under regions and a choice of pages, whatever their scores."""
    now, page = seen - 1, 4
    read = {now}
    own = now // page
    for p in range(seen):
        far = own - p // page
        read |= {p} if p < sizes.get("sink", 0) or p > now - sizes.get("recent", 0) else set()
        read |= {p} if sizes.get("stride") and p % sizes["stride"] == 0 else set()
        read |= {p} if sizes.get("own") and far == 0 else set()
        read |= {p} if sizes.get("pow2") and far in (1, 2, 4, 8, 16, 32) else set()
    full = [u for u in range(seen // page + 1) if page * u + page - 1 < now]
    waiting = {p for p in range(seen) if p // page not in full}
    open_ = [u for u in full if not set(range(page * u, page * u + page)) <= read]
    drawn.shuffle(open_)
    read |= waiting | {p for u in open_[: sizes["n"]] for p in range(page * u, page * u + page)}
    return len(read)


@pytest.mark.parametrize("seed", range(40))
def test_a_step_reads_what_plain_loops_count(seed: int) -> None:
    drawn = random.Random(seed)
    sizes = {"n": drawn.randrange(1, 9)}
    for region in drawn.sample(["sink", "recent", "stride", "own", "pow2"], drawn.randrange(4)):
        sizes[region] = drawn.randrange(1, 20)
    regions = [f"{name}({sizes[name]})" for name in ("sink", "recent", "stride") if name in sizes]
    regions += [f"{name} page" for name in ("own", "pow2") if name in sizes]
    prompt, generate = drawn.randrange(1, 90), drawn.randrange(0, 12)
    found = explained(PAGE, "attend " + " | ".join([*regions, BY_PAGE.format(n=sizes["n"])]), "at chunk, step",
                      prompt=prompt, generate=generate)  # fmt: skip
    (read,) = found.reads
    counted = {by_loops(prompt + generate, prompt, drawn, sizes) for _ in range(8)}
    assert max(counted) <= read.entries <= prompt + generate
    if read.exact:
        assert counted == {read.entries}
    if set(sizes) <= {"n", "own", "pow2"}:  # whole units: nothing is left open in parts
        assert read.exact


@pytest.mark.parametrize(
    ("lines", "entries", "exact"),
    [
        (["attend sink(4) | recent(8)"], 12, True),
        (["attend recent(8)", "at step"], 8, True),
        (["attend sink(4)"], 5, True),  # and its own
        (["attend recent(8)", "at every(4)"], 9, True),  # step 9: one has come in since step 8
        (["attend recent(8)", "at every(16)"], 73, False),  # not yet
        (["attend recent(8)", "at chunk"], 17, True),  # the prompt's last query read 8; 9 steps since
        (["attend recent(8)", "at step if len > 9"], 73, False),
        (["attend sink(4) | random(6, 1)"], 11, False),
        (["attend top(10) by logit", "at step"], 11, False),  # its own may be one of them
        (["attend top(10) by logit | recent(1)", "at step"], 11, True),
        (["attend recent(1) | top(25%) by logit", "at step"], 19, True),
        (["attend recent(1) | cover(50%) by attn", "at step"], 73, False),
        (["pick t = top(6) by logit per query_head", "attend t", "at step"], 7, False),
        (["attend recent(4)", "at chunk", "attend sink(6)", "at step"], 7, True),
        ([PAGE, "attend recent(1) | where dot(q, c) > 0", "at step"], 73, False),
    ],
)
def test_a_step_after_64_tokens_and_9_steps(lines: list[str], entries: int, exact: bool) -> None:
    (read,) = explained(*lines, generate=9).reads
    assert (read.entries, read.exact, read.resident) == (entries, exact, 73)


@pytest.mark.parametrize(
    ("picks", "entries"),
    [
        ("top(2) pages by dot(q, c)", 13),  # 72 is in no page that is full, and is picked with the two
        ("top(2) by logit per page", 73),
    ],
)
def test_a_pick_by_units_takes_what_no_full_unit_holds(picks: str, entries: int) -> None:
    found = explained(PAGE, "layers 0: attend all", f"layers 0: pick t = {picks}", "attend t", "at step", generate=9)
    (read,) = (read for read in found.reads if read.name == "rest")
    assert (read.entries, read.exact) == (entries, False)


def test_what_keep_drops_is_not_read() -> None:
    found = explained("keep sink(4) | recent(20)", "at step", "attend recent(8) | top(50) by logit", "at step",
                      generate=4)  # fmt: skip
    (read,) = found.reads
    assert (read.entries, read.exact, read.resident, read.share) == (24, False, 24, 1.0)


def test_a_window_reads_no_more_than_it_leaves() -> None:
    sliding = config(model_type="mistral", sliding_window=16)
    (read,) = explained("attend sink(4) | recent(32)", config=sliding).reads
    assert read.entries <= 16


def test_classes_of_rows_are_told_apart() -> None:
    found = explained("layers 0: attend all", "layers 1: attend recent(4)", "attend recent(8)")
    assert {read.name: (read.heads, read.entries) for read in found.reads} == {"layers 1": (2, 4), "rest": (4, 8)}
    assert [read.attend for read in found.reads] == ["attend recent(4)", "attend recent(8)"]


# ---------------------------------------------------------------- bytes, lengths, the ceiling


def test_landmarks_count_as_bytes_and_are_read() -> None:
    plain = explained("keep all", prompt=256)
    found = explained(PAGE, "attend own page | " + BY_PAGE.format(n=4), "at step", prompt=256)
    (read,) = found.reads
    # 8 channels, float32, of every four entries but the last: its page is not full before the query that is in it.
    assert read.landmark_bytes * read.resident == 8 * 4 * 63
    assert found.bytes - plain.bytes >= 8 * 64 * 8 * 4  # KV heads, pages, channels
    assert found.bytes_peak - plain.bytes_peak == found.bytes - plain.bytes
    assert (found.footprint, found.peak) == (plain.footprint, plain.peak) == (1.0, 1.0)


def test_the_ceiling_is_about_what_is_read() -> None:
    heavy = config(num_hidden_layers=2)
    found = explained(PAGE, "attend own page | " + BY_PAGE.format(n=3), "at step", prompt=128, config=heavy)
    cache = 2 * 2 * 128 * 2 * 8 * 4
    read = 2 * 2 * (16 * 2 * 8 * 4 + 31 * 8 * 4)  # of 32 pages one is not full before the newest entry
    weights = found.plan.facts.weight_bytes
    assert found.ceiling == pytest.approx((weights + cache) / (weights + read))


@pytest.mark.parametrize(("then", "entries"), [("all", 64), ("sink(4) | recent(8)", 12)])
def test_what_prompts_alone_choose_by_is_not_read_in_steps(then: str, entries: int) -> None:
    lines = [PAGE, "attend own page | " + BY_PAGE.format(n=3), "at chunk", f"attend {then}", "at step"]
    (read,) = explained(*lines).reads
    assert (read.entries, read.exact, read.landmark_bytes) == (entries, True, 0)
    assert explained(*lines).ceiling >= 1.0


def test_the_length_from_which_less_than_all_is_read() -> None:
    (read,) = explained(PAGE, "attend own page | " + BY_PAGE.format(n=3), "at step").reads
    assert read.reads_less_from == 17  # four pages before its own
    (every,) = explained("attend sink(8) | recent(8)").reads
    assert every.reads_less_from == 17 and every.landmark_bytes == 0
    (none,) = explained("attend where attn > 0.1", "at step").reads
    assert (none.reads_less_from, none.pays_from, none.entries) == (None, None, 64)


def test_the_length_from_which_reading_less_pays_is_the_same_after_any_prompt() -> None:
    """Four query heads read up to 16 entries each, and landmarks are an eighth of all bytes: 64 / (7 / 8)."""
    lines = (PAGE, "attend own page | " + BY_PAGE.format(n=3), "at step")
    found = [explained(*lines, prompt=prompt).reads[0] for prompt in (8, 20, 64)]
    assert {(read.reads_less_from, read.pays_from) for read in found} == {(17, 73)}


def test_reads_are_told_in_words_and_as_plain_values() -> None:
    found = explained(PAGE, "layers 1..last: attend own page | " + BY_PAGE.format(n=3), "at step", generate=1)
    text = str(found)
    assert "reads       layers 1..last: 6 KV heads\n" in text
    assert "a decode step reads 13 of 65 entries (20.0%), by 7.877 bytes of landmarks for each resident one" in text
    assert "less than all is read of rows of 17 entries and more" in text
    assert "what is not read stays in memory: footprint and peak are those of `keep`" in text
    plain = found.to_dict()
    assert plain["reads"]["layers 1..last"]["entries"] == 13 and plain["off"] == []
    assert json.loads(json.dumps(plain)) == plain


def test_a_unit_that_no_text_fills_is_a_warning() -> None:
    lines = ["unit page(512) with c = mean[i] k", "attend own page | " + BY_PAGE.format(n=3), "at step"]
    (warning,) = [d for d in explained(*lines).diagnostics if d.severity == "warning"]
    assert (warning.code, warning.span.text) == ("K708", "unit page(512) with c = mean[i] k")
    assert "warning     no `page` of 512 tokens is full in a text of 64" in str(explained(*lines))
    assert not [d for d in explained(*lines, prompt=512).diagnostics if d.severity == "warning"]


# ---------------------------------------------------------------- layers that are off


def test_layers_that_are_off_hold_nothing_and_count_in_the_mean() -> None:
    found = explained("layers 1..2: off", generate=2)
    assert (found.footprint, found.peak, found.exact) == (0.5, 0.5, True)
    assert [layer.spent.footprint for layer in found.layers] == [1.0, 0.0, 0.0, 1.0]
    assert [layer.entries for layer in found.layers] == [132, 0, 0, 132]
    assert found.bytes_full == 4 * 2 * 66 * 2 * 8 * 4
    whole = explained("keep all", generate=2)
    assert found.bytes == whole.bytes // 2
    assert "off         layers 1..2: no attention runs and nothing is held" in str(found)
    assert found.to_dict()["off"] == [1, 2]
    assert found.to_dict()["by_layer"][1]["footprint_by_head"] == [0.0, 0.0]


def test_projections_of_layers_that_are_off_are_not_read() -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(TINY)
    found = explained("layers 1: off", prompt=1, config=model)
    attention = sum(p.nbytes for p in model.model.layers[1].self_attn.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    cache = 2 * 2 * 8 * 4
    assert found.ceiling == pytest.approx((weights + 4 * cache) / (weights - attention + 3 * cache))
