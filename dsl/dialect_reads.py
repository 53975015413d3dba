"""The `kv` dialect, rows that read: which rows an `attend` is about, and layers whose attention does not run.

Both name rows by prefix, as `kv.class` does for what is kept. Guarantees: layers are pairs of ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import DenseArrayBase, StringAttr, SymbolNameConstraint, i64
from xdsl.ir import Attribute
from xdsl.irdl import IRDLOperation, irdl_op_definition, opt_prop_def, prop_def, traits_def
from xdsl.traits import SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

Ranges = tuple[tuple[int, int], ...]
PREFIX = "reads "  # of the symbols of readers, beside those of classes


class NamesLayers(IRDLOperation):
    """An op with `layers`: pairs of first and last layer, both included, negative ones counted from the end (-1 is the
    last); empty for `layers rest`, absent where no layers are named."""

    layers = opt_prop_def(DenseArrayBase.constr(i64))

    def ranges(self) -> Ranges | None:
        """Pairs of first and last layer, or None where layers are not named."""
        if self.layers is None:
            return None
        ends = tuple(self.layers.iter_values())
        return tuple(zip(ends[::2], ends[1::2], strict=True))

    def verify_(self) -> None:
        if self.layers is not None and len(self.layers) % 2:
            raise VerifyException("layers are pairs of first and last")


def layers_attr(layers: Sequence[tuple[int, int]]) -> DenseArrayBase:
    """Pairs of ends as one array."""
    return DenseArrayBase.from_list(i64, [end for pair in layers for end in pair])


class NamesRows(NamesLayers):
    """An op that names rows by their prefix, and is a symbol; without heads and layers: all that no other takes."""

    sym_name = prop_def(SymbolNameConstraint())
    heads = opt_prop_def(StringAttr)
    traits = traits_def(SymbolOpInterface())
    assembly_format = "$sym_name (`heads` $heads^)? (`layers` $layers^)? attr-dict"

    def __init__(self, name: str, heads: str | None, layers: Sequence[tuple[int, int]] | None) -> None:
        properties: dict[str, Attribute] = {"sym_name": StringAttr(name)}
        if heads is not None:
            properties["heads"] = StringAttr(heads)
        if layers is not None:
            properties["layers"] = layers_attr(layers)
        super().__init__(properties=properties)


@irdl_op_definition
class ReadersOp(NamesRows):
    """Rows whose reads are said together: `kv.readers @"reads far" heads "far"`; without prefix, all that no other has.

    Rows without any, or of readers without a `kv.attend`, read all.
    """

    name = "kv.readers"


@irdl_op_definition
class OffOp(NamesLayers):
    """Layers whose attention does not run and that hold nothing: `kv.off layers array<i64: 21, 27>`."""

    name = "kv.off"
    assembly_format = "(`layers` $layers^)? attr-dict"

    def __init__(self, layers: Sequence[tuple[int, int]]) -> None:
        super().__init__(properties={"layers": layers_attr(layers)})

    def verify_(self) -> None:
        super().verify_()
        if self.layers is None:
            raise VerifyException("layers that are off are named")
