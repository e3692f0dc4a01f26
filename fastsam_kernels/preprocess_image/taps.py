"""The taps of the resize, and what follows it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=64)
def axis(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the taps of one axis: output i is the sum over t of ``weights[i, t] * input[first[i] + t]``.

    ``first`` is [out] int32, ``weights`` [out, taps] fp32.
    """
    scale = inputs / outputs
    support = max(scale, 1.0)
    centre = (np.arange(outputs) + 0.5) * scale
    begin = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), inputs)
    taps = int((end - begin).max())
    first = np.minimum(begin, inputs - taps)
    positions = first[:, None] + np.arange(taps)
    weights = np.maximum(1 - np.abs(positions + 0.5 - centre[:, None]) / support, 0)
    weights *= (begin[:, None] <= positions) & (positions < end[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return first.astype(np.int32), weights.astype(np.float32)


def normalize_and_pad(pixels: Tensor, image_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise resized levels [3, h, w] and pad them to [3, image_size, image_size]."""
    height, width = pixels.shape[1:]
    normalized = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return F.pad(normalized, (0, image_size - width, 0, image_size - height))
