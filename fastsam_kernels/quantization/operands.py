"""Rows of 8-bit codes with a scale each, as activations (a row per token) and weights (a row per output channel) are.

A code stands for ``code * scale``. The scale of a row is its largest magnitude over the largest code, so that no value
is cut off; a row of zeros has the scale 1. A row with a value that is not finite has a scale that is not, and so has
what is computed of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The dtype of the codes of each scheme, and the largest of them.
SCHEMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class QuantizedRows(NamedTuple):
    """Rows in 8 bits: ``codes`` [..., K] in int8 or float8_e4m3fn, and ``scales`` [...] in fp32."""

    codes: Tensor
    scales: Tensor


class QuantizedWeight(NamedTuple):
    """The weight of a linear layer in 8 bits.

    Attributes:
        codes: [N, K], a row per output channel.
        scales: [N] in fp32.
        packed: the codes in the order of oneDNN, where it multiplies them; None elsewhere.
    """

    codes: Tensor
    scales: Tensor
    packed: Tensor | None = None


def scheme_dtype(scheme: str) -> torch.dtype:
    """Return the dtype of the codes of a scheme.

    Raises:
        ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    return SCHEMES[scheme]


def scales_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales in fp32 of rows whose largest magnitudes are ``largest``, for codes of ``dtype``."""
    scales = (largest / LARGEST[dtype]).float()
    # A magnitude that underflows as a scale counts as zero, and its codes are zero.
    return torch.where(scales == 0, 1.0, scales)


def codes_of(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values over their scales to codes, ties to even."""
    if dtype == torch.int8:
        return levels.round().clamp(-127, 127).to(dtype)
    return levels.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def quantize_wide(wide: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Quantise rows [..., K] of fp32 or fp64."""
    scales = scales_of(wide.abs().amax(-1), dtype)
    return QuantizedRows(codes_of(wide / scales[..., None].to(wide.dtype), dtype), scales)


def quantize_weight(weight: Tensor, scheme: str) -> QuantizedWeight:
    """Quantise the weight [N, K] of a linear layer with a scale per output channel.

    Raises:
        ValueError: another shape, values that are not finite, or an unknown scheme.
    """
    dtype = scheme_dtype(scheme)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be [N, K] of floating point, got {list(weight.shape)} of {weight.dtype}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight has values that are not finite")
    with torch.no_grad():
        return QuantizedWeight(*quantize_wide(weight.detach().float(), dtype))
