"""Formulas printed for C++ mean what the reference says they mean: one file with all of them, compiled and called."""

from __future__ import annotations

import ctypes
from pathlib import Path

import jinja2
import pytest
import torch

from kvcompile.kernels.cpp_backend.build import NoCompiler, compiler, load
from kvcompile.kernels.evaluate import score
from kvcompile.kernels.holes import print_hole, step_hole
from kvcompile.kernels.plan import Expr
from kvcompile.kernels.printers import Axis
from kvcompile.kernels.printers_cpp import CPP
from kvcompile.kernels.render import TEMPLATES
from kvcompile.kernels.rows import Rows
from tests.kernels.test_triton_printers import FORMULAS
from tests.kernels.triton_interpreted.plans import binary, named, reduce

GROUP, LANES, CHANNELS = 3, 16, 24
KEY = named("field", "k")
OF_KEYS = {
    "norm": Expr("unary", (KEY,), "norm"),
    "mean of squares": reduce("mean", "d", binary("*", KEY, KEY)),
    "largest part": binary("-", reduce("max", "d", KEY), reduce("min", "d", KEY)),
}
_BODY = """
constexpr int GROUP = {group}, HEAD_DIM = {channels};
extern "C" void steps(const float* p_of, const float* acc, const float* pos, float now, float n_len, float* out) {{
  F p[GROUP];
  for (int g = 0; g < GROUP; ++g) p[g] = load(p_of + g * LANES);
  F state_acc = load(acc), pos_i = load(pos);
  F age = now - pos_i;
  float now_b_value = now;
  {steps}
}}
extern "C" void keys(const float* k, float* out) {{
  F kt[HEAD_DIM];
  for (int d = 0; d < HEAD_DIM; ++d) for (int i = 0; i < LANES; ++i) kt[d][i] = k[i * HEAD_DIM + d];
  {keys}
}}
extern "C" void functions(const float* x, float* out) {{
  store(out, exp_of(load(x))); store(out + 16, exp2_of(load(x))); store(out + 32, sigmoid_of(load(x)));
}}
extern "C" void rounded(const float* x, float* out) {{ for (int i = 0; i < LANES; ++i) out[i] = widen(narrow(x[i])); }}
"""


def _blocks(holes: list) -> str:  # type: ignore[type-arg]
    blocks = []
    for index, hole in enumerate(holes):
        lines = "\n    ".join(hole.lines)
        blocks.append(
            f"{{\n    {lines}\n    F answer = F{{}} + {hole.result};\n    store(out + {index} * LANES, answer);\n  }}"
        )
    return "\n  ".join(blocks)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        compiler()
    except NoCompiler as error:
        pytest.skip(str(error))
    steps = [step_hole("t", formula, dialect=CPP) for formula in FORMULAS.values()]
    reach, axes = {("field", "k"): "kt"}, {"d": Axis("HEAD_DIM")}
    keys = [
        print_hole("t", formula, reach, layout="id", axes=axes, leaf_axes={"kt": "id"}, dialect=CPP)
        for formula in OF_KEYS.values()
    ]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    head = environment.get_template("_head.cpp.jinja").render(
        header="", f={"dtype": request.param, "head_dim": CHANNELS}
    )
    body = _BODY.format(group=GROUP, channels=CHANNELS, steps=_blocks(steps), keys=_blocks(keys))
    return load(head + body, Path(tmp_path_factory.mktemp("built")))


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_the_cpp_text_means_what_the_reference_means(kernels: ctypes.CDLL) -> None:
    noise = torch.Generator().manual_seed(1)
    p = torch.rand(1, GROUP, 1, LANES, generator=noise)
    acc = torch.rand(1, LANES, generator=noise)
    pos = torch.arange(LANES)[None]
    yes = torch.ones(1, LANES, dtype=torch.bool)
    rows = Rows(pos, yes, yes, ~yes, torch.tensor([19]), torch.tensor([5]), {"acc": acc}, attn=p)
    out = torch.zeros(len(FORMULAS), LANES)
    at = pos.float()
    kernels.steps(_at(p), _at(acc), _at(at), ctypes.c_float(19.0), ctypes.c_float(LANES), _at(out))
    for found, (name, formula) in zip(out, FORMULAS.items(), strict=True):
        want = score(formula, rows, yes)[0]
        assert torch.allclose(found, want, rtol=1e-5, atol=1e-6, equal_nan=True), name


def test_formulas_over_channels(kernels: ctypes.CDLL) -> None:
    k = torch.randn(LANES, CHANNELS, generator=torch.Generator().manual_seed(2))
    out = torch.zeros(len(OF_KEYS), LANES)
    kernels.keys(_at(k), _at(out))
    want = torch.stack([k.norm(dim=1), (k * k).mean(1), k.amax(1) - k.amin(1)])
    assert torch.allclose(out, want, rtol=1e-5, atol=1e-6)


def test_exponentials_are_exact_to_rounding_and_keep_infinities(kernels: ctypes.CDLL) -> None:
    special = [0.0, -0.0, 1.0, -1.0, 88.0, -87.0, 1e-30, -3e-5, float("inf"), float("-inf"), float("nan"), 1e9, -1e9]
    x = torch.tensor([*special, 0.3, -17.7, 42.0])
    out = torch.zeros(3, LANES)
    kernels.functions(_at(x), _at(out))
    wide = x.double()
    for found, want in zip(out, (wide.exp(), wide.exp2(), wide.sigmoid()), strict=True):
        assert torch.allclose(found, want.float(), rtol=5e-7, atol=1e-37, equal_nan=True)


def test_numbers_are_rounded_as_torch_rounds_them(kernels: ctypes.CDLL, request: pytest.FixtureRequest) -> None:
    dtype = getattr(torch, request.node.callspec.params["kernels"])
    x = torch.tensor(
        [1.00390625, 1.01171875, -1.00390625, 3.3, -0.1, 6e4, 1e-3, 0.0, float("nan"), float("inf")] + [0.7] * 6
    )
    out = torch.zeros(LANES)
    kernels.rounded(_at(x), _at(out))
    assert torch.allclose(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
