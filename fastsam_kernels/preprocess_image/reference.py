"""The resize as two products with whole matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .taps import axis, normalize_and_pad


def reference(
    image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute ``preprocess_image`` in the dtype of ``mean``."""
    rows, columns = (_matrix(inputs, outputs).to(mean) for inputs, outputs in zip(image.shape[:2], size, strict=True))
    resized = rows @ image.permute(2, 0, 1).to(mean.dtype) @ columns.T
    return normalize_and_pad(resized, image_size, mean, std).to(dtype)


def _matrix(inputs: int, outputs: int) -> Tensor:
    first, weights = axis(inputs, outputs)
    matrix = np.zeros((outputs, inputs), np.float32)
    positions = first[:, None] + np.arange(weights.shape[1])
    np.put_along_axis(matrix, positions, weights, axis=1)
    return torch.from_numpy(matrix)
