"""The losses of SAM: focal and dice for masks, best of three for ambiguous prompts, error of the predicted IoU.

Throughout: N prompts, 4 masks per prompt (the single mask first, then the three alternatives), targets that say how
much of each low-resolution pixel an object covers. Source: Segment Anything (arXiv 2304.02643), appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_WEIGHT = 20.0
_FOCAL_ALPHA, _FOCAL_GAMMA = 0.25, 2.0
# Both outputs answer every prompt in use, so the one not meant for it learns a little too.
_SINGLE_MASK_ON_CLICKS = 0.3
_ALTERNATIVES_ON_OTHERS = 0.3
_IOU_BETA = 0.05  # errors of the predicted IoU beyond this count by their size, not by its square
_ALL_ALTERNATIVES = 0.05  # share of the mean over the three: none of them dies

MaskLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    """Hold means over the prompts; ``iou`` [N, 4] is the true IoU of every mask, without gradient."""

    mask: Tensor
    iou_head: Tensor
    iou: Tensor


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the pixels of alpha_t (1 - p_t)^2 CE; soft targets in 0..1. [..., h, w] -> [...]."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    hit = probability * targets + (1 - probability) * (1 - targets)
    alpha = _FOCAL_ALPHA * targets + (1 - _FOCAL_ALPHA) * (1 - targets)
    return (alpha * (1 - hit) ** _FOCAL_GAMMA * cross_entropy).mean((-1, -2))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - (2 p.t + 1) / (sum p + sum t + 1): [..., h, w] -> [...]."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum((-1, -2))
    return 1 - (2 * overlap + 1) / (probability.sum((-1, -2)) + targets.sum((-1, -2)) + 1)


def balanced_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return cross entropy in which object and ground count alike: [..., h, w] -> [...].

    Focal and dice have a plateau where everything is ground; fresh weights leave it with this.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    on_object = (cross_entropy * targets).sum((-1, -2)) / targets.sum((-1, -2)).clamp(min=1)
    ground = 1 - targets
    on_ground = (cross_entropy * ground).sum((-1, -2)) / ground.sum((-1, -2)).clamp(min=1)
    return on_object + on_ground


@torch.no_grad()
def mask_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the IoU [N, M] of masks [N, M, h, w], enlarged as the predictor does it, with the truth [N, H, W] bool.

    A small object has a handful of low-resolution pixels, too few to say how good a mask is.
    """
    predicted = F.interpolate(logits.float(), truth.shape[1:], mode="bilinear", align_corners=False) > 0
    pixels = truth.flatten(1).float()
    counted = predicted.flatten(2).float() @ torch.stack([pixels, torch.ones_like(pixels)], 2)  # exact: below 2^24
    overlap, size = counted.unbind(2)
    return overlap / (size + pixels.sum(1, keepdim=True) - overlap).clamp(min=1)


def prompt_losses(
    logits: Tensor, iou: Tensor, targets: Tensor, truth: Tensor, is_click: Tensor, balance: float = 0.0
) -> Losses:
    """Return the losses of one round of prompts.

    Args:
        logits: [N, 4, h, w].
        iou: [N, 4] as predicted.
        targets: [N, h, w], the share of each pixel that the object covers.
        truth: [N, H, W] bool.
        is_click: [N] bool, a single click: the best of the three alternatives counts, by its loss.
        balance: share of the class-balanced start, from 1 to 0.
    """
    logits, expanded = logits.float(), targets[:, None].expand(-1, logits.shape[1], -1, -1)
    each = FOCAL_WEIGHT * focal_loss(logits, expanded)
    if balance > 0:
        each = balance * balanced_cross_entropy(logits, expanded) + (1 - balance) * each
    each = each + dice_loss(logits, expanded)  # [N, 4]
    single, alternatives = each[:, 0], each[:, 1:]
    best = (1 - _ALL_ALTERNATIVES) * alternatives.min(1).values + _ALL_ALTERNATIVES * alternatives.mean(1)
    on_click = best + _SINGLE_MASK_ON_CLICKS * single
    on_other = single + _ALTERNATIVES_ON_OTHERS * best
    true_iou = mask_iou(logits, truth)
    iou_head = F.smooth_l1_loss(iou.float(), true_iou, beta=_IOU_BETA)
    return Losses(torch.where(is_click, on_click, on_other).mean(), iou_head, true_iou)
