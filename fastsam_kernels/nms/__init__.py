"""Greedy non-maximum suppression of boxes.

Boxes in falling order of score, the earlier of equal scores first:

    keep[i] = no j < i with keep[j] and IoU(i, j) > threshold

Area is (x1 - x0) * (y1 - y0), arithmetic in fp32; two boxes without area do not overlap. These are the decisions of
``torchvision.ops.nms`` on a CPU, which compares the fp32 IoU with a threshold in fp64: the same as with the largest
fp32 that is not above it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..dispatch import select_implementation

_BOXES_AT_ONCE = 256
MAX_BOXES = 16384  # of the Triton form: its one program holds a bit for each


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, kernels: str = "auto") -> Tensor:
    """Indices of the boxes to keep, best score first.

    Args:
        boxes: [N, 4] as x0, y0, x1, y1. One of NaN overlaps none and stays.
        scores: [N].
        iou_threshold: of IoU, above which the lower-scored box goes.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [K] int64 on the boxes' device.

    Raises:
        ValueError: shapes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    order, keep = ranked_nms(boxes, scores, iou_threshold, kernels=kernels)
    return order[keep]


def ranked_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """As :func:`nms`, for a host that does not want to wait for the number of boxes that are left.

    Returns:
        all indices, best score first, [N] int64; and which of them stay, [N] bool.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms takes boxes [N, 4] and scores [N], got {list(boxes.shape)} and {list(scores.shape)}")
    chosen = select_implementation("nms", kernels, boxes.device, _constraint(boxes))
    order = scores.sort(descending=True, stable=True).indices
    ranked, threshold = boxes.detach()[order].float(), _fp32_not_above(iou_threshold)
    if chosen == "triton":
        from .kernel import nms_triton

        return order, nms_triton(ranked, threshold)
    form = reference if chosen == "reference" else eager
    return order, form(ranked, threshold)


def reference(boxes: Tensor, threshold: float) -> Tensor:
    """Which of the boxes [N, 4], best first, stay: [N] bool. One box after the other."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        keep[i] = not overlaps(boxes[:i][keep[:i]], boxes[i : i + 1], threshold).any()
    return keep


def eager(boxes: Tensor, threshold: float) -> Tensor:
    """A block of boxes at a time: against those kept before it, then among themselves.

    Among themselves, all decisions are made anew from the previous ones until none changes. The first i boxes are
    right after i rounds, so that this ends, and only where ``reference`` does.
    """
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(boxes), _BOXES_AT_ONCE):
        block = slice(start, start + _BOXES_AT_ONCE)
        free = ~overlaps(boxes[:start][keep[:start]], boxes[block], threshold).any(dim=0)
        rivals = overlaps(boxes[block], boxes[block], threshold).triu(diagonal=1)
        before, stays = free, free & ~(rivals & free[:, None]).any(dim=0)
        while not torch.equal(before, stays):
            before, stays = stays, free & ~(rivals & stays[:, None]).any(dim=0)
        keep[block] = stays
    return keep


def overlaps(some: Tensor, others: Tensor, threshold: float) -> Tensor:
    """[N, M] bool, which pairs of boxes [N, 4] and [M, 4] have an IoU above the threshold."""
    x0, y0, x1, y1 = some[:, :, None].unbind(1)
    u0, v0, u1, v1 = others.unbind(1)
    width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
    height = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0)
    intersection = width * height
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    return intersection / union > threshold  # 0 / 0, of two boxes without area, is not


def _fp32_not_above(value: float) -> float:
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))


def _constraint(boxes: Tensor) -> str | None:
    """What keeps the Triton form from these inputs."""
    if len(boxes) > MAX_BOXES:
        return f"it takes up to {MAX_BOXES} boxes, got {len(boxes)}"
    return None
