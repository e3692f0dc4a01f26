"""From a photograph in 8 bits to the encoder's input in one pass: resize, normalise, pad.

    resized = A_h image A_w^T                       antialiased bilinear, a triangle of taps an axis
    out[c, y, x] = (resized[y, x, c] - mean[c]) / std[c]      0 right of and below the resized image

The taps are those of Pillow's ``BILINEAR`` and of ``interpolate(antialias=True)``. Pillow rounds to 8 bits after each
axis and this does not: a value differs from Pillow's by a level at the most.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import select_implementation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def preprocess_image(
    image: Tensor,
    size: tuple[int, int],
    image_size: int,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> Tensor:
    """Resize to ``size``, normalise, pad to a square.

    Args:
        image: [H, W, 3] uint8, any strides.
        size: (height, width) of the resized image.
        image_size: side of the square.
        mean, std: of each channel, 3 elements of any shape, in levels of 0..255.
        dtype: of the result.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [3, image_size, image_size].

    Raises:
        ValueError: another shape or dtype, a ``size`` that does not fit the square, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.

    Source: ``ResizeLongestSide.apply_image`` and ``Sam.preprocess`` of segment-anything.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(f"the image must be [H, W, 3] of uint8, got {list(image.shape)} of {image.dtype}")
    height, width = size
    if not 1 <= min(size) <= max(size) <= image_size:
        raise ValueError(f"size must be between 1x1 and {image_size}x{image_size}, got {height}x{width}")
    mean, std = mean.detach().reshape(3), std.detach().reshape(3)
    chosen = select_implementation("preprocess_image", kernels, image.device, _constraint(dtype))
    if chosen == "reference":
        return reference(image, size, image_size, mean, std).to(dtype)
    if chosen == "torch":
        return eager(image, size, image_size, mean, std).to(dtype)
    from .kernel import preprocess_image_triton

    return preprocess_image_triton(image, height, width, image_size, mean.float(), std.float(), dtype)


def reference(image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """The formula with whole matrices, in the dtype of ``mean``."""
    rows, columns = (_matrix(inputs, outputs).to(mean) for inputs, outputs in zip(image.shape[:2], size, strict=True))
    resized = rows @ image.permute(2, 0, 1).to(mean.dtype) @ columns.T
    return _normalize_and_pad(resized, image_size, mean, std)


def eager(image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """An axis after the other, tap by tap."""
    pixels = image.permute(2, 0, 1).float()
    for dim, outputs in ((1, size[0]), (2, size[1])):
        first, weights = (torch.from_numpy(table).to(image.device) for table in axis(pixels.shape[dim], outputs))
        shape = [-1 if at == dim else 1 for at in range(3)]
        total = torch.zeros((), device=image.device, dtype=pixels.dtype)
        for tap, weight in enumerate(weights.unbind(1)):
            total = total + pixels.index_select(dim, first + tap) * weight.view(shape)
        pixels = total
    return _normalize_and_pad(pixels, image_size, mean, std)


def _normalize_and_pad(pixels: Tensor, image_size: int, mean: Tensor, std: Tensor) -> Tensor:
    height, width = pixels.shape[1:]
    normalized = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return F.pad(normalized, (0, image_size - width, 0, image_size - height))


@lru_cache(maxsize=64)
def axis(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Output i is the sum over t of ``weights[i, t] * input[first[i] + t]``: first [out] int32, weights [out, taps]."""
    scale = inputs / outputs
    support = max(scale, 1.0)
    centre = (np.arange(outputs) + 0.5) * scale
    begin = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), inputs)
    taps = int((end - begin).max())
    first = np.minimum(begin, inputs - taps)
    places = first[:, None] + np.arange(taps)
    weights = np.maximum(1 - np.abs(places + 0.5 - centre[:, None]) / support, 0)
    weights *= (begin[:, None] <= places) & (places < end[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return first.astype(np.int32), weights.astype(np.float32)


def _matrix(inputs: int, outputs: int) -> Tensor:
    first, weights = axis(inputs, outputs)
    matrix = np.zeros((outputs, inputs), np.float32)
    places = first[:, None] + np.arange(weights.shape[1])
    np.put_along_axis(matrix, places, weights, axis=1)
    return torch.from_numpy(matrix)


def _constraint(dtype: torch.dtype) -> str | None:
    """What keeps the Triton form from these inputs."""
    if dtype not in DTYPES:
        return f"the result must be fp32, fp16 or bf16, got {dtype}"
    return None
