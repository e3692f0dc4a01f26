"""Measures of the distance of one model's answers from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.overlap import mask_iou, pairwise_mask_iou
from .prompts import Answers

_BAND = 0.02  # of the diagonal, of boundary IoU
_MATCH = 0.9  # IoU from which two automatic masks are one


@dataclass(frozen=True)
class Measures:
    """Distances over all images.

    Attributes:
        embedding: relative L2 distance of the embeddings, the mean over images.
        sqnr: -20 log10 of it, in dB.
        box_iou, box_iou_p5, box_iou_least: IoU of the masks of boxes: mean, 5th percentile, least.
        boundary_iou: mean IoU of the bands along their contours, of 2 % of the image's diagonal.
        click_iou: mean IoU of the three masks of clicks.
        best_changed: share of clicks of which another mask is rated best.
        drift, drift_most: |difference| of predicted IoU, of all masks: mean and largest.
        automatic_f1: F1 of the automatic masks, matched one to one at IoU 0.9.
        automatic_ratio: number of automatic masks over that of the other model.
        crossed: share of click masks whose predicted IoU crossed the threshold of automatic masks.
        masks: masks of boxes, of clicks and automatic ones of the other model.
    """

    embedding: float
    sqnr: float
    box_iou: float
    box_iou_p5: float
    box_iou_least: float
    boundary_iou: float
    click_iou: float
    best_changed: float
    drift: float
    drift_most: float
    automatic_f1: float
    automatic_ratio: float
    crossed: float
    masks: tuple[int, int, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Sample(NamedTuple):
    """Distances on one image, whose masks are not kept: per box, per click mask, or counts."""

    embedding: float
    box_iou: Tensor
    boundary_iou: Tensor
    click_iou: Tensor
    best_changed: Tensor
    drift: Tensor
    crossed: Tensor
    matched: int
    found: int
    found_by_truth: int


def compare(truth: Answers, answers: Answers, threshold: float) -> Sample:
    """Compare the answers of two models to the same prompts on one image.

    Args:
        truth, answers: of the model, and of the one in fewer bits.
        threshold: predicted IoU above which automatic masks are kept.
    """
    a, b = truth, answers
    return Sample(
        embedding=float((b.embedding - a.embedding).norm() / a.embedding.norm()),
        box_iou=mask_iou(a.box_masks, b.box_masks),
        boundary_iou=mask_iou(boundary(a.box_masks), boundary(b.box_masks)),
        click_iou=mask_iou(a.click_masks, b.click_masks).flatten(),
        best_changed=a.click_iou.argmax(1) != b.click_iou.argmax(1),
        drift=torch.cat([(b.box_iou - a.box_iou).abs(), (b.click_iou - a.click_iou).abs().flatten()]),
        crossed=((a.click_iou > threshold) != (b.click_iou > threshold)).flatten(),
        matched=matches(a.automatic, b.automatic),
        found=len(b.automatic),
        found_by_truth=len(a.automatic),
    )


def measure(samples: Sequence[Sample]) -> Measures:
    """Sum up the distances on all images."""
    embedding = sum(sample.embedding for sample in samples) / len(samples)
    boxes, boundaries, clicks, best, drift, crossed = (
        torch.cat([getattr(sample, name).double() for sample in samples])
        for name in ("box_iou", "boundary_iou", "click_iou", "best_changed", "drift", "crossed")
    )
    matched, count, count_truth = (
        sum(getattr(sample, name) for sample in samples) for name in ("matched", "found", "found_by_truth")
    )
    return Measures(
        embedding=embedding,
        sqnr=-20 * math.log10(embedding) if embedding > 0 else math.inf,
        box_iou=_mean(boxes),
        box_iou_p5=float(boxes.quantile(0.05)) if len(boxes) else 1.0,
        box_iou_least=float(boxes.min()) if len(boxes) else 1.0,
        boundary_iou=_mean(boundaries),
        click_iou=_mean(clicks),
        best_changed=_mean(best),
        drift=_mean(drift),
        drift_most=float(drift.max()),
        automatic_f1=2 * matched / (count + count_truth) if count + count_truth else 1.0,
        automatic_ratio=count / count_truth if count_truth else 1.0 if count == 0 else math.inf,
        crossed=_mean(crossed),
        masks=(len(boxes), len(clicks), count_truth),
    )


def boundary(masks: Tensor) -> Tensor:
    """Return the pixels of masks [N, H, W] within 2 % of the diagonal from their contours (arXiv 2103.16562)."""
    if len(masks) == 0:
        return masks
    reach = max(1, round(_BAND * math.hypot(*masks.shape[-2:])))
    outside = F.pad((~masks).float()[:, None], (1, 1, 1, 1), value=1.0)  # the border of the image is a contour
    near = F.max_pool2d(outside, (2 * reach + 1, 1), 1, (reach, 0))
    near = F.max_pool2d(near, (1, 2 * reach + 1), 1, (0, reach))
    return masks & (near[:, 0, 1:-1, 1:-1] > 0)


def matches(a: Tensor, b: Tensor) -> int:
    """Return how many masks [N, H, W] and [M, H, W] are pairs at IoU 0.9, which no mask is in two of.

    Above an IoU of 0.5 a mask overlaps at most one of a set of disjoint masks so; here the best pairs come first.
    """
    iou, count = pairwise_mask_iou(a, b), 0
    for flat in iou.flatten().argsort(descending=True).tolist():
        row, column = divmod(flat, len(b))
        if iou[row, column] < _MATCH:
            # Pairs that were taken are marked with -1, and lie behind the others.
            if iou[row, column] >= 0:
                break
            continue
        iou[row], iou[:, column] = -1, -1
        count += 1
    return count


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 1.0
