"""From the decoder's logits to masks of the image: stability, area, box and bits, without logits of full size.

For logits M of one mask, with the two bilinear resizes of segment-anything as one linear map (``resize_map``):

    L = A_h M A_w^T                                    [H, W], never stored
    inside, outside, area = |L > t + offset|, |L > t - offset|, |L > t|
    box = first and last column and row of L > t
    packed[x, k] bit b = L[32 k + b, x] > t            words along the columns, as COCO's runs go

The taps of A are convex, so a tile whose logits all lie on one side of the thresholds is decided by their least and
greatest. A pixel whose logit is within rounding of a threshold (1e-5 of the largest) may fall either way.

Source: ``postprocess_masks`` and ``utils/amg.py`` of segment-anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import select_implementation
from . import tiles
from .resize_map import TILE, Resizing

__all__ = ["MaskStatistics", "Resizing", "mask_statistics", "pack_masks", "packed_masks", "reference", "unpack_masks"]

_MASKS_AT_ONCE = 16  # of the reference: 4 MiB each at 1024 x 1024


class MaskStatistics(NamedTuple):
    """What decides whether a mask is worth making.

    Attributes:
        inside, outside: [N] int64, pixels above threshold + offset and above threshold - offset.
        area: [N] int64, pixels of the mask.
        boxes: [N, 4] int64, x0, y0, x1, y1 with the last column and row included; zeros for an empty mask.
    """

    inside: Tensor
    outside: Tensor
    area: Tensor
    boxes: Tensor

    @property
    def stability(self) -> Tensor:
        """[N] fp32, the stability score inside / outside; NaN where both are 0."""
        return self.inside.float() / self.outside.float()


def mask_statistics(
    low_res: Tensor, resizing: Resizing, *, threshold: float = 0.0, offset: float = 1.0, kernels: str = "auto"
) -> MaskStatistics:
    """Counts and boxes of masks at their full size.

    Args:
        low_res: [N, h, w] logits, any strides.
        resizing: the sizes between logits and masks.
        threshold: logits above it are in the mask.
        offset: how far stability moves the threshold.
        kernels: "reference", "torch", "triton" or "auto".

    Raises:
        ValueError: shapes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    low_res, resizing = low_res.detach(), _check(low_res, resizing)
    chosen = select_implementation("mask_statistics", kernels, low_res.device, _constraint(low_res))
    if chosen == "reference":
        parts = [_statistics_of(reference(part, resizing), threshold, offset) for part in low_res.split(_MASKS_AT_ONCE)]
        return MaskStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))
    if chosen == "torch":
        counts, boxes = tiles.statistics(low_res, resizing, threshold, offset)
        return MaskStatistics(counts[0], counts[1], counts[2], boxes)
    from .kernel import mask_statistics_triton

    numbers = mask_statistics_triton(
        low_res, resizing.image_size, *resizing.input_size, *resizing.output_size, threshold, offset
    ).long()
    area = numbers[:, 2]
    return MaskStatistics(numbers[:, 0], numbers[:, 1], area, numbers[:, 3:] * (area > 0)[:, None])


def packed_masks(low_res: Tensor, resizing: Resizing, *, threshold: float = 0.0, kernels: str = "auto") -> Tensor:
    """Masks at their full size, a bit a pixel.

    Args, errors: as :func:`mask_statistics`.

    Returns:
        [N, width, ceil(height / 32)] int32: bit b of word k of column x is the pixel in row 32 k + b. Bits behind
        the last row are 0.
    """
    low_res, resizing = low_res.detach(), _check(low_res, resizing)
    chosen = select_implementation("packed_masks", kernels, low_res.device, _constraint(low_res))
    if chosen == "reference":
        parts = [pack_masks(reference(part, resizing) > threshold) for part in low_res.split(_MASKS_AT_ONCE)]
        return torch.cat(parts)
    if chosen == "torch":
        return tiles.packed(low_res, resizing, threshold)
    from .kernel import packed_masks_triton

    return packed_masks_triton(low_res, resizing.image_size, *resizing.input_size, *resizing.output_size, threshold)


def pack_masks(masks: Tensor) -> Tensor:
    """Masks [N, height, width] bool as the words of :func:`packed_masks`."""
    columns = F.pad(masks.bool().transpose(1, 2), (0, -masks.shape[1] % TILE))
    return tiles.pack_bits(columns.unflatten(2, (-1, TILE)))


def unpack_masks(packed: Tensor, height: int) -> Tensor:
    """The words of :func:`packed_masks` as [N, height, width] bool."""
    bits = (packed[..., None] >> torch.arange(TILE, dtype=torch.int32, device=packed.device)) & 1
    return bits.bool().flatten(2)[:, :, :height].transpose(1, 2)


def reference(low_res: Tensor, resizing: Resizing) -> Tensor:
    """The logits of full size by the official two resizes, [N, h, w] -> [N, height, width]; at least fp32."""
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
        places = torch.arange(line.shape[1], device=line.device)
        return places.where(line, line.shape[1]).amin(dim=1), places.where(line, -1).amax(dim=1)

    (left, right), (top, bottom) = ends(mask.any(dim=1)), ends(mask.any(dim=2))
    boxes = torch.stack([left, top, right, bottom], dim=1) * (area > 0)[:, None]
    return MaskStatistics(inside, outside, area, boxes)


def _check(low_res: Tensor, resizing: Resizing) -> Resizing:
    if low_res.ndim != 3 or not low_res.is_floating_point() or min(low_res.shape[1:]) < 1:
        raise ValueError(f"low_res must be logits [N, h, w], got {list(low_res.shape)} of {low_res.dtype}")
    resizing = Resizing(*resizing)
    sides = (*resizing.input_size, *resizing.output_size)
    if min(sides) < 1 or max(resizing.input_size) > resizing.image_size:
        raise ValueError(f"input_size must lie in the image_size square and no side be under 1, got {resizing}")
    return resizing


def _constraint(low_res: Tensor) -> str | None:
    """What keeps the Triton form from these inputs."""
    if low_res.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"low_res must be fp32, fp16 or bf16, got {low_res.dtype}"
    return None
