"""One layer's tensors as the generated C++ sees them: `struct Site` of templates/_head.cpp.jinja, field by field."""

from __future__ import annotations

import ctypes
from typing import cast

from kvcompile.kernels.layout import Site

_POINTERS = ("k", "v", "pos", "frozen", "state", "length", "table", "ring", "clock", "counts", "fires")
_NUMBERS = ("slots", "batch", "kv_heads", "window", "numbers", "layer")
_KEPT = "cpp"  # of a site's own attributes


class CSite(ctypes.Structure):
    """Addresses and sizes of a `layout.Site` on the CPU. It owns nothing: the site's tensors have to outlive it."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _NUMBERS]


def layer_of(site: Site) -> int:
    """`int(site.layer)` without an operator, whose call counts in every layer of every step."""
    return ctypes.c_int64.from_address(site.layer.data_ptr()).value


def c_site(site: Site, kv_heads: int) -> CSite:
    """The site's addresses, kept with it: else eleven tensors are looked at in every layer of every step."""
    found = vars(site).get(_KEPT)
    if found is None:
        numbers = (
            site.k.shape[0], site.clock.shape[0], kv_heads, site.ring.shape[2], site.counts.shape[1], layer_of(site)
        )  # fmt: skip
        found = CSite(*(getattr(site, name).data_ptr() for name in _POINTERS), *numbers)
        vars(site)[_KEPT] = found
    return cast(CSite, found)
