"""The resize one axis after the other, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor

from .taps import axis, normalize_and_pad


def eager(
    image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute ``preprocess_image``."""
    pixels = image.permute(2, 0, 1).float()
    for dim, outputs in ((1, size[0]), (2, size[1])):
        first, weights = (torch.from_numpy(table).to(image.device) for table in axis(pixels.shape[dim], outputs))
        shape = [-1 if at == dim else 1 for at in range(3)]
        total = torch.zeros((), device=image.device, dtype=pixels.dtype)
        for tap, weight in enumerate(weights.unbind(1)):
            total = total + pixels.index_select(dim, first + tap) * weight.view(shape)
        pixels = total
    return normalize_and_pad(pixels, image_size, mean, std).to(dtype)
