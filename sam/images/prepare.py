"""From a photograph to the encoder's input: check, resize the longest side, normalise, pad. Pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import require


def to_uint8(image: Any) -> np.ndarray:
    """Return pixels as uint8: an array of uint8 itself, and floating-point pixels in 0..1 times 255, rounded down.

    Raises:
        TypeError: not a numpy array, or an array of another dtype.
        ValueError: floating-point pixels outside 0..1.
    """
    require("the image", image, np.ndarray, "a numpy array [H, W, 3] of uint8")
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"the image must be uint8 in 0..255, or floating-point in 0..1, got {image.dtype}")
    low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 0.0)
    if not (255 * low > -1 and 255 * high < 256):
        raise ValueError(
            f"a floating-point image must lie in 0..1, got values from {low:g} to {high:g}; "
            "pixels in 0..255 are wanted as uint8, image.astype(np.uint8)"
        )
    return (image * 255).astype(np.uint8)


def validate_image(image: Any) -> np.ndarray:
    """Return an image [H, W, 3] as uint8, itself if it is uint8 already; see :func:`to_uint8`.

    Raises:
        TypeError: not a numpy array, or of another dtype.
        ValueError: another shape, empty, or floating-point pixels outside 0..1.
    """
    require("the image", image, np.ndarray, "a numpy array [H, W, 3] of uint8")
    if image.ndim != 3 or image.shape[2] != 3:
        hint = {1: " (grey? np.dstack([image] * 3))", 4: " (RGBA? image[..., :3])"}
        channels = 1 if image.ndim == 2 else image.shape[-1] if image.ndim == 3 else 0
        raise ValueError(f"the image must be [H, W, 3], got {list(image.shape)}{hint.get(channels, '')}")
    if image.size == 0:
        raise ValueError(f"the image is empty: {image.shape[0]}x{image.shape[1]} (height x width)")
    return to_uint8(image)


def to_pil_image(pic: np.ndarray) -> Image.Image:
    """Make a PIL image of pixels [H, W] or [H, W, C], 1 to 4 channels, as torchvision's function of this name.

    Raises:
        TypeError, ValueError: see :func:`to_uint8`; or another shape.
    """
    require("the image", pic, np.ndarray, "a numpy array [H, W, C] or [H, W]")
    if pic.ndim not in (2, 3) or (pic.ndim == 3 and pic.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"the image must be [H, W] or [H, W, C] of 1 to 4 channels, got {list(pic.shape)}")
    grey = pic[..., 0] if pic.ndim == 3 and pic.shape[2] == 1 else pic
    wide = grey.ndim == 2 and grey.dtype in (np.int16, np.int32)  # PIL has modes of one channel for these
    return Image.fromarray(grey if wide else to_uint8(grey))


def resize(img: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a PIL image to (height, width) with the antialiased bilinear filter that SAM was trained with."""
    height, width = size
    return img.resize((width, height), Image.Resampling.BILINEAR)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize pixels [H, W] or [H, W, C], as :func:`to_pil_image` takes them, to (height, width)."""
    return np.array(resize(to_pil_image(image), size))


def normalize_and_pad(pixels: Tensor, mean: Tensor, std: Tensor, image_size: int) -> Tensor:
    """[..., 3, h, w] in 0..255 -> [..., 3, image_size, image_size], zero-padded at the bottom and the right."""
    height, width = pixels.shape[-2:]
    normalized = (pixels - mean) / std
    return F.pad(normalized, (0, image_size - width, 0, image_size - height))


def image_to_tensor(image: np.ndarray, device: torch.device) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] uint8 on ``device``."""
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).to(device).permute(2, 0, 1)
