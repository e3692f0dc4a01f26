"""Suppression of boxes one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from .overlaps import overlaps


def reference(boxes: Tensor, threshold: float) -> Tensor:
    """Return which of the boxes [N, 4], best first, stay: [N] bool."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        keep[i] = not overlaps(boxes[:i][keep[:i]], boxes[i : i + 1], threshold).any()
    return keep
