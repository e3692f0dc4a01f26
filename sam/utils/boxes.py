"""The two functions of ``torchvision.ops.boxes`` that programs take from the official modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam_kernels import nms


def box_area(boxes: Tensor) -> Tensor:
    """Return the areas [N] of boxes [N, 4] as x0, y0, x1, y1."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress boxes [N, 4] that overlap a better one of the same category ``idxs`` [N].

    Returns:
        indices of what is left, int64, by falling score.
    """
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for category in idxs.unique():
        rows = (idxs == category).nonzero()[:, 0]
        kept[rows[nms(boxes[rows], scores[rows], iou_threshold)]] = True
    left = kept.nonzero()[:, 0]
    return left[scores[left].argsort(descending=True, stable=True)]
