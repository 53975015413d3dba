"""Whether anything listens to torch's dispatcher, so that work must go through operators to be seen.

Where nothing does, the functions behind operators may be called as they are: an operator hands each of a layer's
tensors to the dispatcher and back.
"""

from __future__ import annotations

import torch


def watched() -> bool:
    """A graph is being traced, a dispatch or function mode is on, autocast, a profiler, or functorch."""
    core = torch._C
    return bool(
        torch.compiler.is_compiling()
        or core._len_torch_dispatch_stack()
        or core._is_torch_function_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.autograd._profiler_enabled()
        or core._get_tracing_state() is not None
        or core._functorch.peek_interpreter_stack() is not None
    )
