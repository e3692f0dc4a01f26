"""Masks at their full size by the official two resizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize_map import Resizing
from .statistics import MaskStatistics
from .words import pack_masks

_MASK_CHUNK = 16  # 4 MiB each at 1024 x 1024


def statistics_reference(low_res: Tensor, resizing: Resizing, threshold: float, offset: float) -> MaskStatistics:
    """Compute ``mask_statistics``, some masks at a time."""
    parts = [_statistics_of(resized(chunk, resizing), threshold, offset) for chunk in low_res.split(_MASK_CHUNK)]
    return MaskStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


def packed_reference(low_res: Tensor, resizing: Resizing, threshold: float) -> Tensor:
    """Compute ``packed_masks``, some masks at a time."""
    return torch.cat([pack_masks(resized(chunk, resizing) > threshold) for chunk in low_res.split(_MASK_CHUNK)])


def resized(low_res: Tensor, resizing: Resizing) -> Tensor:
    """Resize logits [N, h, w] twice, as officially, to [N, height, width] in at least fp32."""
    logits = low_res[:, None] if low_res.dtype == torch.float64 else low_res[:, None].float()
    height, width = resizing.input_size
    logits = F.interpolate(logits, (resizing.image_size,) * 2, mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[..., :height, :width], resizing.output_size, mode="bilinear", align_corners=False)
    return logits[:, 0]


def _statistics_of(logits: Tensor, threshold: float, offset: float) -> MaskStatistics:
    inside, outside, area = (
        (logits > cut).sum(dim=(1, 2)) for cut in (threshold + offset, threshold - offset, threshold)
    )
    mask = logits > threshold

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(line.shape[1], device=line.device)
        return positions.where(line, line.shape[1]).amin(dim=1), positions.where(line, -1).amax(dim=1)

    (left, right), (top, bottom) = ends(mask.any(dim=1)), ends(mask.any(dim=2))
    boxes = torch.stack([left, top, right, bottom], dim=1) * (area > 0)[:, None]
    return MaskStatistics(inside, outside, area, boxes)
