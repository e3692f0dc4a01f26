"""Resizing of images, points and boxes to a longest side: ``segment_anything.utils.transforms``."""

from __future__ import annotations

from copy import deepcopy  # noqa: F401 - star imports give it
from typing import Any, Tuple  # noqa: F401, UP035 - star imports give them

import numpy as np
import torch
import torch.nn.functional as F

from ..checks import require
from ..images.geometry import resized_size
from ..images.prepare import resize, to_pil_image


class ResizeLongestSide:
    """Resizes to the longest side ``target_length``; sizes are (height, width), coordinates (x, y)."""

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize pixels [H, W, C] or [H, W] to the target size, as SAM was trained.

        Returns:
            uint8; floating-point pixels in 0..1 are multiplied by 255.

        Raises:
            TypeError, ValueError: another type, dtype or shape, or floating-point pixels outside 0..1.
        """
        picture = to_pil_image(image)
        size = self.get_preprocess_shape(picture.height, picture.width, self.target_length)
        return np.array(resize(picture, size))

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Scale points [..., 2] of the original image to the resized one, in float64; [] is an array of none."""
        points = _numbers(coords)
        if points.shape == (0,):
            return points.reshape(0, 2)
        if points.shape[-1:] != (2,):
            raise ValueError(f"points must be [..., 2], got {list(points.shape)}")
        return points * self._scale(original_size)

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Scale boxes [B, 4] as x0, y0, x1, y1, in float64; [] is an array of none."""
        corners = _numbers(boxes)
        if corners.size % 4:
            raise ValueError(f"boxes must be [B, 4], got {list(corners.shape)}")
        return self.apply_coords(corners.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def apply_image_torch(self, image: torch.Tensor) -> torch.Tensor:
        """Resize pixels [B, C, H, W] to the target size; close to ``apply_image``, not equal to it."""
        require("image", image, torch.Tensor, "a torch.Tensor [B, C, H, W]")
        if image.ndim != 4:
            raise ValueError(f"image must be [B, C, H, W], got {list(image.shape)}")
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, ...]) -> torch.Tensor:
        """Scale points [..., 2] of the original image to the resized one, in fp32."""
        require("coords", coords, torch.Tensor, "a torch.Tensor [..., 2]")
        if coords.shape[-1:] != (2,):
            raise ValueError(f"coords must be [..., 2], got {list(coords.shape)}")
        scale_x, scale_y = self._scale(original_size)
        x, y = coords.to(torch.float32).unbind(-1)
        return torch.stack([x * scale_x, y * scale_y], dim=-1)

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, ...]) -> torch.Tensor:
        """Scale boxes [B, 4] as x0, y0, x1, y1, in fp32."""
        require("boxes", boxes, torch.Tensor, "a torch.Tensor [B, 4]")
        if boxes.numel() % 4:
            raise ValueError(f"boxes must be [B, 4], got {list(boxes.shape)}")
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def _scale(self, original_size: tuple[int, ...]) -> tuple[float, float]:
        height, width = original_size
        new_height, new_width = self.get_preprocess_shape(height, width, self.target_length)
        return new_width / width, new_height / height

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Return (height, width) after resizing the longer side to ``long_side_length``."""
        return resized_size(oldh, oldw, long_side_length)


def _numbers(values: Any) -> np.ndarray:
    """Copy numbers to an array of float64."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"an array of numbers is wanted, got {type(values).__name__} {values!r:.80}") from None
