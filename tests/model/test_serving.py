"""Serving on one cache: sequences come and go for a long time, and nothing is lost, mixed up or kept for ever."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvcompile import KvCache
from kvcompile.api import optimized

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script as a run of it would."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


def on_pages(model: Any) -> Any:
    """The model with caches in pages, which the reference reads as well as extents."""
    optimized(model).forward.engine.paged = True
    return model


@pytest.mark.parametrize("pages", [False, True], ids=["extents", "pages"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_every_request_gets_the_tokens_that_it_gets_alone(load: Any, policy: str, pages: bool) -> None:
    serving, parts = load("serving"), load("_serving")
    model = serving.build_model(policy, "reference" if pages else "auto")
    server = parts.Server(on_pages(model) if pages else model, most=3)
    traffic = parts.Traffic(rate=0.3, prompt=20, answer=8, longest=60)
    requests, done, most = list(parts.arrivals(traffic, 40, seed=1)), [], 0
    for now in range(400):
        server.waiting += [r for r in requests if r.arrives == now]
        done += server.tick(now)
        most = max(most, len(server.running))
        assert server.cache is None or (server.cache.batch == len(server.running) and parts.conserved(server.cache))
    assert most == 3 and len(done) == len(requests) and server.cache is None
    assert 0 < sum(len(r.tokens) < r.wanted for r in done) < len(done), "some are cancelled, not all"
    alone = serving.build_model(policy, "reference")
    for request in done:
        assert parts.replay(alone, request)[0] is None


def test_a_wrong_token_and_a_slot_given_out_twice_are_seen(load: Any) -> None:
    serving, parts = load("serving"), load("_serving")
    model = serving.build_model("keep_all", "reference")
    server = parts.Server(on_pages(model), most=2)
    for number in range(2):
        server.waiting.append(parts.Request(number, [5 + number, 9, 30], 5, 0, None))
    for now in range(3):
        server.tick(now)
    assert parts.conserved(server.cache)
    request = server.running[0]
    request.tokens[1] = (request.tokens[1] + 1) % 256
    at, gap = parts.replay(model, request)
    assert at == 1 and gap > 0
    store = server.cache.store
    store.table[1, 0] = store.table[0, 0]
    assert not parts.conserved(server.cache)


def test_memory_that_grows_is_no_flat_memory(load: Any) -> None:
    drift = load("serving").drift
    assert drift([100] * 40) == 0
    assert drift([500, *range(100, 140)]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pages", [False, True], ids=["extents", "pages"])
def test_a_hundred_thousand_admissions_and_releases_leave_nothing_behind(load: Any, pages: bool) -> None:
    serving, parts = load("serving"), load("_serving")
    model = serving.build_model("snapkv", "reference")
    if pages:
        on_pages(model)
    torch.manual_seed(0)
    ready = [model(input_ids=torch.randint(3, 256, (1, n))).past_key_values for n in (1, 7, 60)]
    names = {id(cache): [p.tolist() for p in cache.positions(1)] for cache in ready}
    dice = random.Random(0)
    cache, inside = ready[0].clone(), [id(ready[0])]
    memory = 0
    for step in range(50_000):  # each lets one in and some go
        fresh = dice.choice(ready)
        cache, inside = KvCache.join([cache, fresh]), [*inside, id(fresh)]
        stay = [i for i in range(len(inside)) if dice.random() < 0.6] or [dice.randrange(len(inside))]
        cache.select(stay)
        inside = [inside[i] for i in stay]
        if step % 1000 == 0:
            memory = serving.resident() if step == 10_000 else memory
            assert parts.conserved(cache)
            for row, name in enumerate(inside):
                assert [p.tolist() for p in cache.positions(1, row)] == names[name]
    assert serving.resident() <= 1.02 * memory
    cache.select([0])
    least = cache.clone()
    assert cache.nbytes() == least.nbytes()
    assert cache.store.bytes_allocated() <= 64 * max(c.store.bytes_allocated() for c in ready)


@pytest.mark.slow
def test_two_hours_of_serving(load: Any, tmp_path: Path) -> None:
    serving = load("serving")
    assert serving.main(["--out", str(tmp_path)]) == 0
    assert "holds" in (tmp_path / "serving.md").read_text()
