"""Overlaps of pairs of boxes."""

from __future__ import annotations

import torch
from torch import Tensor


def overlaps(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """Return which pairs of boxes [N, 4] and [M, 4] have an IoU above the threshold, [N, M] bool."""
    x0, y0, x1, y1 = a[:, :, None].unbind(1)
    u0, v0, u1, v1 = b.unbind(1)
    width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
    height = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0)
    intersection = width * height
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    return intersection / union > threshold  # 0 / 0, of two boxes without area, is not
