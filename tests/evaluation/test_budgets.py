"""Budgets: which parameter keeps a part of the prompt, and that it does so when it runs."""

from fractions import Fraction

import pytest

import kvcompile
from kvcompile.dsl.library import names
from kvcompile.evaluation.budgets import Case, Unfit, chunk_for, fitted, is_fixed, parameters_for, part
from kvcompile.kernels.errors import KvCompileError
from tests.evaluation.shipped import FOLDER, shipped

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("policy", "keep", "wanted"),
    [
        ("snapkv", Fraction(3, 10), {"budget": 60}),
        ("snapkv_chunked", Fraction(3, 10), {"ratio": Fraction(3, 10)}),
        ("lagkv", Fraction(1, 3), {"ratio": Fraction(1, 3)}),
        ("h2o", Fraction(3, 10), {"heavy": "15% of prompt", "local": "15% of prompt"}),
        ("d2o", Fraction(1, 8), {"budget": "12.5% of prompt"}),
        ("streaming", Fraction(3, 10), {"window": 56}),
        ("lazy", Fraction(1), {"budget": 200}),
        ("policy p(heavy=4, local=4):\n    keep recent(local) | top(heavy) by norm(k)\n", Fraction(1, 8),
         {"heavy": 12, "local": 13}),
        ("policy p(window=4):\n    keep recent(window)\n    at step\n", Fraction(1, 8), {"window": 25}),
    ],
)  # fmt: skip
def test_parameters_by_name(policy, keep, wanted):
    assert parameters_for(policy, keep, 200).params == wanted


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "streaming", "knorm", "tova"])
def test_the_parameters_keep_that_part_of_the_prompt(policy):
    """What the cache holds after a prompt is the budget, by the cache's own count."""
    model, tokenizer = shipped()
    given = {"observe": 8} if policy == "snapkv" else {}
    fit = parameters_for(policy, Fraction(1, 4), 120, params=given).params
    ids = tokenizer("the cat sleeps . red suits alice . " * 15, return_tensors="pt")["input_ids"][:, :120]
    with kvcompile.use(model, policy, **given, **fit):
        model.generate(ids, max_new_tokens=1, do_sample=False)
        assert kvcompile.report(model).to_dict()["kept"] == 0.25


def test_a_score_table_is_ranked_and_rounded(tmp_path):
    from kvcompile.passes.tables import read_table

    given = {"retrieval": FOLDER / "heads.tsv"}
    scores = read_table(given["retrieval"], 3, 4)
    ranked = sorted((-scores[layer][head], layer, head) for layer in range(3) for head in range(4))
    for keep, heads in ((Fraction(1, 10), 1), (Fraction(3, 10), 3), (Fraction(1), 12)):
        fit = parameters_for("prulong", keep, 200, tables=given, folder=tmp_path)
        assert fit.params == {}
        mask = read_table(fit.tables["retrieval"], 3, 4)
        ones = {(layer, head) for layer in range(3) for head in range(4) if mask[layer][head] == 1.0}
        assert ones == {(layer, head) for _, layer, head in ranked[:heads]}
        explained = kvcompile.explain("prulong", shipped()[0], prompt=200, tables=fit.tables).to_dict()
        assert explained["classes"]["retrieval"]["heads"] == heads


def test_a_mask_is_not_ranked_again(tmp_path):
    mask = tmp_path / "mask.tsv"
    mask.write_text("1.0\t0.0\t0.0\t0.0\n0.0\t0.0\t0.0\t0.0\n0.0\t0.0\t1.0\t1.0\n")
    given = {"retrieval": mask}
    assert parameters_for("duo", Fraction(1, 4), 200, tables=given, folder=tmp_path).tables == given
    with pytest.raises(KvCompileError, match="only 0 and 1, 3 of 12 heads, so it cannot say which 6"):
        parameters_for("duo", HALF, 200, tables=given, folder=tmp_path)
    with pytest.raises(KvCompileError, match="--table retrieval=FILE"):
        parameters_for("duo", HALF, 200, folder=tmp_path)


def test_what_no_rule_fits_is_refused():
    for policy in ("keep_all", "razor", "kivi", "llmdrop", "minicache"):
        with pytest.raises(Unfit, match="--set NAME=VALUE"):
            parameters_for(policy, HALF, 200)
    two = 'heads a = table("a.tsv")\nheads b = table("b.tsv")\nheads c = rest\n\npolicy p():\n'
    two += "    a: keep all\n    b: keep recent(8)\n    c: keep recent(4)\n    at step\n"
    with pytest.raises(Unfit, match=r"several classes by table \(a, b\)"):
        parameters_for(two, HALF, 200)
    with pytest.raises(KvCompileError, match="leaves no window beside n_sink") as error:
        parameters_for("streaming", Fraction(1, 100), 200)
    assert not isinstance(error.value, Unfit)  # only this budget does not fit


def test_every_library_policy_fits_or_says_why(tmp_path):
    fits = set()
    for name in names():
        given = {"retrieval": FOLDER / "heads.tsv"} if name in ("prulong", "duo") else {}
        try:
            fit = parameters_for(name, HALF, 400, tables=given, folder=tmp_path)
        except KvCompileError as error:
            assert name in str(error)
        else:
            assert fit.params or fit.tables, name
            fits.add(name)
    assert {"adakv", "duo", "h2o", "keydiff", "prulong", "pyramidkv", "snapkv", "streaming_compact", "tova"} <= fits


def test_pieces():
    assert chunk_for("prulong", 64) == {"c": 64}
    assert chunk_for("snapkv_chunked", 64) == {"c": 64}
    for policy in ("streaming", "snapkv", "razor"):  # razor has a `c`, which is no piece
        with pytest.raises(Unfit, match="no parameter `c` that says how prompts are cut"):
            chunk_for(policy, 64)
    with pytest.raises(KvCompileError, match="at least 1"):
        chunk_for("prulong", 0)


def test_a_case_is_fitted_and_what_it_gives_wins(tmp_path):
    case = Case("s", "snapkv_chunked", {"observe": 8}, budget=0.3, chunk=32)
    assert fitted(case, 200, tmp_path).params == {"observe": 8, "c": 32, "ratio": Fraction(3, 10)}
    case = Case("s", "snapkv_chunked", {"observe": 8, "ratio": "50%", "c": 16}, budget=0.3, chunk=32)
    assert fitted(case, 200, tmp_path).params == {"observe": 8, "c": 16, "ratio": "50%"}
    assert fitted(Case("s", "snapkv"), 200, tmp_path).params == {}


def test_fixed_policies():
    assert is_fixed("keep_all")
    assert not is_fixed("streaming") and not is_fixed("prulong")


def test_budgets_as_written():
    assert [part(x) for x in ("10%", 0.3, "0.25", Fraction(1, 3), "100 %", 1)] == [
        Fraction(1, 10), Fraction(3, 10), Fraction(1, 4), Fraction(1, 3), 1, 1,
    ]  # fmt: skip
    for wrong, said in (
        (0, "outside"),
        ("-5%", "outside"),
        (30, "did you mean 30%"),
        ("x", "no number"),
        ("1/0", "no n"),
    ):
        with pytest.raises(KvCompileError, match=said):
            part(wrong)
