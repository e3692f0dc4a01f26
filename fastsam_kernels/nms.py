"""Greedy non-maximum suppression of boxes.

Boxes in falling order of score, the earlier of equal scores first; a box is dropped when its IoU with a box kept
before it exceeds the threshold. Area is (x1 - x0) * (y1 - y0), arithmetic in fp32: the decisions of
``torchvision.ops.nms`` on a CPU. No step waits for a single box: blocks of boxes are compared with the boxes kept so
far, and settle among themselves by rounds over a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BOXES_AT_ONCE = 256
_ROUNDS_AT_ONCE = 4  # of suppression between two looks at whether it has settled


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
    ranked = boxes.float()[order]
    kept, places = ranked[:0], []
    for start in range(0, len(ranked), _BOXES_AT_ONCE):
        block = ranked[start : start + _BOXES_AT_ONCE]
        alive = (~_overlaps(kept, block, iou_threshold).any(dim=0)).nonzero()[:, 0]
        block = block[alive]
        stays = _settle(_overlaps(block, block, iou_threshold).triu(diagonal=1))
        kept = torch.cat([kept, block[stays]])
        places.append(start + alive[stays])
    return order[torch.cat(places)] if places else order


def _overlaps(first: Tensor, second: Tensor, iou_threshold: float) -> Tensor:
    """[N, M] bool, which pairs of boxes have an IoU above the threshold."""
    first = first[:, None]
    corner, opposite = torch.maximum(first[..., :2], second[:, :2]), torch.minimum(first[..., 2:], second[:, 2:])
    intersection = (opposite - corner).clamp(min=0).prod(dim=2)
    union = _areas(first) + _areas(second) - intersection
    return intersection / union > iou_threshold  # two boxes without area: 0 / 0 is no overlap


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _settle(suppresses: Tensor) -> Tensor:
    """Indices that greedy suppression keeps, from which box [N, N] would suppress which later one.

    A box stays when no staying box before it suppresses it. Applied to all boxes at once this settles one more box a
    round at the least, the first ones first, and has no other fixed point.
    """
    stays = torch.ones(len(suppresses), dtype=torch.bool, device=suppresses.device)
    before = ~stays
    while not torch.equal(before, stays):
        for _ in range(_ROUNDS_AT_ONCE):
            before, stays = stays, ~(suppresses & stays[:, None]).any(dim=0)
    return stays.nonzero()[:, 0]
