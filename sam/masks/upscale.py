"""From the decoder's low-resolution logits to masks of the original image. Pure functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import Resizing, above, requires_autograd

from ..images.geometry import ImageGeometry
from ..system.device_profile import device_profile


def upscale_masks(low_res_logits: Tensor, geometry: ImageGeometry) -> Tensor:
    """Upscale logits to the original image's size.

    Bilinear resizes as in the official code. Where the image was stretched there is one. Else there are two: to the
    padded square, whose padding is cut off, and from the resized input to the original image. They do not commute with
    one resize, so both are made; the second is left out where the image was not resized, as it would change nothing.

    Args:
        low_res_logits: [P, M, h, w].

    Returns:
        [P, M, original height, original width], same dtype.
    """
    if geometry.is_stretched:
        return _resize(low_res_logits, geometry.original_size)
    height, width = geometry.input_size
    padded = _resize(low_res_logits, (geometry.image_size,) * 2)
    cut = padded[..., :height, :width]
    if tuple(geometry.original_size) == (height, width):
        return cut.contiguous()
    return F.interpolate(cut, geometry.original_size, mode="bilinear", align_corners=False)


def resizing_of(geometry: ImageGeometry, low_res_size: tuple[int, int]) -> Resizing:
    """Return :func:`upscale_masks` of square logits as the operations of ``fastsam_kernels`` take it.

    Their first resize is one to the same size where the image was stretched.
    """
    if geometry.is_stretched:
        return Resizing(low_res_size[0], low_res_size, geometry.original_size)
    return Resizing(geometry.image_size, geometry.input_size, geometry.original_size)


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, [P, M, h, w] -> [P, M, *size]."""
    is_whole = size[0] % logits.shape[2] == size[1] % logits.shape[3] == 0
    is_wide = logits.dtype in (torch.float32, torch.float64)
    if logits.device.type != "cpu" or not (is_whole and is_wide) or requires_autograd(logits):
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)
    out = logits.new_empty((*logits.shape[:2], *size))
    for small, large in zip(logits.flatten(0, 1), out.flatten(0, 1), strict=True):
        _enlarge(small, large)
    return out


def _enlarge(small: Tensor, large: Tensor) -> None:
    """Write the bilinear resize of ``small`` [h, w] into ``large``, whole numbers of times its height and width.

    Every k-th column, and every k-th row, has the same two weights, so each is a plain mix of two neighbours. PyTorch's
    own resize gathers four values per pixel and takes three times as long on a CPU.
    """
    height, width = small.shape
    row_factor, column_factor = large.shape[0] // height, large.shape[1] // width
    framed = F.pad(small[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    wide = small.new_empty((height + 2, width, column_factor))
    for phase, (first, weight) in enumerate(_mixes(column_factor)):
        columns = framed[:, first : first + width], framed[:, first + 1 : first + 1 + width]
        torch.lerp(*columns, weight, out=wide[..., phase])
    rows = wide.flatten(1)
    for phase, (first, weight) in enumerate(_mixes(row_factor)):
        part = large[phase::row_factor]
        torch.lerp(rows[first : first + height], rows[first + 1 : first + 1 + height], weight, out=part)


def _mixes(factor: int) -> list[tuple[int, float]]:
    """Return the first of two neighbours, in a frame one wide, and the weight of the other, for each of the phases."""
    offsets = [(phase + 0.5) / factor - 0.5 for phase in range(factor)]
    return [(math.floor(offset) + 1, offset - math.floor(offset)) for offset in offsets]


def masks_from_logits(low_res_logits: Tensor, geometry: ImageGeometry, mask_threshold: float) -> Tensor:
    """Return boolean masks at the original image's size, [P, M, h, w] -> [P, M, original height, original width].

    Float logits of that size exist for a few masks at a time only.
    """
    prompts, masks = low_res_logits.shape[:2]
    flat = low_res_logits.flatten(0, 1)
    out = torch.empty((len(flat), *geometry.original_size), dtype=torch.bool, device=flat.device)
    chunk = device_profile(flat.device).masks_per_chunk
    for start in range(0, len(flat), chunk):
        rows = slice(start, start + chunk)
        above(upscale_masks(flat[rows, None], geometry)[:, 0].detach(), mask_threshold, out[rows])
    return out.unflatten(0, (prompts, masks))
