"""Saved caches as files that nobody vouches for: damage, sizes and contents that no cache has are refused whole."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import kvcompile
from kvcompile import sealed
from kvcompile.saving import HEAD
from tests.driving import call, examples, padded
from tests.models import random_model, tokens


@pytest.fixture(scope="module")
def model():
    return kvcompile.optimize(random_model("llama64"), "snapkv", compile="off", budget=10, observe=4, pool=3)


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    """The bytes of a saved cache of two sequences."""
    path = tmp_path_factory.mktemp("saved") / "cache"
    ids, mask = padded([tokens(31, seed=1), tokens(19, seed=2)], "left")
    kvcompile.save_cache(model, call(model, ids, mask=mask)[1], path)
    return path.read_bytes()


@pytest.fixture
def saved(content, tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(content)
    return path


def refused(model, path, *words):
    with pytest.raises(kvcompile.KvCompileError) as found:
        kvcompile.load_cache(model, path)
    for word in (*words, str(path)):
        assert word in str(found.value), f"{word!r} is not in: {found.value}"


# -- damage -----------------------------------------------------------------------------------------------------------


@examples(120)
@given(data=st.data())
def test_no_change_of_bytes_is_ever_loaded(data, model, content, tmp_path_factory):
    """Flips, cuts, insertions and swaps, half of them in the header."""
    header = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
    more = data.draw(st.binary(min_size=1, max_size=40))
    n = len(more)
    changed = data.draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + more + content[at + n :],
                content[:at] + more + content[at:],
                content[:at] + content[at + n :],
                content[:at] + bytes([content[at] ^ 1 << more[0] % 8]) + content[at + 1 :],
                content + more,
            ]
        )
    )
    path = tmp_path_factory.mktemp("fuzzed") / "cache"
    path.write_bytes(changed)
    if changed == content:
        kvcompile.load_cache(model, path)
    else:
        refused(model, path)


def test_a_flipped_bit_is_told_as_damage_wherever_it_is(model, saved, content):
    for at in (content.index(b"snapkv"), len(content) - 1, content.index(b'"batch') + 9, content.index(b"sha256") + 12):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refused(model, saved, "not those that were written")


def test_sizes_that_no_machine_has_are_refused_before_any_memory_is_taken(model, content, saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("memory was taken before the header was checked")

    monkeypatch.setattr(torch, "empty", forbidden)
    saved.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    refused(model, saved)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["layers.0.k"] = {"dtype": "F32", "shape": [1 << 36, 40], "data_offsets": [0, 160 << 36]}
    words = json.dumps(header).encode()
    saved.write_bytes(len(words).to_bytes(8, "little") + words + content[8 + length :])
    refused(model, saved)
    os.truncate(saved, 10 << 40)  # sparse: 10 TB that are not there
    refused(model, saved, "memory")


# -- contents that are wrong under a digest that is right -------------------------------------------------------------


def rewritten(path, head=None, **tensors):
    """The file with other contents and a seal that is right: what somebody may write on purpose."""
    there = load_file(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[HEAD])
    for name, change in tensors.items():
        name = name.replace("_", ".", 2) if name.startswith("layers") else name
        there[name] = change(there.get(name))
    if head is not None:
        head(told)
    parts = [sealed.Part(k, v.dtype, tuple(v.shape), lambda v=v: v) for k, v in there.items() if v is not None]
    sealed.put(path, {HEAD: json.dumps(told)}, parts)


def put_in(at, value):
    def change(tensor):
        tensor.view(-1)[at] = value
        return tensor

    return change


def in_head(*keys, value):
    def change(head):
        for key in keys[:-1]:
            head = head[key]
        head[keys[-1]] = value

    return change


def moved(length):
    """Lengths of the same sum, one of them below zero."""
    flat = length.view(-1)
    flat[1] += flat[0] + 3
    flat[0] = -3
    return length


LIES = {
    "positions not unique": {"layers_1_pos": lambda t: put_in(1, t[0])(t)},
    "a position not seen": {"layers_1_pos": put_in(2, 4000)},
    "an entry without position": {"layers_0_pos": put_in(0, -1)},
    "a position far below": {"layers_0_pos": put_in(0, -(1 << 31))},
    "NaN for positions": {"layers_0_pos": lambda t: t.float() * float("nan")},
    "NaN in keys": {"layers_2_k": put_in(7, float("nan"))},
    "NaN in values": {"layers_2_v": put_in(7, float("nan"))},
    "lengths out of range": {"length": put_in(0, 1 << 20)},
    "a negative length": {"length": moved},
    "marks": {"layers_0_frozen": put_in(0, 2)},
    "an account below zero": {"area": put_in(0, -1)},
    "a missing tensor": {"layers_1_k": lambda t: None},
    "a tensor more": {"extra": lambda t: torch.zeros(2)},
    "a tensor of another shape": {"ring": lambda t: t[..., :1].contiguous()},
    "entries that are missing": {"layers_0_v": lambda t: t[1:]},
    "no sequences": {"head": in_head("sequences", value=[])},
    "a batch of none": {"head": in_head("batch", value=0)},
    "a batch of many": {"head": in_head("batch", value=1 << 40)},
    "a batch that is no number": {"head": in_head("batch", value="2")},
    "columns": {"head": in_head("columns", value=-1)},
    "seen that is true": {"head": in_head("sequences", 0, "seen", value=True)},
    "seen less than held": {"head": in_head("sequences", 0, "seen", value=3)},
    "a prompt longer than seen": {"head": in_head("sequences", 0, "prompt", value=1000)},
    "a class that is not there": {"head": in_head("sequences", 0, "since", value=[[9, 1]])},
    "a table that is none": {"head": in_head("sequences", 0, "judged", value=7)},
    "a unit that is not there": {"head": in_head("sequences", 0, "judged", value=[[0, "page", 1]])},
    "a share that is not there": {"head": in_head("sequences", 0, "shares", value=[[0, [1, 2, 3]]])},
    "a field more": {"head": in_head("sequences", 0, "more", value=1)},
    "tokens": {"head": in_head("tokens", value=[1])},
    "the format": {"head": in_head("format", value=99)},
}


@pytest.mark.parametrize("lie", LIES)
def test_contents_that_no_cache_has_are_refused_though_the_digest_is_right(lie, model, saved):
    rewritten(saved, **LIES[lie])
    refused(model, saved)


def test_the_rewriting_itself_is_no_reason_to_refuse(model, saved):
    before = kvcompile.load_cache(model, saved).positions(1, 1)
    rewritten(saved)
    assert [p.tolist() for p in kvcompile.load_cache(model, saved).positions(1, 1)] == [p.tolist() for p in before]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("n", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_whatever_the_description_says_it_is_loaded_or_refused(n, model, content, tmp_path_factory):
    @examples(n)
    @given(data=st.data())
    def drawn(data):
        path = tmp_path_factory.mktemp("drawn") / "cache"
        path.write_bytes(content)

        def change(head):
            place = head
            while True:
                key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
                if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                    place[key] = data.draw(JSON)
                    return
                place = place[key]

        rewritten(path, head=change)
        try:
            kvcompile.load_cache(model, path)
        except kvcompile.KvCompileError as error:
            assert str(path) in str(error)

    drawn()


# -- what kernels count on --------------------------------------------------------------------------------------------

UNITS = """policy by_pages():
    unit page(4) with lo = min[i] k, hi = max[i] k
    attend newest page | top(2) pages by sum[d] max(q * lo, q * hi) per query_head
    at chunk, step
"""
WINDOW = UNITS.replace("    attend", "    keep sink(2) | recent(12)\n    at chunk, step\n    attend")


def all_seen(head, n):
    head["columns"] = n
    for seq in head["sequences"]:
        seq |= {"seen": n, "prompt": n}


@pytest.mark.parametrize("text", [UNITS, WINDOW], ids=["all kept", "some kept"])
@pytest.mark.parametrize(
    "lie",
    [
        {"head": lambda head: all_seen(head, (1 << 31) - 1)},
        {"layers_1_pos": lambda t: t.flip(0), "layers_1_k": lambda t: t.flip(0).contiguous()},
    ],
    ids=["a text of 2^31 tokens", "another order"],
)
def test_rows_that_kernels_would_look_for_in_vain_are_refused(lie, text, tmp_path):
    """Entries are found by position, landmarks lie by position: neither may lead out of what is there."""
    model = kvcompile.optimize(random_model(), text, backend="cpu", compile="off")
    kvcompile.save_cache(model, call(model, torch.tensor([tokens(20)]))[1], tmp_path / "cache")
    rewritten(tmp_path / "cache")
    kvcompile.load_cache(model, tmp_path / "cache")
    rewritten(tmp_path / "cache", **lie)
    refused(model, tmp_path / "cache", "contradicts itself")


def test_a_row_that_drops_nothing_holds_all_that_was_seen(tmp_path):
    model = kvcompile.optimize(random_model(), UNITS, backend="cpu", compile="off")
    kvcompile.save_cache(model, call(model, torch.tensor([tokens(20)]))[1], tmp_path / "cache")
    rewritten(tmp_path / "cache", head=lambda head: all_seen(head, 400))
    refused(model, tmp_path / "cache", "do not hold what the policy leaves")


@pytest.mark.parametrize(
    "spans",
    [
        {"segments": [], "reads": {}, "positions": [[0, (1 << 31) - 1]]},
        {"segments": [["a", 0, (1 << 31) - 1]], "reads": {}, "positions": None},
        {"segments": [5], "reads": {}, "positions": None},
        {"segments": [["a", 0, 4]], "reads": {"a": [["a"]]}, "positions": None},
    ],
    ids=["many positions", "a long stretch", "no stretch", "no name"],
)
def test_spans_cost_no_more_than_they_say(spans):
    with pytest.raises(kvcompile.KvCompileError):
        kvcompile.Spans.from_json(spans, (1 << 31) - 1)
