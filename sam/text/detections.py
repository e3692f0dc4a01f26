"""Boxes that a detector found for labels, and what is left of them: pure functions of tensors on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import nms

from ..masks.overlap import pairwise_mask_iou


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes of N objects on one image.

    Attributes:
        boxes: [N, 4] fp32 as x0, y0, x1, y1 in pixels of the image.
        scores: [N] fp32 in 0..1, the detector's own.
        label_ids: [N] int64, places in the image's list of labels.
    """

    boxes: Tensor
    scores: Tensor
    label_ids: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Tensor) -> Detections:
        """Return the detections of ``rows``, indices [M] or [N] bool."""
        return Detections(self.boxes[rows], self.scores[rows], self.label_ids[rows])

    @classmethod
    def joined(cls, parts: Sequence[Detections]) -> Detections:
        """Return the detections of several passes over one image, in their order."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "label_ids")))


@runtime_checkable
class Detector(Protocol):
    """An object that finds boxes for labels; a program's own is taken wherever it has this method."""

    def detect(
        self, images: Sequence[np.ndarray], labels: Sequence[Sequence[str]], threshold: float
    ) -> Sequence[Detections]:
        """Find the objects of each image's own labels whose score is above ``threshold``.

        Args:
            images: [H, W, 3] uint8 RGB each, of any sizes.
            labels: one list for each image, not empty, without duplicates.
            threshold: of scores, in 0..1.

        Returns:
            one :class:`Detections` an image, in the order of the images. An image's do not depend on the other
            images of the call.
        """
        ...


def clipped(found: Detections, size: tuple[int, int]) -> Detections:
    """Return the detections with their boxes cut at the edges of an image of (height, width).

    Boxes that nothing is left of are dropped.
    """
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(found.boxes.clamp(min=0), limits)
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Detections(boxes, found.scores, found.label_ids)[inside]


def above(found: Detections, thresholds: Sequence[float]) -> Detections:
    """Return the detections whose score is above the threshold of their label."""
    return found[found.scores > torch.tensor(thresholds, dtype=torch.float32)[found.label_ids]]


def centred_within(found: Detections, box: Sequence[float]) -> Detections:
    """Return the detections whose box has its centre in ``box``, edges included."""
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    x0, y0, x1, y1 = box
    low, high = torch.tensor([x0, y0], dtype=torch.float32), torch.tensor([x1, y1], dtype=torch.float32)
    return found[((centres >= low) & (centres <= high)).all(1)]


def suppressed(found: Detections, iou_threshold: float, agnostic: bool) -> Detections:
    """Return the detections that non-maximum suppression leaves, within each label or, ``agnostic``, over all."""
    groups = _groups(found.label_ids, agnostic)
    return found[_joined([rows[nms(found.boxes[rows], found.scores[rows], iou_threshold)] for rows in groups])]


def unbeaten(found: Detections, negative: Tensor, iou_threshold: float) -> Detections:
    """Return the detections of other labels than the ``negative`` ones, unless one of those beats them.

    It does where it has the higher score and the IoU of the boxes is above the threshold.

    Args:
        negative: [labels] bool.
    """
    is_negative = negative[found.label_ids]
    wanted, unwanted = found[~is_negative], found[is_negative]
    if not len(wanted) or not len(unwanted):
        return wanted
    beats = unwanted.scores[None] > wanted.scores[:, None]
    return wanted[~(beats & (box_iou(wanted.boxes, unwanted.boxes) > iou_threshold)).any(1)]


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU [N, M] of boxes [N, 4] and [M, 4], none of which is empty."""
    corners = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    intersection = corners.clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return intersection / (areas[0][:, None] + areas[1][None] - intersection)


def ordered(found: Detections) -> Detections:
    """Return the detections by label, then by falling score; equals stay in their order."""
    by_score = found.scores.sort(descending=True, stable=True).indices
    return found[by_score[found.label_ids[by_score].sort(stable=True).indices]]


def distinct_masks(
    masks: Tensor, scores: Tensor, label_ids: Tensor, iou_threshold: float, agnostic: bool = False
) -> Tensor:
    """Return the rows [M] int64, rising, of masks [N, H, W] bool that no better one of their label overlaps.

    A mask goes where its IoU with a kept one of a higher score is above the threshold. Empty masks overlap none.
    """
    kept = []
    for rows in _groups(label_ids, agnostic):
        rows = rows[scores[rows].sort(descending=True, stable=True).indices]
        iou = pairwise_mask_iou(masks[rows], masks[rows])
        stays: list[int] = []
        for place in range(len(rows)):
            if not stays or not (iou[place, stays] > iou_threshold).any():
                stays.append(place)
        kept.append(rows[stays])
    return _joined(kept).sort().values


def _groups(label_ids: Tensor, agnostic: bool) -> list[Tensor]:
    """Return the rows [M] of each label that is there, or all rows."""
    if agnostic:
        return [torch.arange(len(label_ids))]
    return [(label_ids == label).nonzero()[:, 0] for label in label_ids.unique()]


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
