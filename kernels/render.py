"""From a spec to the text of a kernel file, and to a file on disk.

Takes a `KernelSpec` and a `Header`, gives source that stands alone. Triton: Python with kernel, launch, a plain torch
reference and a main that checks and times. C++: one function for the CPU, for any compiler with OpenMP.
Guarantees: the same input gives the same text, byte for byte.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Literal

import jinja2

from kvcompile.kernels import cache_folder, contexts, contexts_cpp
from kvcompile.kernels.errors import NO_TRITON, KvCompileError
from kvcompile.kernels.gpus import GPUS, Gpu
from kvcompile.kernels.roofline import TWO_CORES, Traffic, itemised
from kvcompile.kernels.spec import LAUNCH, KernelSpec

TEMPLATES = Path(__file__).parent / "templates"
WIDTH = 112  # of a header line
Target = Literal["triton", "cpp"]
SUFFIX: dict[Target, str] = {"triton": "py", "cpp": "cpp"}


@dataclass(frozen=True, slots=True)
class Header:
    """What a kernel's docstring says beside its facts.

    sites    which layers and heads it serves, in words
    shapes   (name, shape in words) of its main operands
    traffic  bytes of one launch at the shapes of `bench`
    bench    sizes that --bench runs: batch, kv_heads, layers, tokens
    """

    policy: str
    sites: str
    shapes: tuple[tuple[str, str], ...]
    traffic: Traffic
    bench: tuple[tuple[str, int], ...]
    gpu: Gpu = GPUS["H200"]

    def text(self, spec: KernelSpec, formulas: tuple[tuple[str, str], ...], target: Target = "triton") -> str:
        """The docstring's lines."""
        cpp = target == "cpp"
        name = spec.cpp_name if cpp else spec.name
        facts = ", ".join(f"{name} {value}" for name, value in spec.facts if not (cpp and name in LAUNCH))
        sizes = ", ".join(f"{name} {value}" for name, value in self.bench)
        dtype = str(dict(spec.facts).get("dtype"))
        time = self.traffic.on(TWO_CORES) if cpp else self.traffic.arithmetic(self.gpu, dtype)
        lines = [
            f"{name}: {PURPOSE[spec.template]}",
            "",
            f"Policy   {self.policy}",
            f"Sites    {self.sites}",
            *_wrapped("Facts", facts),
            *(
                line
                for name, says in formulas
                for line in _wrapped("Formula", f"{name}{'=' if name.endswith('+') else ' ='} {says}")
            ),
            *(line for name, shape in self.shapes for line in _wrapped("Shape", f"{name}: {shape}")),
            *_wrapped("Bytes", f"{itemised(self.traffic)} a launch, at {sizes}"),
            *_wrapped("Time", f"{time}, predicted, not measured"),
            "",
            ("Generated" if cpp else f"Run `python {name}.py --check --bench`. Generated")
            + " by kvcompile: change the policy or the template.",
        ]
        return "\n".join(lines)


PURPOSE = {
    "decode": "one token of every sequence: append, attend, score, over ragged rows",
    "prefill": "a piece of every sequence reads its rows and itself, each head what it may, in one launch",
    "evict": "after a step: which entries of all layers' rows stay, compacted in place",
    "select": "the best entries of each row of a prefill, by threshold, without a sort",
    "pack": "survivors of a prefill go to their rows' pages, in order",
    "columns": "what a set of queries says about every entry: attention summed by column",
    "keys": "a score from each key alone",
    "marks": "landmarks of units that have become full",
    "units": "which units each query reads by a rule's choice, and which entries by its regions",
    "entries": "which single entries the query of a step reads by a rule's choice",
    "spans": "one token of every sequence: append, then each head reads its list of a row's entries, or all",
    "blocks": "a piece of every sequence, each query by what its rule reads, in strips of those that read alike",
    "chosen": "which units each query of a piece chooses, and which tiles of entries are read at all",
    "project": "a linear layer of a step's few rows: each weight is read once, by all threads",
    "pool": "what follows a score along the row: pooling over the candidates in position order",
}


def _wrapped(label: str, text: str) -> list[str]:
    lines, line = [], f"{label:8}"
    for word in text.split():
        if len(line) + 1 + len(word) > WIDTH and line.strip():
            lines.append(line)
            line = " " * 8
        line += " " + word
    return [*lines, line]


def render(spec: KernelSpec, header: Header, target: Target = "triton") -> str:
    """The kernel file's text; deterministic.

    Raises:
        Unprintable: the formulas have no form in the target.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    context = (contexts_cpp if target == "cpp" else contexts).context(spec)
    text = environment.get_template(f"{spec.template}.{SUFFIX[target]}.jinja").render(
        f=dict(spec.facts),
        header=header.text(spec, context.pop("formulas"), target),
        bench=dict(header.bench),
        torch_dtype=f"torch.{spec.fact('dtype')}" if "dtype" in dict(spec.facts) else "torch.float32",
        **context,
    )
    return _tidy(text)


def _tidy(text: str) -> str:
    """No spaces at line ends, never more than two blank lines."""
    out: list[str] = []
    for line in (raw.rstrip() for raw in text.split("\n")):
        if line or out[-2:] != ["", ""]:
            out.append(line)
    return "\n".join(out).rstrip() + "\n"


def folder(policy: str, digest: str) -> Path:
    """Where a policy's kernels lie: in kernels/POLICY-DIGEST of the cache folder. Nothing is made."""
    return cache_folder.root() / "kernels" / f"{policy}-{digest[:8]}"


def write(text: str, path: Path) -> Path:
    """Put a file in place in one step and return where it is; one that has the same text already is left alone.

    Where the cache folder cannot be used the file goes to the process's private one (`cache_folder`).

    Raises:
        OSError: a path elsewhere cannot be written.
    """
    path = cache_folder.ready(path.parent) / path.name
    data = text.encode()
    try:
        if cache_folder.is_ours(path) and path.read_bytes() == data:
            return path
        cache_folder.put(data, path)
    except OSError as error:
        path = cache_folder.leave(path.parent, error) / path.name
        cache_folder.put(data, path)
    return path


class _FromText(SourceFileLoader):
    """Reads no byte code: that is told apart by the text's size and second only, and could be anyone's."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def load(path: Path) -> ModuleType:
    """Import a kernel file by its path; the same text is imported once in a process, and never from byte code.

    Raises:
        KvCompileError: the file needs Triton, which is not installed.
    """
    name = f"kvcompile_kernel_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromText(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise KvCompileError(NO_TRITON) from error
        raise
    return module
