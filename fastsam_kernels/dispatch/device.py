"""Requirements of the Triton kernels on the device and on autograd."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
# Looked up once: it searches the disk, and no compiler follows it there.
_HAS_TRITON = find_spec("triton") is not None


def requires_autograd(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done to any of ``tensors``."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_triton_interpreter() -> bool:
    """Return whether Triton kernels run in its interpreter, on the CPU: exact in fp32 and fp16, slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_limitation(device: torch.device) -> str | None:
    """Return what keeps every Triton kernel from ``device``, None where nothing does."""
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


def triton_drawback(products: torch.dtype | None) -> str | None:
    """Return why "auto" passes over Triton kernels that could run, None where it does not.

    ``products`` is the dtype of matrix products, None where there are none.
    """
    if products == torch.float32:
        return "products in fp32 are torch's, which follow its fp32_precision"
    if is_triton_interpreter():
        return "its interpreter is slow"
    return None
