"""Greedy non-maximum suppression of boxes.

Boxes in falling order of score, the earlier of equal scores first:

    keep[i] = no j < i with keep[j] and IoU(i, j) > threshold

Area is (x1 - x0) * (y1 - y0), arithmetic in fp32; two boxes without area do not overlap. These are the decisions of
``torchvision.ops.nms`` on a CPU, which compares the fp32 IoU with a threshold in fp64: the same as with the largest
fp32 that is not above it.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, kernels: Kernels = "auto") -> Tensor:
    """Return the indices of the boxes to keep, best score first.

    Args:
        boxes: [N, 4] as x0, y0, x1, y1. One of NaN overlaps none and stays.
        scores: [N].
        iou_threshold: the box of the lower score goes where the IoU is above it.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [K] int64 on the boxes' device.

    Raises:
        ValueError: shapes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    order, keep = ranked_nms(boxes, scores, iou_threshold, kernels=kernels)
    return order[keep]


def ranked_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, kernels: Kernels = "auto"
) -> tuple[Tensor, Tensor]:
    """Rank the boxes and mark those that :func:`nms` keeps, for a host that does not wait for their number.

    Returns:
        all indices, best score first, [N] int64; and which of them stay, [N] bool.
    """
    order, ranked, threshold = _prepare(boxes, scores, iou_threshold)
    return order, NMS.run(kernels, ranked, threshold)


def _prepare(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor, float]:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms takes boxes [N, 4] and scores [N], got {list(boxes.shape)} and {list(scores.shape)}")
    order = scores.sort(descending=True, stable=True).indices
    return order, boxes.detach()[order].float(), _fp32_not_above(iou_threshold)


def _fp32_not_above(value: float) -> float:
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))


NMS = register(
    Operation(
        "nms",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        lambda *arguments, **options: _prepare(*arguments, **options)[1:],
    )
)
