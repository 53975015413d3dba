"""The compiler: a policy and the facts of a model in, frozen plans and rewritten graphs out."""

from kvcompile.passes.pipeline import PIPELINE, Compiled, compile_policy

__all__ = ["PIPELINE", "Compiled", "compile_policy"]
