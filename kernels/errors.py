"""The error of everything that is not the policy's fault: models, caches, kernels, what is not supported."""

from __future__ import annotations


class KvCompileError(Exception):
    """A mistake in how kvcompile is used, or a thing that it does not support; the message says the way out.

    A mistake in a policy is a `PolicyError` instead, which has a place in the policy's text.
    """


NO_TRITON = (
    "Triton is not installed, so no kernel can be run on a GPU or compiled for one: `pip install triton`; "
    "backends cpu and reference need none"
)
