"""Overlap of masks: the IoU of masks one by one, and of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

_PIXELS = 2**24  # of masks in fp32 at a time, and as many counts as fp32 has without rounding


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU [...] fp64 of masks [..., H, W] bool, one with one; two empty masks agree."""
    both, either = (a & b).sum((-1, -2)), (a | b).sum((-1, -2))
    return torch.where(either > 0, both.double() / either.clamp(min=1), 1.0)


def pairwise_mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU [N, M] fp64, on the host, of masks [N, H, W] and [M, H, W] bool; that of two empty ones is 0."""
    inter = torch.zeros(len(a), len(b), dtype=torch.float64)
    x, y = a.flatten(1), b.flatten(1)
    pixels = max(1, _PIXELS // max(1, len(a), len(b)))
    for part, other in zip(x.split(pixels, 1), y.split(pixels, 1), strict=True):
        inter += (part.float() @ other.float().T).double().cpu()
    areas, others = (masks.sum(1).double().cpu() for masks in (x, y))
    return inter / (areas[:, None] + others[None] - inter).clamp(min=1)
