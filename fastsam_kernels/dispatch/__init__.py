"""Selection of the implementation of an operation: an explicit value, never a silent fallback.

- ``"reference"``: the paper's formula in plain PyTorch, nothing clever; what everything is checked against.
- ``"torch"``: the same result with less work, in PyTorch operations; any device, differentiable.
- ``"triton"``: a fused kernel; NVIDIA GPUs of compute capability 8.0 or newer, inference only.
- ``"auto"``: "triton" where it can run and is worth it, else "torch". For matrix products in fp32 it is "torch": exact
  ones run on no tensor core, and those of torch are tuned and follow its ``fp32_precision``. The three products in TF32
  that would run on them (``tf32x3``) are off by twice as much as fp32, over the budget that kernels are held to.

A mapping like ``{"rel_pos_attention": "torch"}`` chooses for single operations; "auto" chooses for the others.
"""

from .device import is_triton_interpreter, requires_autograd
from .implementation import Implementation, triton_implementation
from .operation import (
    KERNELS,
    Kernels,
    Operation,
    UnsupportedKernelError,
    check_kernels,
    choice_for,
    has_kernel,
    limitation,
    register,
    resolve_kernels,
)

__all__ = [
    "KERNELS",
    "Implementation",
    "Kernels",
    "Operation",
    "UnsupportedKernelError",
    "check_kernels",
    "choice_for",
    "has_kernel",
    "is_triton_interpreter",
    "limitation",
    "register",
    "requires_autograd",
    "resolve_kernels",
    "triton_implementation",
]
