"""Linear layers of a few rows by generated C++, against torch's own in double precision; what must stay torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.kernels.contexts_cpp import FEW
from kvcompile.kernels.cpp_backend import project as projecting
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.cpp_backend.project import LEAST, Project, project_of
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy

pytestmark = [
    pytest.mark.skipif(says_why_not() is not None, reason=str(says_why_not())),
    pytest.mark.usefixtures("small_linear_layers"),
]
CLOSE = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}  # half a unit in the last place, and a little


def kernel(dtype: str) -> Project:
    made = project_of(compile_policy("keep_all", ModelFacts(2, 4, 2, 32, dtype)).plan)
    assert made is not None
    return made


def drawn(seed: int, dtype: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, FEW),
    lines=st.integers(1, 40),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(sorted(CLOSE)),
    bias=st.booleans(),
    threads=st.sampled_from((2, 3, 7)),
)
def test_equals_double_precision_to_rounding(
    seed: int, rows: int, lines: int, columns: int, dtype: str, bias: bool, threads: int
) -> None:
    x, weight, added = drawn(seed, dtype, rows, columns), drawn(seed + 1, dtype, lines, columns), None
    added = drawn(seed + 2, dtype, lines) if bias else None
    torch.set_num_threads(threads)
    found = kernel(dtype)(x, weight, added)
    assert found is not None and found.dtype == x.dtype and found.shape == (rows, lines)
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    size = torch.nn.functional.linear(x.double().abs(), weight.double().abs()) + 1
    assert bool(((found.double() - truth).abs() <= CLOSE[dtype] * truth.abs() + 1e-6 * size).all())


def test_more_dimensions_and_extreme_numbers() -> None:
    weight = drawn(1, "float32", 5, 33)
    x = drawn(2, "float32", 2, 1, 33)
    x[0, 0, 7], x[1, 0, 3] = float("inf"), float("nan")
    found = kernel("float32")(x, weight, None)
    assert found is not None and found.shape == (2, 1, 5)
    truth = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(found, truth, equal_nan=True)


class Quantised(Tensor):
    """As libraries that quantise have them: a dtype like the model's, and no numbers of it in memory."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> None:
        raise NotImplementedError(func)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    "case",
    (
        "many rows", "no row", "other dtype", "strided", "one thread", "bias elsewhere", "bias of one number",
        "no column", "sparse", "a type of its own", "negated lazily",
    ),
)  # fmt: skip
def test_what_it_does_not_take_is_left_to_torch(case: str) -> None:
    x, weight, bias = drawn(1, "float32", 1, 32), drawn(2, "float32", 8, 32), drawn(3, "float32", 8)
    match case:
        case "many rows":
            x = drawn(1, "float32", FEW + 1, 32)
        case "no row":
            x = x[:0]
        case "other dtype":
            x = x.double()
        case "strided":
            weight = drawn(2, "float32", 32, 8).t()
        case "one thread":
            torch.set_num_threads(1)
        case "bias elsewhere":
            bias = bias.to("meta")
        case "bias of one number":
            bias = bias[:1]
        case "no column":
            x, weight = x[:, :0], weight[:, :0]
        case "sparse":
            weight = weight.to_sparse_csr()
        case "a type of its own":
            weight = Quantised((8, 32))
        case "negated lazily":
            x = torch._neg_view(x)
    assert kernel("float32")(x, weight, bias) is None


def test_small_weights_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projecting, "LEAST", LEAST)
    assert kernel("float32")(drawn(1, "float32", 1, 32), drawn(2, "float32", 8, 32), None) is None
