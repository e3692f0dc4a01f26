"""One pass from a photograph in 8 bits to the encoder's input: resize, normalise, pad.

    resized = A_h image A_w^T                       antialiased bilinear, a triangle of taps an axis
    out[c, y, x] = (resized[y, x, c] - mean[c]) / std[c]      0 right of and below the resized image

The taps are those of Pillow's ``BILINEAR`` and of ``interpolate(antialias=True)``. Pillow rounds to 8 bits after each
axis and this does not: a value differs from Pillow's by a level at the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def preprocess_image(
    image: Tensor,
    size: tuple[int, int],
    image_size: int,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
) -> Tensor:
    """Resize an image to ``size``, normalise it, and pad it to a square.

    Args:
        image: [H, W, 3] uint8, any strides.
        size: (height, width) of the resized image.
        image_size: side of the square.
        mean, std: statistics of each channel, 3 elements of any shape, in levels of 0..255.
        dtype: dtype of the result.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [3, image_size, image_size].

    Raises:
        ValueError: another shape or dtype, a ``size`` that does not fit the square, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.

    Source: ``ResizeLongestSide.apply_image`` and ``Sam.preprocess`` of segment-anything.
    """
    return PREPROCESS_IMAGE.run(kernels, *_prepare(image, size, image_size, mean, std, dtype=dtype))


def _prepare(
    image: Tensor,
    size: tuple[int, int],
    image_size: int,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[int, int], int, Tensor, Tensor, torch.dtype]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
        raise ValueError(f"the image must be [H, W, 3] of uint8, got {list(image.shape)} of {image.dtype}")
    height, width = size
    if not 1 <= min(size) <= max(size) <= image_size:
        raise ValueError(f"size must be between 1x1 and {image_size}x{image_size}, got {height}x{width}")
    return image, size, image_size, mean.detach().reshape(3), std.detach().reshape(3), dtype


PREPROCESS_IMAGE = register(
    Operation(
        "preprocess_image",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
