"""Files that a policy stands on: tables of heads and shares, and weights of trained scores.

Takes names and paths as the policy and the caller give them; gives paths, and puts what tables say into the module.
Guarantees: a file of the caller wins; a path in the policy counts from the policy's folder; nothing is opened but
tables, which are small; weights are only found: `trained_gates` reads headers of gates, the run time all the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

from xdsl.dialects.builtin import ArrayAttr, StringAttr

from kvcompile.dsl.diagnostics import did_you_mean, fail, outside
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.dialect_policy import HeadsOp, PolicyOp
from kvcompile.dsl.dialect_sources import LearnedOp
from kvcompile.dsl.source import Span
from kvcompile.passes.context import Context
from kvcompile.passes.tables import read_weights

MAX_WEIGHTS = 1 << 30


def check_given(policy: PolicyOp, context: Context) -> None:
    """Refuse files for names that take none."""
    ops = list(policy.body.block.ops)
    heads = [op.label.data for op in ops if isinstance(op, HeadsOp) and op.kind.data == "table"]
    taking = {name for name in heads if heads.count(name) == 1}
    taking |= {op.label.data for op in ops if isinstance(op, ShareOp) and op.table is not None}
    taking |= {op.label.data for op in ops if isinstance(op, LearnedOp)}
    for name in context.tables:
        if name not in taking:
            raise fail("K601", f"a table is given for `{name}`, which takes none in this policy", outside("<tables>"),
                       did_you_mean(name, taking, "names that take one") or "leave it out")  # fmt: skip


def located(name: str, written: str, span: Span, context: Context, code: str = "K610", what: str = "table") -> Path:
    """The file of a class, share or state. PolicyError where neither the policy nor the caller says which."""
    given = context.tables.get(name)
    if given is not None:
        return given
    base, path = context.bases.get(name), Path(written)
    if base is None and not path.is_absolute():
        raise fail(code, f"the policy brings no {what} for `{name}`", span,
                   f'give one: tables={{"{name}": "path/to/{path.name}"}}, or --table {name}=PATH')  # fmt: skip
    path = path if base is None else base / path
    if not os.path.exists(path):  # unlike Path.exists, False for every name that cannot be a file's
        raise fail(code, f"no such {what}: {path}", span,
                   f'check the path, or give another: --table {name}=PATH, or tables={{"{name}": "PATH"}}')  # fmt: skip
    return path


def bind_files(policy: PolicyOp, context: Context) -> None:
    """Read the weights of shares by table, and find the files of trained scores."""
    for op in policy.body.block.ops:
        span = context.places.span(op)
        if isinstance(op, ShareOp) and op.table is not None:
            weights = read_weights(located(op.label.data, op.table.data, span, context), context.facts.layers)
            op.weights = ArrayAttr([StringAttr(str(weight)) for weight in weights])
        elif isinstance(op, LearnedOp):
            path = located(op.label.data, op.file.data, span, context, "K615", "weights")
            _check_weights(path)
            context.learned[op.label.data] = path


def _check_weights(path: Path) -> None:
    where = outside(str(path))
    if path.suffix != ".safetensors":
        raise fail("K615", "trained scores are read from .safetensors files only", where, "convert the file")
    try:
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):
        size = -1
    if size < 0:
        raise fail("K615", "no such file of weights", where, "check the path")
    if size > MAX_WEIGHTS:
        raise fail("K615", f"the file of weights is larger than {MAX_WEIGHTS} bytes", where, "is this the file?")
