"""From the decoder's low-resolution logits to masks of the original image. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .preprocess import ImageGeometry

# Masks upscaled at once: the padded-square logits of one are 4 MiB at 1024 px.
_MASKS_AT_ONCE = 16


def upscale_masks(low_res_logits: Tensor, geometry: ImageGeometry) -> Tensor:
    """Logits at the original image's size.

    Two bilinear resizes as in the official code: to the padded square, whose padding is cut off, and from the
    resized input to the original image. They do not commute with one resize, so both are made.

    Args:
        low_res_logits: [P, M, h, w].

    Returns:
        [P, M, original height, original width], same dtype.
    """
    height, width = geometry.input_size
    square = (geometry.image_size, geometry.image_size)
    padded = F.interpolate(low_res_logits, square, mode="bilinear", align_corners=False)
    return F.interpolate(padded[..., :height, :width], geometry.original_size, mode="bilinear", align_corners=False)


def masks_from_logits(low_res_logits: Tensor, geometry: ImageGeometry, mask_threshold: float) -> Tensor:
    """Boolean masks at the original image's size, [P, M, h, w] -> [P, M, original height, original width].

    Float logits of that size exist for a few masks at a time only.
    """
    prompts, masks = low_res_logits.shape[:2]
    flat = low_res_logits.flatten(0, 1)
    out = torch.empty((len(flat), *geometry.original_size), dtype=torch.bool, device=flat.device)
    for start in range(0, len(flat), _MASKS_AT_ONCE):
        rows = slice(start, start + _MASKS_AT_ONCE)
        torch.gt(upscale_masks(flat[rows, None], geometry)[:, 0], mask_threshold, out=out[rows])
    return out.unflatten(0, (prompts, masks))
