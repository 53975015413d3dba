"""What the machine's compiler makes of a generated C++ kernel: the assembly, and the figures that a reader asks for.

Takes source text, gives text and a `Machine`. The flags are those of `build`, so it is the code that runs.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvcompile.kernels.cpp_backend.build import FLAGS, compiler, run_compiler

_LABEL = re.compile(r"^([A-Za-z_][\w.$]*):", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+[a-z][\w.]*(?:\s|$)")
_X86_MOVE = re.compile(r"^\s+v?mov\w+\s+(?:%[xyz]mm\d+, *-?\w*\(%r([sb])p\)|-?\w*\(%r([sb])p\), *%[xyz]mm\d+)")
_ARM_MOVE = re.compile(r"^\s+(?:st|ld)[pru]\w*\s+(?:[qz]\d+)[^\[]*\[(?:sp|x29)\b")
_WIDTHS = ((512, r"%zmm\d"), (256, r"%ymm\d"), (128, r"%xmm\d|\bv\d+\.\d*[bhsd]\b|\bq\d+\b"))


@dataclass(frozen=True, slots=True)
class Machine:
    """A kernel's machine code. vector_bits: of the widest vector register that occurs, 0 for none.

    stack_moves: instructions that move a vector register to the stack or back: spills, and small arrays that are kept
    there; counted in the text, not weighted by how often they run.
    """

    compiler: str
    vector_bits: int
    instructions: int
    stack_moves: int

    def line(self) -> str:
        """For `inspect`."""
        vectors = f"vectors of {self.vector_bits} bits" if self.vector_bits else "no vector registers"
        moves = f"{self.stack_moves} moves between vector registers and the stack"
        return f"{self.instructions} instructions, {vectors}, {moves if self.stack_moves else 'nothing spilled'}"


def assembly(source: str) -> str:
    """The assembly of a kernel's text, in the compiler's own syntax.

    Raises:
        NoCompiler: there is none, or it refuses the text.
    """
    flags = (*(flag for flag in FLAGS if flag != "-shared"), "-S", "-fno-asynchronous-unwind-tables")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "kernel.s"
        run_compiler(source, flags, made)
        return made.read_text(encoding="utf-8", errors="replace")


def machine(text: str) -> Machine:
    """The figures of an assembly."""
    lines = [line for line in text.splitlines() if _INSTRUCTION.match(line)]
    return Machine(
        compiler=compiler().version,
        vector_bits=next((bits for bits, names in _WIDTHS if any(re.search(names, line) for line in lines)), 0),
        instructions=len(lines),
        stack_moves=sum(_stack_moves(part) for part in _LABEL.split(text)),
    )


def _stack_moves(text: str) -> int:
    """Of one function: %rbp is a frame pointer only where it is set from %rsp."""
    frames = re.search(r"movq?\s+%rsp, *%rbp", text) is not None
    moves = 0
    for line in text.splitlines():
        if found := _X86_MOVE.match(line):
            moves += "s" in found.groups() or frames
        elif _ARM_MOVE.match(line):
            moves += 1
    return moves
