"""Which implementation of an operation runs: an explicit value, never a silent fallback.

- ``"reference"``: the paper's formula in plain PyTorch, nothing clever; what everything is checked against.
- ``"torch"``: the same result with less work, in PyTorch operations; any device, differentiable.
- ``"triton"``: a fused kernel; NVIDIA GPUs of compute capability 8.0 or newer, inference only.
- ``"auto"``: "triton" where it can run and is worth it, else "torch". For matrix products in fp32 it is "torch": exact
  ones run on no tensor core, and those of torch are tuned and follow its ``fp32_precision``. The three products in TF32
  that would run on them (``tf32x3``) are off by twice as much as fp32, over the budget that kernels are held to.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KERNELS = ("auto", "reference", "torch", "triton")
OLDEST_CAPABILITY = (8, 0)
_HAS_TRITON = find_spec("triton") is not None  # asked once: it searches the disk, and no compiler follows it there

logger = logging.getLogger("fastsam_kernels")


class UnsupportedKernelError(ValueError):
    """The implementation asked for cannot serve this input; the message names the constraint."""


def check_kernels(kernels: str) -> str:
    """``kernels`` itself if it is one of :data:`KERNELS`.

    Raises:
        ValueError: it is not.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    return kernels


def resolve_kernels(kernels: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Return the implementation that ``kernels`` means on ``device``: "reference", "torch" or "triton".

    ``dtype`` is that of matrix products, None where there are none.

    Raises:
        ValueError: not one of :data:`KERNELS`.
        UnsupportedKernelError: "triton" on a device that has no Triton forms.
    """
    return select_implementation("every operation", check_kernels(kernels), device, None, products=dtype)


def select_implementation(
    operation: str,
    kernels: str,
    device: torch.device,
    constraint: str | None,
    *inputs: Tensor,
    products: torch.dtype | None = None,
) -> str:
    """Return the implementation of one operation for given inputs.

    Args:
        operation: its name, for messages.
        kernels: as asked for.
        device: where the inputs are.
        constraint: what keeps its Triton form from these inputs, None if nothing does.
        inputs: tensors that autograd may be recording.
        products: dtype of its matrix products, None where it has none.

    Raises:
        ValueError, UnsupportedKernelError: as :func:`resolve_kernels`, or "triton" against ``constraint``.
    """
    check_kernels(kernels)
    if kernels in ("reference", "torch"):
        return kernels
    if requires_autograd(*inputs):
        constraint = constraint or "it has no backward; 'torch' and 'reference' differentiate"
    problem = _device_constraint(device) or constraint
    if kernels == "triton":
        if problem is not None:
            raise UnsupportedKernelError(f"the Triton form of {operation} cannot run here: {problem}")
        return "triton"
    if products == torch.float32:
        problem = problem or "products in fp32 are torch's, which follow its fp32_precision"
    chosen = "torch" if problem is not None or is_triton_interpreter() else "triton"
    if not torch.compiler.is_compiling():
        _log_once(operation, str(device), chosen, problem)
    return chosen


def requires_autograd(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to any of ``tensors``."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_triton_interpreter() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: exact in fp32 and fp16, slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device_constraint(device: torch.device) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu" and is_triton_interpreter():
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs; this is an AMD GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"it needs compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or newer, "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    return None


@cache
def _log_once(operation: str, device: str, chosen: str, problem: str | None) -> None:
    logger.info("%s on %s: kernels='auto' is %r%s", operation, device, chosen, f" ({problem})" if problem else "")
