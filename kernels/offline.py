"""Compiles a generated kernel file for a GPU that need not be here, and reads back what it uses.

Takes the path of a rendered file and an architecture, gives `Resources` per kernel: registers, spills,
shared memory, PTX. Triton decides at decoration whether it interprets, so this refuses to run where
TRITON_INTERPRET is set; `compile_apart` starts a clean process and is right everywhere.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvcompile.kernels.errors import NO_TRITON, KvCompileError
from kvcompile.kernels.gpus import KIB

# Largest dynamic shared memory of a thread block, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
ARCHES = ("sm_80", "sm_90", "sm_100")


EACH = 4  # files that a process of its own is worth: it takes seconds to start


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel needs of a multiprocessor on one architecture. Bytes, but for `registers` (a thread's)."""

    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_memory: int
    warps: int
    instructions: tuple[str, ...]  # matrix and copy instructions that occur in the PTX
    ptx: str

    @property
    def fits(self) -> bool:
        """Whether a thread block can be launched at all: the compiler does not check shared memory."""
        return self.shared <= SHARED_LIMIT[int(self.arch.removeprefix("sm_"))]

    def line(self) -> str:
        """One line with its name."""
        return f"{self.kernel} {self.arch}: {self.taken()}"

    def taken(self) -> str:
        """What it takes, for a reader."""
        spills = f"spills {self.spill_stores}+{self.spill_loads} B" if self.spill_stores else "no spills"
        tensor = f", {self.tensor_memory} columns of tensor memory" if self.tensor_memory else ""
        used = ", ".join(self.instructions) or "no matrix instructions"
        return f"{self.registers} registers, {spills}, {self.shared} B shared{tensor}, {used}"


_NOTABLE = ("mma.sync", "wgmma", "tcgen05.mma", "cp.async.bulk", "cp.async", "ldmatrix")


def compile_offline(path: Path, arch: str) -> tuple[Resources, ...]:
    """Compile every kernel of a file for `arch` (sm_80, sm_90, sm_100) in this process.

    Raises:
        KvCompileError: the interpreter is on in this process, or the architecture is unknown.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise KvCompileError("TRITON_INTERPRET is set: kernels cannot be compiled in this process, use compile_apart")
    capability = _capability(arch)
    from kvcompile.kernels.render import load

    module = load(path)
    return tuple(_compile(getattr(module, name), types, constants, options, capability)
                 for name, types, constants, options in module.OFFLINE)  # fmt: skip


def compile_apart(paths: Iterable[Path], arches: Iterable[str] = ARCHES) -> dict[str, tuple[Resources, ...]]:
    """The same for several files and architectures, in processes of their own: file stem -> resources.

    Raises:
        KvCompileError: Triton is not installed, an architecture is unknown, or a file does not compile.
    """
    arches = tuple(arches)
    for arch in arches:
        _capability(arch)
    if not has_triton():
        raise KvCompileError(NO_TRITON)
    paths = list(paths)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    many = max(1, min(len(os.sched_getaffinity(0)), len(paths) // EACH))
    parts = [[str(path) for path in paths[first::many]] for first in range(many)]
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "kvcompile.kernels.offline", *part, "--arch", *arches],
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )
            for part in parts
        ]  # fmt: skip
        said = [process.communicate() for process in running]
    table: dict[str, Any] = {}
    for process, (out, complaints) in zip(running, said, strict=True):
        if process.returncode:
            last = complaints.strip().splitlines()[-1:] or ["no message"]
            raise KvCompileError(f"offline compilation failed: {last[0]}")
        table |= json.loads(out.splitlines()[-1])
    table = {path.stem: table[path.stem] for path in paths}
    return {
        stem: tuple(Resources(**(entry | {"instructions": tuple(entry["instructions"])})) for entry in entries)
        for stem, entries in table.items()
    }


def has_triton() -> bool:
    """Whether Triton can be imported here."""
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):  # something that stands in its way
        return False


def _capability(arch: str) -> int:
    capability = int(match[1]) if (match := re.fullmatch(r"sm_(\d+)", arch)) else -1
    if capability not in SHARED_LIMIT:
        known = ", ".join(f"sm_{c}" for c in SHARED_LIMIT)
        raise KvCompileError(f"unknown architecture {arch!r}; known: {known}")
    return capability


def _compile(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], cc: int
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: kind for kind, group in types.items() for name in group.split()}
    signature = {name: types.get(name, "constexpr") for name in names}
    # Pools and scratch come from torch, whose allocations are aligned; without this no vector load is made.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    aligned |= {(names.index(name),): [["tt.divisibility", 16]] for name in _EVEN if name in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    # Where matrix instructions read registers there is one limit, on sm_90 and sm_100 another one or none.
    by_arch = {9: options.get("maxnreg_of_wgmma"), 10: options.get("maxnreg_of_tcgen05")}
    limit = by_arch.get(cc // 10, options.get("maxnreg_of_mma"))
    options = {name: value for name, value in options.items() if not name.startswith("maxnreg_of_")}
    options |= {"maxnreg": limit} if limit is not None else {}
    built = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    ptx = built.asm["ptx"]
    stores, loads = _spills(ptx, cc)
    return Resources(
        kernel=kernel.fn.__name__,
        arch=f"sm_{cc}",
        registers=_registers(built.asm["cubin"]),
        spill_stores=stores,
        spill_loads=loads,
        shared=built.metadata.shared,
        tensor_memory=built.metadata.tmem_size or 0,
        warps=built.metadata.num_warps,
        instructions=tuple(word for word in _NOTABLE if re.search(rf"\b{re.escape(word)}\b", ptx)),
        ptx=ptx,
    )


_EVEN = ("q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "out_b", "out_h", "out_n", "slots", "k_n", "v_n", "q_n", "capacity")


@cache
def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(next(iter(nvidia.__path__))) / "bin" / name)


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+)", text.stdout + text.stderr)
    assert found is not None
    return int(found[1])


def _spills(ptx: str, cc: int) -> tuple[int, int]:
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.ptx"
        path.write_text(ptx)
        tool = _tool("ptxas-blackwell" if cc >= 100 else "ptxas")
        command = [tool, "-v", f"--gpu-name={target[1]}", str(path), "-o", str(Path(place) / "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def main(arguments: list[str]) -> int:
    """`python -m kvcompile.kernels.offline FILE... --arch ARCH...`: resources as one line of JSON."""
    cut = arguments.index("--arch")
    files, arches = [Path(a) for a in arguments[:cut]], arguments[cut + 1 :]
    try:
        table = {path.stem: [asdict(r) for arch in arches for r in compile_offline(path, arch)] for path in files}
    except KvCompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
