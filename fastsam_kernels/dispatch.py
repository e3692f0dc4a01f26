"""Which implementation of an operation runs: an explicit value, never a silent fallback."""

from __future__ import annotations

import torch

KERNELS = ("auto", "reference", "torch", "triton")


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


def resolve_kernels(kernels: str, device: torch.device) -> str:
    """The implementation that ``kernels`` means on ``device``: "reference", "torch" or "triton".

    Raises:
        ValueError: not one of :data:`KERNELS`.
        UnsupportedKernelError: "triton", which no operation of this version has.
    """
    check_kernels(kernels)
    if kernels == "triton":
        raise UnsupportedKernelError(f"no operation has a Triton form yet (asked for on {device}); use 'torch'")
    return "torch" if kernels == "auto" else kernels
