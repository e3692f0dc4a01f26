"""Limits of devices: where there are products of 8 bits."""

from __future__ import annotations

import torch

from ..dispatch import Kernels, choice_for
from .operands import scheme_dtype

_FP8_CAPABILITY = (8, 9)


def why_not_quantized(scheme: str, device: torch.device, kernels: Kernels = "auto") -> str | None:
    """Return a sentence on what keeps a scheme from a device by these ``kernels``; None where nothing does.

    int8 runs everywhere. The formulas of both, ``kernels="reference"``, do too, slowly.

    Raises:
        ValueError: an unknown scheme or ``kernels``.
    """
    scheme_dtype(scheme)
    if scheme == "int8" or choice_for(kernels, "fp8_linear") == "reference":
        return None
    needed = "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{needed}, got {device}; kernels='reference' computes what it gives, slowly, and 'int8' runs here"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{needed}, {name} has {'.'.join(map(str, capability))}; 'int8' runs here"
    return None
