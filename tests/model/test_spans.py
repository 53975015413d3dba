"""Stretches of a prompt that read only some others, and positions of one's own.

The oracle is the untouched model with an explicit mask of queries and keys and the same position ids, a whole forward
for every token. Positions and masks of the published systems are written out by hand here.
"""

from __future__ import annotations

import itertools
import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvcompile
from kvcompile import KvCache, Spans
from kvcompile.api import optimized
from tests.driving import BACKENDS, examples, kept, padded, same
from tests.families import family_model, prompt
from tests.model.test_reads_bytes import within_the_plan
from tests.models import random_model, tokens
from tests.reading import some

READS = 'policy by_spans():\n    attend span("self") | span("sources")\n'
NAMED = 'policy by_names():\n    attend span("self") | span("sources") | span("task")\n'
PIECES = READS + "    at chunk(5), step\n"
TEXT = tokens(31, seed=4)
GRAPH = Spans(
    [("task", 0, 4), ("doc", 4, 11), ("doc", 11, 16), ("doc", 16, 24), ("question", 24, 29)],
    reads={"doc": ["task"], "question": ["task", "doc"]},
)
ITEMS = [("item", 4, 9), ("item", 9, 16), ("item", 16, 19)]
ALONE = {"prefix": [], "item": []}
# Of each library policy: what is said of a prompt of 29 tokens, and the oracle's graph, names and sinks that all read.
SYSTEMS = {
    "graph_kv": (GRAPH.side_by_side("doc"), GRAPH.reads, (), 0),
    "set_prompting": (Spans([("prefix", 0, 4), *ITEMS]).side_by_side("item"), ALONE, ("prefix",), 0),
    "parallel_contexts": (Spans([("prefix", 0, 4), *ITEMS], {"item": []}).side_by_side("item"), ALONE, (), 4),
}


def model_of(policy=READS, backend="cpu", compile="off"):
    return kvcompile.optimize(random_model(), policy, backend=backend, compile=compile)


def may_read(spans: Spans, n: int, always: tuple[str, ...] = (), sink: int = 0) -> list[list[bool]]:
    """Which query (line) reads which token, spelled out; always, sink: names and first tokens that all read."""
    of = {t: i for i, (_, start, stop) in enumerate(spans.segments) for t in range(start, stop)}
    names = {t: spans.segments[i][0] for t, i in of.items()}
    out = []
    for query in range(n):
        line = []
        for key in range(n):
            free = query not in of or names[query] not in spans.reads
            its = names.get(key)
            named = key < sink or its in always or (not free and its in spans.reads[names[query]])
            line.append(key <= query and (key == query or free or of.get(key) == of[query] or named))
        out.append(line)
    return out


def oracle(text: list[int], spans: Spans, places=None, always=(), sink=0) -> torch.Tensor:
    """Logits [n, vocabulary] of the untouched model under the mask, at these positions, what follows behind them."""
    model, n = random_model(attn_implementation="eager"), len(text)
    mask = torch.where(torch.tensor(may_read(spans, n, always, sink)), 0.0, torch.finfo(torch.float32).min)
    told = list(places or [])
    told += range(max(told, default=-1) + 1, max(told, default=-1) + 1 + n - len(told))
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([text]), attention_mask=mask[None, None], position_ids=torch.tensor([told]),
            use_cache=False,
        ).logits[0]  # fmt: skip


def run(model, text: list[int], spans, prompt: int) -> torch.Tensor:
    """Logits [n, vocabulary] of a prompt and then of its other tokens, fed one by one."""
    out = model(torch.tensor([text[:prompt]]), spans=spans)
    parts = [out.logits[0]]
    for token in text[prompt:]:
        parts.append(model(torch.tensor([[token]]), past_key_values=out.past_key_values).logits[0])
    return torch.cat(parts)


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", [NAMED, PIECES], ids=["names", "pieces"])
def test_segments_read_themselves_and_their_sources(policy, backend):
    always = ("task",) if policy is NAMED else ()
    truth = oracle(TEXT, GRAPH, always=always)
    same(run(model_of(policy, backend), TEXT, GRAPH, 29), truth, "graph")
    assert (truth - oracle(TEXT, Spans())).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_p1_systems_equal_dense_attention_under_their_mask(name, backend):
    spans, reads, always, sink = SYSTEMS[name]
    truth = oracle(TEXT, Spans(spans.segments, reads), spans.positions, always, sink)
    same(run(model_of(name, backend), TEXT, spans, 29), truth, name)
    assert (truth - oracle(TEXT, Spans())).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_p2_a_batch_of_other_segments_is_what_each_is_alone(name, backend):
    model, (spans, *_) = model_of(name, backend), SYSTEMS[name]
    texts, each = [TEXT[:29], TEXT[2:14]], [spans, Spans([("item", 3, 7), ("item", 7, 12)]).side_by_side("item")]
    ids, mask = padded(texts, "left")
    out = model(ids, attention_mask=mask, spans=each)
    for b, (text, own) in enumerate(zip(texts, each, strict=True)):
        same(out.logits[b][mask[b].bool()], model(torch.tensor([text]), spans=own).logits[0], f"{name} {b}")


@pytest.mark.parametrize("name", SYSTEMS)
def test_p5_other_segments_need_no_other_graph(name):
    model = model_of(name, compile="eager")
    for seed, length in enumerate((31, 12, 40)):
        spans = Spans([("item", 0, 4), ("prefix", 4, length - 2), *[("item", length - 2, length)] * (seed == 1)])
        ids = torch.tensor([tokens(length, seed=seed)])
        model.generate(ids, max_new_tokens=5, do_sample=False, spans=spans)
    said = kvcompile.report(model).to_dict()
    assert said["graph_breaks"] == said["recompiles"] == 0


# Library policy and backend: one by default.
ONCE = pytest.mark.parametrize(("name", "backend"), some(SYSTEMS, ["set_prompting"]))


@ONCE
def test_p4_memory_with_segments_is_what_is_held_and_within_the_plan(name, backend):
    within_the_plan(random_model(), name, backend, tokens(200, seed=4), {}, spans=SYSTEMS[name][0])


@ONCE
def test_p6_the_footprint_of_segments_is_that_of_the_full_cache(name, backend):
    model = model_of(name, backend)
    run(model, TEXT, SYSTEMS[name][0], 29)
    said = kvcompile.report(model).to_dict()
    assert said["footprint"] == 1.0 and said["evictions"] == 0


@ONCE
def test_p7_segments_lose_no_entry_through_a_long_decode(name, backend):
    model = model_of(name, backend)
    cache = model(torch.tensor([TEXT[:29]]), spans=SYSTEMS[name][0]).past_key_values
    for n, token in enumerate(tokens(36, seed=8), start=30):
        model(torch.tensor([[token]]), past_key_values=cache)
        assert all(head == tuple(range(n)) for layer in kept(cache, 3) for head in layer), f"{n} tokens"


@ONCE
def test_p8_one_segment_of_the_whole_prompt_generates_the_tokens_of_the_untouched_model(name, backend):
    ids = torch.tensor([tokens(29, seed=5), tokens(29, seed=6)])
    greedy = {"do_sample": False, "max_new_tokens": 12}
    spans = Spans([("item", 0, 29)], {"item": []})
    found = model_of(name, backend).generate(ids, spans=[spans, spans], **greedy)
    assert found.tolist() == random_model().generate(ids, **greedy).tolist()


@st.composite
def drawn(draw):
    """Spans of a prompt of 24 tokens: some stretches with gaps, names that may repeat, a graph that goes backwards."""
    cuts = sorted(draw(st.sets(st.integers(0, 24), min_size=2, max_size=8)))
    pairs = list(itertools.pairwise(cuts))
    chosen = [pair for pair in pairs if draw(st.booleans())] or pairs[:1]
    names = [draw(st.sampled_from("abcd")) for _ in chosen]
    last = {name: i for i, name in enumerate(names)}
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    reads = {
        name: [other for other in sorted(set(names)) if first[other] <= last[name] and draw(st.booleans())]
        for name in sorted(set(names))
        if draw(st.booleans())
    }
    return Spans([(name, *pair) for name, pair in zip(names, chosen, strict=True)], reads)


@examples(12)
@given(drawn(), st.sampled_from([None, 3, 7]))
def test_any_graph_of_segments_equals_dense_attention_under_its_mask(spans, chunk):
    policy = READS if chunk is None else READS + f"    at chunk({chunk}), step\n"
    same(run(model_of(policy), TEXT[:28], spans, 24), oracle(TEXT[:28], spans), str(spans))


def test_tokens_outside_of_all_segments_read_all_and_are_read_by_default_alone():
    spans = Spans([("a", 3, 8), ("b", 8, 12)], reads={"b": []})
    same(run(model_of(), TEXT[:14], spans, 13), oracle(TEXT[:14], spans), "outside")
    mask = may_read(spans, 14)
    assert mask[5] == [True] * 6 + [False] * 8  # a: no graph for it, all before
    assert mask[10] == [False] * 8 + [True] * 3 + [False] * 3  # b: itself
    assert all(mask[13])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_batches_are_what_each_sequence_is_alone(backend):
    model = model_of(NAMED, backend)
    texts, each = (
        [TEXT[:29], TEXT[3:20], TEXT[5:14]],
        [GRAPH, Spans([("x", 2, 9), ("task", 9, 12)], {"task": []}), None],
    )
    for side in ("left", "right"):
        ids, mask = padded(texts, side)
        out = model(ids, attention_mask=mask, spans=each)
        cache = out.past_key_values
        step = model(torch.tensor([[5], [6], [7]]), past_key_values=cache).logits
        for b, (text, spans) in enumerate(zip(texts, each, strict=True)):
            truth = run(model, [*text, 5 + b], [spans], len(text))
            same(out.logits[b][mask[b].bool()], truth[:-1], f"{side} {b}")
            same(step[b], truth[-1:], f"{side} {b}")


def test_keep_and_attend_go_together():
    text = READS.replace("    attend", "    keep sink(2) | recent(4)\n    at prefill.end\n    attend")
    cache = model_of(text)(torch.tensor([TEXT[:29]]), spans=GRAPH).past_key_values
    assert [p.tolist() for p in cache.positions(0)] == [[0, 1, 25, 26, 27, 28]] * 2


# -- positions -------------------------------------------------------------------------------------------------------


def test_neighbours_begin_alike_and_the_rest_follows_the_longest():
    spans = GRAPH.side_by_side("doc")
    assert spans.positions == (*range(4), *range(4, 11), *range(4, 9), *range(4, 12), *range(12, 17))
    apart = Spans([("a", 1, 3), ("b", 4, 6), ("a", 6, 9)]).side_by_side("a", "b")
    assert apart.positions == (0, 1, 2, 3, 4, 5, 4, 5, 6)
    assert apart.places(8, 3) == [6, 7, 8]
    assert Spans([("a", 0, 4), ("b", 4, 6)]).side_by_side("a", "b").places(5, 3) == [1, 4, 5]


@pytest.mark.parametrize("policy", ["keep_all", READS])
def test_positions_are_the_models_and_order_stays_the_caches(policy):
    spans = GRAPH.side_by_side("doc")
    if policy == "keep_all":
        spans = Spans(positions=spans.positions)
    model = model_of(policy)
    same(run(model, TEXT, spans, 29), oracle(TEXT, spans, list(spans.positions)), "positions")
    cache = model(torch.tensor([TEXT[:29]]), spans=spans).past_key_values
    assert cache.positions(0)[0].tolist() == list(range(29))


def test_pieces_of_a_prompt_stand_where_the_whole_would():
    spans = GRAPH.side_by_side("doc")
    same(run(model_of(PIECES), TEXT, spans, 29), run(model_of(READS), TEXT, spans, 29), "pieces")


def test_learned_positions_are_told_as_rotary_ones_are():
    text, places = prompt(12), [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8]
    plain = family_model("opt")
    with torch.no_grad():
        truth = plain(torch.tensor([text]), position_ids=torch.tensor([places])).logits[0]
    model = kvcompile.optimize(family_model("opt"), "keep_all", backend="cpu", compile="off")
    same(model(torch.tensor([text]), spans=Spans(positions=places)).logits[0], truth, "learned positions")


def test_set_based_prompting_does_not_depend_on_the_order_of_the_set():
    task, items, tail = TEXT[:4], [TEXT[4:9], TEXT[9:16], TEXT[16:19]], TEXT[19:25]
    model, seen = model_of(), []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        text, segments = list(task), [("task", 0, 4)]
        for i in order:
            segments.append(("item", len(text), len(text) + len(items[i])))
            text += items[i]
        spans = Spans(segments, reads={"item": ["task"]}).side_by_side("item")
        seen.append(run(model, [*text, *tail, 8, 9], spans, len(text) + len(tail))[len(text) :])
    for other in seen[1:]:
        assert (other - seen[0]).abs().max() <= 1e-5 * seen[0].abs().max()
    plain = [run(model_of("keep_all"), [*task, *items[i], *items[j], *tail], None, 20)[-1] for i, j in ((0, 1), (1, 0))]
    assert (plain[0] - plain[1]).abs().max() > 0.1


# -- generate(), turns, moved caches ---------------------------------------------------------------------------------


def test_generate_takes_spans_and_repeats_them_for_several_answers():
    model, spans = model_of(), GRAPH.side_by_side("doc")
    ids = torch.tensor([TEXT[:29]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, num_beams=3,
        num_return_sequences=2, spans=spans,
    )  # fmt: skip
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, spans=[spans])
    text = list(TEXT[:29])
    for _ in range(5):
        text.append(int(oracle(text, spans, list(spans.positions))[-1].argmax()))
    assert greedy[0].tolist() == text
    assert out.shape[0] == 2 and out[:, :29].tolist() == [TEXT[:29]] * 2
    with pytest.raises(kvcompile.KvCompileError, match="came without"):
        model.generate(ids, max_new_tokens=2, do_sample=False)  # what was said is not said again


def test_later_turns_belong_to_no_segment():
    model, text = model_of(), [*TEXT[:29], *tokens(6, seed=9)]
    cache = model(torch.tensor([TEXT[:29]]), spans=GRAPH).past_key_values
    turn = model(torch.tensor([text[29:]]), past_key_values=cache).logits[0]
    same(turn, oracle(text, GRAPH)[29:], "second turn")
    with pytest.raises(kvcompile.KvCompileError, match="has seen 35 tokens already"):
        model(torch.tensor([[5]]), past_key_values=cache, spans=GRAPH)


def test_caches_that_are_moved_saved_and_cut_keep_their_segments(tmp_path):
    model, spans = model_of(), GRAPH.side_by_side("doc")
    ids, mask = padded([TEXT[:29], TEXT[:12]], "left")
    cache = model(ids, attention_mask=mask, spans=[spans, None]).past_key_values
    two = KvCache.join([cache, cache])
    two.select([2, 1])
    kvcompile.save_cache(model, two, tmp_path / "saved")
    back = kvcompile.load_cache(model, tmp_path / "saved")
    assert [s.spans for s in back.sequences.each] == [spans, None]
    turn = torch.tensor([[7, 8, 9], [7, 8, 9]])
    truth = model(turn, past_key_values=cache).logits
    for other in (two, back):
        same(model(turn, past_key_values=other.clone()).logits, truth, "moved")
    back.select([0])
    back.crop(20)
    cut = Spans((*spans.segments[:3], ("doc", 16, 20)), {"doc": ["task"]}, spans.positions[:20])
    fresh = model(torch.tensor([TEXT[:20]]), spans=cut).past_key_values
    same(
        model(torch.tensor([TEXT[:6]]), past_key_values=back).logits,
        model(torch.tensor([TEXT[:6]]), past_key_values=fresh).logits, "cropped",
    )  # fmt: skip
    back.reset()
    with pytest.raises(kvcompile.KvCompileError, match="came without"):
        model(torch.tensor([[5, 6]]), past_key_values=back)


# -- refusals --------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: Spans([("a", 0, 5), ("b", 4, 8)]), "stretches 'a' and 'b' overlap: the first ends at token 5"),
    (lambda: Spans([("a", 3, 3)]), "stretch 'a' goes from token 3 to 3"),
    (lambda: Spans([("a", -1, 3)]), "from token -1 to 3"),
    (lambda: Spans([("self", 0, 3)]), "no stretch can be called 'self'"),
    (lambda: Spans([("", 0, 3)]), "1 to 100 characters"),
    (lambda: Spans([("a", 0)]), "is \\(name, start, stop\\)"),
    (lambda: Spans("abc"), "must be a list, not str"),
    (lambda: Spans([("a", i, i + 1) for i in range(1025)]), "1025 stretches"),
    (lambda: Spans([("a", 0, 5)], reads={"b": []}), "names 'b', which no stretch is called; there are 'a'"),
    (lambda: Spans([("a", 0, 5)], reads={"a": ["z"]}), "names 'z'"),
    (lambda: Spans([("a", 0, 5), ("b", 5, 8)], reads={"a": ["b"]}), "'a' .* is to read 'b', which comes later"),
    (lambda: Spans([("a", 0, 5), ("b", 5, 8)], reads={"a": ["b"], "b": ["a"]}), "'a' .* is to read 'b'"),
    (lambda: Spans(positions=[0, -1]), "whole numbers from 0, not -1"),
    (lambda: Spans(positions=[0.5]), "whole numbers from 0, not 0.5"),
    (lambda: GRAPH.side_by_side("z"), "no stretch is called 'z'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD)
def test_spans_that_contradict_themselves_are_refused(make, message):
    with pytest.raises(kvcompile.KvCompileError, match=message):
        make()


def test_names_in_a_circle_are_fine_as_long_as_something_earlier_is_read():
    spans = Spans([("ask", 0, 4), ("say", 4, 8), ("ask", 8, 12)], reads={"ask": ["say"], "say": ["ask"]})
    same(run(model_of(), TEXT[:14], spans, 12), oracle(TEXT[:14], spans), "circle")


@pytest.mark.parametrize(
    ("policy", "spans", "message"),
    [
        (READS, Spans([("a", 0, 40)]), "stretch 'a' of sequence 0 reaches token 40, and its prompt has 31"),
        (READS, Spans(positions=range(40)), "a list of positions of sequence 0 reaches token 40"),
        (READS, [GRAPH, GRAPH], "there are 2 for 1 sequences"),
        (READS, "abc", "must be a list, not str"),
        (READS, [3], "int is none"),
        ("keep_all", GRAPH, "keep_all has no span"),
        ("streaming_compact", Spans(positions=range(5)), "turns keys by itself"),
    ],
)
def test_spans_that_do_not_fit_are_refused_before_anything_runs(policy, spans, message):
    model = model_of(policy)
    with pytest.raises(kvcompile.KvCompileError, match=message):
        model(torch.tensor([TEXT]), spans=spans)


def test_a_policy_with_spans_run_without_them_says_what_to_give():
    for feed in (model_of(), lambda ids: model_of().generate(ids, max_new_tokens=2)):
        with pytest.raises(kvcompile.KvCompileError, match=r"span\('self'\), span\('sources'\).*came without"):
            feed(torch.tensor([TEXT]))


def test_what_does_not_go_with_spans_is_refused():
    model, ids = model_of(), torch.tensor([TEXT])
    for options, message in (({"prompt_lookup_num_tokens": 3}, "assisted"), ({"prefill_chunk_size": 4}, "chunk")):
        with pytest.raises(kvcompile.KvCompileError, match=message):
            model.generate(ids, max_new_tokens=3, spans=GRAPH, **options)


def test_damaged_spans_in_a_file_are_refused():
    good = json.loads(json.dumps(GRAPH.side_by_side("doc").to_json()))
    assert Spans.from_json(good, 29) == GRAPH.side_by_side("doc")
    for change in (
        {"segments": 3}, {"segments": [["a", 0]]}, {"segments": [["a", 0, 99]]}, {"reads": []}, {"reads": {"a": 3}},
        {"positions": [[0, 1 << 40]]}, {"positions": [[0, 30]]}, {"positions": [[-1, 3]]}, {"positions": [3]},
    ):  # fmt: skip
        with pytest.raises(kvcompile.KvCompileError):
            Spans.from_json({**good, **change}, 29)
    with pytest.raises(kvcompile.KvCompileError):
        Spans.from_json({"segments": []}, 29)


def test_tables_of_segments_are_counted_where_a_policy_asks_for_them():
    with_table = model_of()(torch.tensor([TEXT]), spans=GRAPH).past_key_values.store
    without = model_of("keep_all")(torch.tensor([TEXT])).past_key_values.store
    assert with_table.beside_bytes - without.beside_bytes == 64 * 4 + 2 * 8 * 8
    assert optimized(model_of("keep_all")).compiled.plan.reads == ()


def test_a_cut_leaves_out_what_then_stands_behind_its_reader():
    """Of two stretches `a` the second reads `b` before it; the first alone has nothing to read."""
    spans = Spans([("a", 0, 5), ("b", 5, 9), ("a", 9, 14)], {"a": ["b"], "b": []})
    model = model_of()
    cache = model(torch.tensor([TEXT[:20]]), spans=spans).past_key_values
    cache.crop(9)
    assert cache.get_seq_length() == cache.sequences.each[0].seen == len(cache.positions(0)[0]) == 9
    fresh = model(torch.tensor([TEXT[:9]]), spans=Spans([("a", 0, 5), ("b", 5, 9)], {"a": [], "b": []})).past_key_values
    one, other = (model(torch.tensor([TEXT[20:21]]), past_key_values=c).logits for c in (cache, fresh))
    same(one, other, "after the cut")


def test_spans_of_another_threads_call_do_not_reach_a_cache_in_use():
    model = model_of()
    cache = model.forward.new_cache(1, torch.device("cpu"))
    refused = []

    def other():
        try:
            model(torch.tensor([TEXT[:29]]), past_key_values=cache, spans=GRAPH)
        except kvcompile.KvCompileError as error:
            refused.append(str(error))

    with cache.guard.held():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "in use by another thread" in refused[0]
    assert cache.sequences.each[0].spans is None


def test_explain_counts_which_stretches_read_which():
    sizes = [kvcompile.explain(text, random_model(), prompt=64).bytes for text in (READS, NAMED)]
    cache = model_of(NAMED)(torch.tensor([TEXT]), spans=[None]).past_key_values
    assert sizes[1] - sizes[0] == cache.store.links.nbytes // 3 == 16
