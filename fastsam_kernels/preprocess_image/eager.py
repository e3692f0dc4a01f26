"""The resize by PyTorch's own, which takes the same taps; on a CPU a strip of the image at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .taps import normalize_and_pad

_STRIP = 2**19  # pixels, 12 MB in fp64
_TALL = 4  # times as high as wide: rows of the result's width would take more memory than the columns


def eager(
    image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute ``preprocess_image``, in fp64 where there is one: PyTorch rounds the taps as it rounds the pixels."""
    wide = torch.float64 if image.device.type in ("cpu", "cuda") else torch.float32
    # PyTorch errs where the result is one column.
    if size[1] == 1 or (size[0] > 1 and len(image) > _TALL * image.shape[1]):
        resized = _resize(image.transpose(0, 1), (size[1], size[0]), wide).mT
    else:
        resized = _resize(image, size, wide)
    return normalize_and_pad(resized.float(), image_size, mean, std).to(dtype)


def _resize(image: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Resize [H, W, 3] to [3, h, w]. On a CPU PyTorch resizes rows before columns, so strips of rows give the same."""
    pixels = image.permute(2, 0, 1)[None]
    rows = max(1, _STRIP // image.shape[1])
    if image.device.type != "cpu" or len(image) <= rows:
        return _interpolate(pixels.to(dtype), size)[0]
    narrow = torch.empty(1, 3, len(image), size[1], dtype=dtype, device="cpu")
    for top in range(0, len(image), rows):
        strip = pixels[:, :, top : top + rows].to(dtype)
        narrow[:, :, top : top + rows] = _interpolate(strip, (strip.shape[2], size[1]))
    return _interpolate(narrow, size)[0]


def _interpolate(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)
