"""Faults: NaN is reported with its layer; threads are right or refused; a forward that fails leaves no half cache."""

import threading
from dataclasses import dataclass

import pytest
import torch

import kvcompile
from kvcompile import guard, health
from kvcompile.kernels.ranks import sharded
from tests.driving import BACKENDS, call, drive, kept, one_by_one, padded, same
from tests.models import random_model, tokens

NAN = float("nan")
POLICIES = {
    "keep_all": {},
    "snapkv": {"budget": 10, "observe": 4, "pool": 3},
    "h2o": {"heavy": "20% of prompt", "local": "5% of prompt"},
    "streaming": {"n_sink": 1, "window": 3},
    "tova": {"budget": 6},
}


def ready(name, backend="cpu", compile="off", model=None, **changes):
    options = POLICIES[name] | changes
    return kvcompile.optimize(model or random_model("llama64"), name, backend=backend, compile=compile, **options)


def spoil(weight, *place):
    with torch.no_grad():
        weight[place] = NAN


def refused(*words):
    return pytest.raises(kvcompile.KvCompileError, match=".*".join(words))


# -- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "compile"), [*((name, "off") for name in POLICIES), ("snapkv", "eager")])
def test_nan_in_a_layers_keys_or_values_is_reported_with_its_layer(name, compile):
    for layer, part, what in ((1, "k_proj", "keys"), (2, "v_proj", "values")):
        model = random_model("llama64")
        spoil(getattr(model.model.layers[layer].self_attn, part).weight, 70, 5)  # a channel of KV head 1
        ready(name, compile=compile, model=model)
        with refused(f"{what} of layer {layer} ", "sequence 0, KV head 1, position 0"):
            drive(model, tokens(30, seed=1))


@pytest.mark.parametrize("name", POLICIES)
def test_one_token_with_nan_is_found_where_it_stands_though_the_policy_drops_it(name):
    """Its key and value lose in every selection; a second prompt comes behind entries that are sound."""
    model = random_model("llama64")
    spoil(model.model.embed_tokens.weight, 77)
    ready(name, model=model)
    sound, bad = ([t for t in tokens(30, seed=s) if t != 77] for s in (1, 2))
    bad[7] = 77
    ids, mask = padded([sound, bad], "left")
    with refused("layer 0 ", "sequence 1, KV head 0, position 7"):
        call(model, ids, mask=mask)
    _, cache = call(model, torch.tensor([sound]))
    with refused("layer 0 ", f"sequence 0, KV head 0, position {len(sound) + 7}"):
        call(model, torch.tensor([bad]), cache)


@pytest.mark.parametrize("name", POLICIES)
def test_nan_that_comes_with_a_step_is_reported(name):
    model = ready(name)
    _, cache = call(model, torch.tensor([tokens(20, seed=1)]))
    spoil(model.model.layers[1].self_attn.k_proj.weight, 3, 5)
    with refused("keys of layer 1 ", "position 20"):
        call(model, torch.tensor([[9]]), cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_which_no_key_has_part_passes_and_is_looked_into_once(backend, monkeypatch):
    model = random_model("llama64")
    spoil(model.lm_head.weight, 77)
    ready("h2o", backend, model=model)
    looks = []
    plain = health._resident
    monkeypatch.setattr(health, "_resident", lambda cache: looks.append(1) or plain(cache))
    found, cache = call(model, torch.tensor([tokens(20, seed=1)]))
    assert bool(found.logits[..., 77].isnan().all())
    for token in (3, 4, 5):
        call(model, torch.tensor([[token]]), cache)
    assert len(looks) == 1


def test_logits_of_both_infinities_are_no_nan():
    model = ready("keep_all")
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
        model.lm_head.weight[6] = -float("inf")
        model.lm_head.weight[5:7, 1:] = 0
    prompt = tokens(12, seed=1)
    found = drive(model, prompt, [7])
    assert not any(bool(one.logits[..., :5].isnan().any()) for one in found)


@dataclass
class Two:
    """Of two processes this one, and what the other one says."""

    rank: int
    other: list[int]
    world: int = 2

    def exchange(self, tensor, members):
        shape = torch.tensor([len(self.other)])
        said = [tensor, shape if len(tensor) == 1 else torch.tensor(self.other)]
        return said if self.rank == 0 else said[::-1]


def test_processes_that_divide_the_heads_all_name_the_first_place_of_all():
    cache = call(ready("keep_all"), torch.tensor([tokens(9, seed=1)]))[1]
    here, there = health.Place(2, 0, 0, 5, 0), health.Place(1, 0, 1, 3, 2)
    whole = cache.plan
    for mine, other, first in (
        (here, there, there),
        (here, health.NOWHERE, here._replace(head=1)),  # the only one of the second process, the model's second
        (health.NOWHERE, there, there),
        (health.NOWHERE, health.NOWHERE, health.NOWHERE),
    ):
        cache.plan = sharded(whole, Two(1, list(other)), "two processes of a test", 0)
        assert health._earliest(cache, mine) == first


# -- forwards that fail -----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def failing(model, layer):
    def stop(*args):
        raise Stop("a hook")

    return model.model.layers[layer].register_forward_hook(stop)


@pytest.mark.parametrize("name", ["keep_all", "snapkv", "h2o"])
@pytest.mark.parametrize("turn", [[5], tokens(9, seed=3)], ids=["step", "prompt"])
def test_a_forward_that_fails_in_its_layers_closes_the_cache_with_the_reason(name, turn):
    model = ready(name)
    _, cache = call(model, torch.tensor([tokens(20, seed=1)]))
    hook = failing(model, 1)
    with pytest.raises(Stop):
        call(model, torch.tensor([turn]), cache)
    hook.remove()
    with refused("half way", "Stop: a hook"):
        call(model, torch.tensor([[5]]), cache)
    with refused("half way"):
        model.generate(torch.tensor([tokens(22, seed=1)]), past_key_values=cache, max_new_tokens=2)
    assert drive(model, tokens(20, seed=1))  # a new one is not concerned


@pytest.mark.parametrize("name", ["keep_all", "snapkv", "h2o"])
def test_a_call_that_fails_before_any_layer_leaves_the_cache_as_it_was(name, monkeypatch):
    """No room in the pools, positions of one's own, no token at all; then the same call again."""
    turns = [tokens(20, seed=1), tokens(9, seed=2), [5]]
    truth = drive(ready(name), *turns)
    model = ready(name)
    _, cache = call(model, torch.tensor([turns[0]]))
    with monkeypatch.context() as patched:
        patched.setattr("kvcompile.forward.reserve_prefill", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(model, torch.tensor([turns[1]]), cache)
    with refused("positions"):
        model(input_ids=torch.tensor([[3]]), position_ids=torch.tensor([[7]]), past_key_values=cache)
    with refused("no token"):
        model(input_ids=torch.zeros(1, 0, dtype=torch.long), past_key_values=cache)
    for turn, expected in zip(turns[1:], truth[1:], strict=True):
        found, cache = call(model, torch.tensor([turn]), cache)
        assert found.kept == expected.kept
        same(found.logits, expected.logits, f"{len(turn)} tokens after the failure")


def test_a_batch_whose_steps_ran_before_its_prompts_failed_is_closed():
    """Some sequences step and others read a prompt: half of the call is done when the second forward fails."""
    model = ready("keep_all")
    ids, mask = padded([tokens(9, seed=1), tokens(6, seed=2)], "left")
    _, cache = call(model, ids, mask=mask)
    ids, more = padded([[5], tokens(4, seed=3)], "left")

    def stop(module, args):
        if args[0].shape[1] > 1:
            raise Stop("a hook")

    hook = model.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        call(model, ids, cache, torch.cat([mask, more], 1))
    hook.remove()
    with refused("half way", "Stop: a hook"):
        call(model, torch.tensor([[5], [6]]), cache)


def test_a_failed_cache_is_not_saved(tmp_path):
    model = ready("streaming")
    _, cache = call(model, torch.tensor([tokens(20, seed=1)]))
    hook = failing(model, 2)
    with pytest.raises(Stop):
        call(model, torch.tensor([[5]]), cache)
    hook.remove()
    with refused("half way"):
        kvcompile.save_cache(model, cache, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


# -- threads ----------------------------------------------------------------------------------------------------------


def together(*jobs):
    """Runs the jobs in threads that start at one time; gives their results, or what they raised."""
    start, out = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(i, job):
        start.wait()
        try:
            out[i] = job()
        except BaseException as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return out


def answer(model, seed):
    """Tokens and kept positions of a prompt of its own, answered by generate()."""
    made = model.generate(
        torch.tensor([tokens(20 + seed, seed=seed)]), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    return made.sequences.tolist(), kept(made.past_key_values, 3)


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        ("snapkv", "off"),
        ("h2o", "off"),
        pytest.param("h2o", "eager", marks=pytest.mark.slow),
        pytest.param("keep_all", "eager", marks=pytest.mark.slow),
    ],
)
def test_two_threads_that_generate_get_what_each_gets_alone(name, compile):
    model = ready(name, compile=compile)
    alone = [answer(model, seed) for seed in range(8)]
    found = together(
        lambda: [answer(model, seed) for seed in range(0, 8, 2)],
        lambda: [answer(model, seed) for seed in range(1, 8, 2)],
    )
    assert found == [alone[::2], alone[1::2]]
    assert kvcompile.report(model).to_dict()["evictions"] >= 0


def test_two_models_in_two_threads_do_not_touch_each_other():
    models = [ready("h2o"), ready("snapkv")]
    alone = [[answer(model, seed) for seed in range(5)] for model in models]
    assert together(*(lambda m=m: [answer(m, seed) for seed in range(5)] for m in models)) == alone


@pytest.mark.slow
def test_four_threads_on_two_models_of_different_policies_many_times():
    models = [ready("h2o"), ready("snapkv", "reference")]
    alone = [[answer(model, seed) for seed in range(12)] for model in models]
    for _ in range(5):
        jobs = [lambda m=models[i % 2], odd=i // 2: [answer(m, seed) for seed in range(odd, 12, 2)] for i in range(4)]
        assert together(*jobs) == [alone[i % 2][i // 2 :: 2] for i in range(4)]


def test_a_second_thread_on_one_cache_is_refused_by_name_and_the_first_is_right():
    model = ready("h2o")
    prompt = tokens(20, seed=1)
    truth = drive(model, prompt, *one_by_one([5, 6]))
    _, cache = call(model, torch.tensor([prompt]))
    inside, done = threading.Event(), threading.Event()

    def wait(*args):
        inside.set()
        assert done.wait(60)

    hook = model.model.layers[1].register_forward_hook(wait)

    def second():
        assert inside.wait(60)
        try:
            return call(model, torch.tensor([[9]]), cache)
        finally:
            hook.remove()
            done.set()

    first, second_found = together(lambda: call(model, torch.tensor([[5]]), cache), second)
    assert "in use by another thread" in str(second_found)
    assert first[0].kept == truth[1].kept
    assert call(model, torch.tensor([[6]]), cache)[0].kept == truth[2].kept


def test_a_cache_is_held_between_the_forwards_of_a_generate_too(tmp_path):
    """The second thread comes while the first one samples; saving would read a moving cache."""
    model = ready("streaming")
    first = model.generate(
        torch.tensor([tokens(12, seed=1)]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    cache, found = first.past_key_values, []

    def between(ids, scores, **kwargs):
        tries = (
            lambda: call(model, torch.tensor([[9]]), cache),
            lambda: kvcompile.save_cache(model, cache, tmp_path / "cache"),
        )
        found.extend(together(*tries))
        return torch.zeros(len(ids), dtype=torch.bool)

    text = torch.tensor([first.sequences[0].tolist() + tokens(3, seed=2)])
    model.generate(text, past_key_values=cache, max_new_tokens=2, do_sample=False, stopping_criteria=[between])
    assert len(found) == 4
    assert all(isinstance(e, kvcompile.KvCompileError) and "another thread" in str(e) for e in found)
    assert cache.get_seq_length() == 12 + 2 + 3 + 2 - 1


@pytest.mark.parametrize("change", ["restore", "optimize", "use"])
def test_a_model_is_not_changed_while_it_generates(change, monkeypatch):
    """Refused in the thread that asks for it, and in generate()'s own; the answer is not concerned."""
    monkeypatch.setattr(guard, "GRACE", 0.05)
    model = ready("h2o")
    alone, found = answer(model, 3), []

    def alter():
        if change == "restore":
            return kvcompile.restore(model)
        if change == "optimize":
            return kvcompile.optimize(model, "keep_all", compile="off")
        with kvcompile.use(model, "keep_all", compile="off"):
            return None

    def between(ids, scores, **kwargs):
        found.extend(together(alter))
        with refused("in this thread"):
            alter()
        return torch.zeros(len(ids), dtype=torch.bool)

    made = model.generate(
        torch.tensor([tokens(23, seed=3)]), max_new_tokens=6, do_sample=False, stopping_criteria=[between]
    )
    assert made.tolist() == alone[0]
    assert len(found) == 6
    assert all("in another thread" in str(error) for error in found)
    kvcompile.restore(model)
    assert "forward" not in vars(model)


def test_a_restore_waits_for_a_generate_that_is_about_to_return(monkeypatch):
    model = ready("keep_all")
    inside = threading.Event()

    def slow(ids, scores, **kwargs):
        inside.set()
        threading.Event().wait(0.05)
        return torch.ones(len(ids), dtype=torch.bool)

    def run():
        return model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, stopping_criteria=[slow])

    monkeypatch.setattr(guard, "GRACE", 30.0)
    made, restored = together(run, lambda: inside.wait(60) and kvcompile.restore(model))
    assert made.shape == (1, 3)
    assert restored is model
