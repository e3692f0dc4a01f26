"""From a photograph to the encoder's input: resize the longest side, normalise, pad. Pure functions.

Three frames of coordinates, all (x, y) in pixels with sizes given as (height, width): the original image, the
resized input that the model was trained to see, and the padded square around it, which shares its origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def resized_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """(height, width) after the longer side became ``long_side``, rounded half up as SAM was trained."""
    scale = long_side * 1.0 / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


@dataclass(frozen=True)
class ImageGeometry:
    """The sizes that tie an image to its embedding and its masks.

    Attributes:
        original_size: (height, width) of the image as given; masks come back in it.
        input_size: (height, width) after resizing.
        image_size: side of the padded square that the encoder sees.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    image_size: int

    def __post_init__(self) -> None:
        for name in ("original_size", "input_size"):
            height, width = (int(side) for side in getattr(self, name))
            if min(height, width) < 1:
                raise ValueError(f"{name} must be at least 1x1 (height x width), got {height}x{width}")
            object.__setattr__(self, name, (height, width))
        if max(self.input_size) > self.image_size:
            raise ValueError(f"input_size {self.input_size} does not fit the model's square of {self.image_size} px")

    @classmethod
    def of(cls, height: int, width: int, image_size: int) -> ImageGeometry:
        """The geometry of an image of ``height`` x ``width`` for a model of ``image_size``.

        Raises:
            ValueError: a side is 0, or so short that it vanishes when the longer one is resized.
        """
        if min(height, width) < 1:
            raise ValueError(f"the image is empty: {height}x{width} (height x width)")
        input_size = resized_size(height, width, image_size)
        if min(input_size) < 1:
            raise ValueError(
                f"an image of {height}x{width} (height x width) resized to {image_size} px on its longer side has a "
                f"side of 0 px; the aspect ratio may be at most 1:{2 * image_size}"
            )
        return cls((height, width), input_size, image_size)

    @property
    def scale(self) -> tuple[float, float]:
        """Factors (x, y) from the original image to the resized input."""
        return self.input_size[1] / self.original_size[1], self.input_size[0] / self.original_size[0]


def validate_image(image: Any) -> np.ndarray:
    """``image`` itself if it is an array [H, W, 3] of uint8.

    Raises:
        TypeError: not a numpy array.
        ValueError: another shape or dtype, or empty.
    """
    if not isinstance(image, np.ndarray):
        raise TypeError(f"the image must be a numpy array [H, W, 3] of uint8, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3:
        hint = {1: " (grey? np.dstack([image] * 3))", 4: " (RGBA? image[..., :3])"}
        channels = 1 if image.ndim == 2 else image.shape[-1] if image.ndim == 3 else 0
        raise ValueError(f"the image must be [H, W, 3], got {list(image.shape)}{hint.get(channels, '')}")
    if image.dtype != np.uint8:
        raise ValueError(f"the image must be uint8 in 0..255, got {image.dtype}")
    if image.size == 0:
        raise ValueError(f"the image is empty: {image.shape[0]}x{image.shape[1]} (height x width)")
    return image


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an array of uint8, [H, W] or [H, W, C], to (height, width) with PIL's antialiased bilinear filter."""
    grey = image.ndim == 3 and image.shape[2] == 1
    resized = Image.fromarray(image[..., 0] if grey else image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(resized)


def normalize_and_pad(pixels: Tensor, mean: Tensor, std: Tensor, image_size: int) -> Tensor:
    """[..., 3, h, w] in 0..255 -> [..., 3, image_size, image_size], zero-padded at the bottom and the right."""
    height, width = pixels.shape[-2:]
    normalized = (pixels - mean) / std
    return F.pad(normalized, (0, image_size - width, 0, image_size - height))


def image_to_tensor(image: np.ndarray, device: torch.device) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] uint8 on ``device``."""
    return torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)
