"""`learn` as a whole: what it finds, that it repeats itself and goes on, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning import learn as learn_module
from kvcompile.learning import training
from kvcompile.learning.data import Sequence
from kvcompile.learning.learn import Learned, learn, model_digest
from kvcompile.learning.masks import load_scores
from kvcompile.learning.objective import Objective
from kvcompile.learning.optimizer import Optimizer
from tests.learning.small import LOCAL, sequences, small_model, table

MODEL = Path(__file__).parents[2] / "examples" / "recall_model"


def run(policy: str = "prulong", *, model: Any = None, **options: Any) -> Learned:
    given = {"steps": 6, "batch": 2, **LOCAL, **options}
    return learn(small_model() if model is None else model, policy, sequences(), **given)


# ---------------------------------------------------------------- what it finds


def tales(count: int, length: int) -> list[Sequence]:
    """Tales of the shipped model's language; the answers alone are predicted and compared."""
    import random

    from kvcompile.evaluation import tales as language

    rng, out = random.Random(0), []
    for _ in range(count):
        words, weights = language.training_text(rng, length, 6)
        ids = language.encode(words)
        following = zip([*ids[1:], 0], [*weights[1:], 0.0], strict=True)
        labels = [token if weight == language.ANSWER else -100 for token, weight in following]
        out.append(Sequence(ids, labels, [label != -100 for label in labels]))
    return out


def test_the_head_that_carries_the_memory_ranks_first() -> None:
    """Of the shipped model, by ablation: layer 2, KV head 3 (its heads.tsv says 1.0, the next best 0.07)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    found = learn(model, "duo", tales(32, 160), steps=30, batch=2, lr=0.05, n_sink=4, window=24)
    truth = load_scores(MODEL / "heads.tsv")
    assert found.scores.chosen("10%") == truth.chosen("10%") == {(2, 3)}
    assert found.history[-1]["kept"] < 0.8  # the others were let go


@pytest.mark.slow
def test_the_loss_of_the_text_finds_the_layer_that_carries_the_memory() -> None:
    """The same by the language model's own loss: no head outside of the last layer, and the same head first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    found = learn(model, "prulong", tales(64, 160), steps=150, batch=4, n_sink=4, window=24)
    assert found.scores.chosen("10%") == {(2, 3)}
    assert {layer for layer, _ in found.scores.chosen("25%")} == {2}
    assert abs(found.history[-1]["kept"] - 0.3) < 0.15


def test_the_history_tells_loss_target_and_multipliers() -> None:
    found = run(steps=10, keep="50%")
    assert [entry["step"] for entry in found.history] == list(range(1, 11))
    assert set(found.history[0]) == {"step", "loss", "next_token", "kept", "target", "linear", "square", "grad_norm"}
    targets = [entry["target"] for entry in found.history]
    assert targets[0] == 1.0 and targets == sorted(targets, reverse=True)
    assert targets[8:] == pytest.approx([0.3, 0.3])  # the ramp of the library's block is 80% of the steps
    assert found.history[-1]["linear"] != 0
    two_way = run("duo")
    assert set(two_way.history[0]) == {"step", "loss", "hidden_mse", "kept", "grad_norm"}
    assert two_way.history[0]["hidden_mse"] == 0  # all gates are open


@pytest.mark.parametrize(("policy", "steps"), [("prulong", 1000), ("duo", 2000)])
def test_steps_default_to_those_of_the_gate(policy: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stop(model: Any, plan: Any, data: Any, told: Any, group: Any) -> Any:
        asked.append(told.steps)
        raise InterruptedError

    monkeypatch.setattr(learn_module, "train", stop)
    with pytest.raises(InterruptedError):
        run(policy, steps=None)
    assert asked == [steps]


def test_results_are_saved_with_where_they_come_from(tmp_path: Path) -> None:
    model = small_model()
    model.name_or_path = str(tmp_path / "some_model")
    found = run(model=model, seed=3)
    assert found.keep == Fraction(3, 10)
    found.save(tmp_path / "masks.tsv")
    found.save(tmp_path / "masks.safetensors")
    text = (tmp_path / "masks.tsv").read_text()
    assert sorted(text.split()) == ["0.0", "0.0", "0.0", "1.0"]  # 30% of 4 heads
    back = load_scores(tmp_path / "masks.safetensors")
    assert torch.allclose(torch.tensor(back.values), table(found).float())
    about = back.provenance
    assert (about["model"], about["policy"], about["heads"]) == ("some_model", "prulong", "retrieval")
    assert (about["gate"], about["steps"], about["batch"], about["seed"]) == ("hard_concrete", 6, 2, 3)
    assert about["model_digest"] == model_digest(model) and about["data"] == "sequences: 8 sequences"
    assert about["metrics"]["loss"] == found.history[-1]["loss"]
    assert about["keep"] == "3/10" and len(about["data_digest"]) == 64
    assert set(about["versions"]) == {"kvcompile", "torch", "transformers"}
    assert str(tmp_path) not in json.dumps(about)


def test_a_mask_that_was_learned_is_read_by_the_policy(tmp_path: Path) -> None:
    model = small_model()
    found = run(model=model, keep="50%")
    found.save(tmp_path / "masks.tsv")
    kvcompile.optimize(model, "prulong", tables={"retrieval": tmp_path / "masks.tsv"}, c=8, compile="off", **LOCAL)
    with torch.no_grad():
        cache = model(torch.tensor([list(range(5, 45))])).past_key_values
    whole = {(layer, head) for layer in range(2) for head, kept in enumerate(cache.positions(layer)) if len(kept) == 40}
    assert whole == found.scores.chosen("50%") and len(whole) == 2


# ---------------------------------------------------------------- the same again


def test_equal_arguments_give_equal_scores() -> None:
    first = table(run())
    assert torch.equal(first, table(run()))
    assert not torch.equal(first, table(run(seed=1)))
    assert torch.equal(first, table(run(draws=2))) and not torch.equal(first, table(run(draws=1)))


@pytest.mark.parametrize("policy", ["prulong", "duo"])
def test_a_run_that_was_stopped_in_the_middle_of_a_step_ends_as_one_that_was_not(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(policy)
    step, calls = Optimizer.step, []

    def interrupted(self: Optimizer) -> float:
        norm = step(self)  # the gates have moved, the step is not over
        calls.append(norm)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return norm

    monkeypatch.setattr(Optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(policy, checkpoint=tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3
    resumed = run(policy, checkpoint=tmp_path)
    assert len(calls) == 4 + 3
    assert resumed.scores == whole.scores and resumed.history == whole.history
    assert run(policy, checkpoint=tmp_path).scores == whole.scores and len(calls) == 7  # nothing is left to do
    assert run(policy, checkpoint=tmp_path, resume=False).scores == whole.scores and len(calls) == 7 + 6


def test_a_state_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    run(checkpoint=tmp_path, steps=2)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"steps": 3}, "steps is 2 there and 3 here"),
        ({"batch": 1}, "batch is 2 there and 1 here"),
        ({"window": 9}, "digest is"),
        ({"model": small_model(seed=1)}, "model_digest is"),
    ]
    for change, message in refused:
        with pytest.raises(KvCompileError, match=f"of another run: .*{message}"):
            run(checkpoint=tmp_path, **{"steps": 2, **change})
    with pytest.raises(KvCompileError, match="of another run: data_digest is"):
        learn(small_model(), "prulong", sequences()[::-1], steps=2, batch=2, checkpoint=tmp_path, **LOCAL)
    (tmp_path / "file").write_text("")
    with pytest.raises(KvCompileError, match="is a file: name a folder"):
        run(checkpoint=tmp_path / "file")


def test_how_it_is_computed_changes_nothing_but_rounding() -> None:
    plain = table(run(batch=4))
    assert torch.allclose(table(run(batch=4, gradient_checkpointing=True)), plain, atol=1e-6)
    assert torch.allclose(table(run(batch=4, compile="eager")), plain, atol=1e-5)
    rounded = run(batch=4, dtype="bf16")
    assert rounded.history[0]["loss"] == pytest.approx(run(batch=4).history[0]["loss"], rel=1e-2)
    assert rounded.history[0]["loss"] != run(batch=4).history[0]["loss"]


def test_forwards_of_bounded_size_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(batch=8)
    monkeypatch.setattr(training, "TOKENS_AT_ONCE", 100)  # two sequences at a time
    parts = run(batch=8)
    assert torch.allclose(table(parts), table(whole), atol=1e-5)
    assert parts.history[-1] == pytest.approx(whole.history[-1], rel=1e-5)


# ---------------------------------------------------------------- what it leaves alone


def looks(model: Any) -> list[Any]:
    weights = [(name, w.data_ptr(), w.dtype, w.requires_grad, w.grad) for name, w in model.named_parameters()]
    modules = [(m.training, sorted(vars(m)), m.__dict__.get("forward")) for m in model.modules()]
    return [weights, modules, id(model.config), model.config.to_dict(), model.config._attn_implementation]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before, values = looks(model), {name: w.clone() for name, w in model.state_dict().items()}
    if fails:
        monkeypatch.setattr(Objective, "backward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            run(model=model, gradient_checkpointing=True)
    else:
        run(model=model, gradient_checkpointing=True)
    assert looks(model) == before
    assert all(torch.equal(weight, values[name]) for name, weight in model.state_dict().items())


def test_an_optimised_model_learns_without_its_policy_and_keeps_it() -> None:
    model = small_model()
    kvcompile.optimize(model, "streaming", n_sink=1, window=2, compile="off")
    assert run(model=model).scores.values == run().scores.values
    with torch.no_grad():
        kept = model(torch.tensor([[5, 6, 7, 8, 9, 10]])).past_key_values.positions(0)
    assert [positions.tolist() for positions in kept] == [[0, 4, 5]] * 2


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    run(steps=2, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err and "loss" in err and "target 65.0%" in err
    run(steps=2)
    assert capsys.readouterr() == ("", "")


def test_naming_it_imports_nothing_heavy() -> None:
    script = "import sys, kvcompile; print('learn' in dir(kvcompile), 'torch' in sys.modules); kvcompile.learn"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "True False\n", done.stderr
    assert kvcompile.learn is learn


# ---------------------------------------------------------------- what it refuses

PRESSED = """
heads retrieval = table("none.tsv", top=50%)
heads local = rest

policy pressed(n_sink=2, window=8):
    retrieval: keep all
    local: keep sink(n_sink) | recent(window)
    at chunk, step

learn retrieval for pressed:
    gate z = clamp01(init=1) per head
    mix z * retrieval + (1 - z) * local
    loss 0.000001 * hidden_mse(answer_tokens) + 5 * mean(z)
    freeze weights
"""


def test_classes_that_read_the_same_are_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_module, "train", lambda *a: pytest.fail("trained"))
    with pytest.raises(KvCompileError, match="up to 44 tokens a `local` head reads the same as a `retrieval` head"):
        run(n_sink=4, window=40)
    # One sequence has a token more than both regions hold, but nothing is predicted from it.
    long = Sequence(range(3, 53), [4] * 44 + [-100] * 6)
    with pytest.raises(KvCompileError, match="up to 44 tokens"):
        learn(small_model(), "prulong", [long], steps=2, n_sink=4, window=40)


def test_gates_that_did_not_move_are_no_result() -> None:
    with pytest.raises(KvCompileError, match=r"the gates did not move: after 6 steps no score .* take more steps"):
        run("duo", lr=1e-6)
    with pytest.raises(KvCompileError, match=r"did not move: after 6 steps all 4 scores are 0\.0000"):
        run(PRESSED, lr=1.0)


def test_a_loss_that_is_no_number_stops_with_step_and_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Objective.backward

    def broken(self: Objective, *args: Any, **kwargs: Any) -> dict[str, float]:
        figures = backward(self, *args, **kwargs)
        return {**figures, "loss": float("nan")} if args[5] == 3 else figures

    monkeypatch.setattr(Objective, "backward", broken)
    with pytest.raises(KvCompileError, match=r"step 4: the loss is nan .* the state of step 3 is in") as caught:
        run(checkpoint=tmp_path)
    assert "lr" in str(caught.value)
    monkeypatch.undo()
    assert run(checkpoint=tmp_path).scores == run().scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: give a whole number from 1"),
        ({"batch": True}, "batch=True: give a whole number"),
        ({"length": 1.5}, "length=1.5: give a whole number"),
        ({"draws": 1 << 40}, "draws=.*: give a whole number"),
        ({"draws": 3}, "a step of 2 sequences has no use for more draws"),
        ({"seed": "x"}, "seed='x': give a whole number"),
        ({"dtype": "fp8"}, "dtype='fp8': one of auto, bf16, fp32"),
        ({"compile": "auto"}, "compile='auto': one of off, eager, inductor"),
        ({"lr": 0.0}, "a learning rate is above 0"),
        ({"lr": float("nan")}, "a learning rate is above 0"),
        ({"keep": "a third"}, "no part of the heads"),
        ({"keep": 1.5}, "no part of the heads"),
        ({"keep": 0.2}, "0.2 of this model's 4 KV heads is none at all"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvCompileError, match=message):
        run(**options)


def test_weights_of_two_bytes_are_not_cast() -> None:
    model = small_model().bfloat16()
    with pytest.raises(KvCompileError, match=r"dtype='fp32' with weights in torch.bfloat16"):
        run(model=model, dtype="fp32")
    assert torch.isfinite(table(run(model=model, steps=2))).all()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_policies_and_models_that_cannot_be() -> None:
    with pytest.raises(kvcompile.PolicyError, match="has no learn block"):
        run("streaming")
    with pytest.raises(kvcompile.PolicyError, match="no parameter `windw`"):
        run(windw=3)
    with pytest.raises(KvCompileError, match="is no Hugging Face model"):
        learn(torch.nn.Linear(2, 2), "prulong", sequences())
    with pytest.raises(KvCompileError, match="token id 255 is outside"):
        learn(small_model(vocab_size=200), "prulong", [Sequence([3, 4, 255])])
