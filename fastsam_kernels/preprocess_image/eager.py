"""The resize by PyTorch's own, which takes the same taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .taps import normalize_and_pad


def eager(
    image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute ``preprocess_image``, in fp64 where there is one: PyTorch rounds the taps as it rounds the pixels."""
    wide = torch.float64 if image.device.type in ("cpu", "cuda") else torch.float32
    pixels = image.permute(2, 0, 1)[None].to(wide)
    # PyTorch errs where the result is one column.
    resized = _resize(pixels.mT, (1, size[0])).mT if size[1] == 1 else _resize(pixels, size)
    return normalize_and_pad(resized[0].float(), image_size, mean, std).to(dtype)


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)
