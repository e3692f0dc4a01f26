"""Greedy non-maximum suppression of boxes.

Boxes in falling order of score, the earlier of equal scores first; a box is dropped when its IoU with a box kept
before it exceeds the threshold. Area is (x1 - x0) * (y1 - y0), arithmetic in fp32: the decisions of
``torchvision.ops.nms`` on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes to keep, best score first.

    Args:
        boxes: [N, 4] as x0, y0, x1, y1.
        scores: [N].
        iou_threshold: of IoU, above which the lower-scored box goes.

    Returns:
        [K] int64 on the boxes' device.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms takes boxes [N, 4] and scores [N], got {list(boxes.shape)} and {list(scores.shape)}")
    order = scores.sort(descending=True, stable=True).indices
    x0, y0, x1, y1 = boxes.float()[order].cpu().numpy().T
    areas = (x1 - x0) * (y1 - y0)
    alive = np.ones(len(areas), bool)
    kept = []
    for i in range(len(areas)):
        if not alive[i]:
            continue
        kept.append(i)
        rest = slice(i + 1, None)
        width = (np.minimum(x1[i], x1[rest]) - np.maximum(x0[i], x0[rest])).clip(min=0)
        height = (np.minimum(y1[i], y1[rest]) - np.maximum(y0[i], y0[rest])).clip(min=0)
        intersection = width * height
        with np.errstate(invalid="ignore"):  # two boxes without area: 0 / 0 is no overlap
            overlap = intersection / (areas[i] + areas[rest] - intersection)
        alive[rest] &= ~(overlap > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]
