"""Resized pixels as the encoder's input tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def normalize_and_pad(pixels: Tensor, mean: Tensor, std: Tensor, image_size: int) -> Tensor:
    """Normalise [..., 3, h, w] in 0..255 and zero-pad the bottom and the right to [..., 3, image_size, image_size]."""
    height, width = pixels.shape[-2:]
    normalized = (pixels - mean) / std
    return F.pad(normalized, (0, image_size - width, 0, image_size - height))
