"""Resizing of images, points and boxes to a longest side: ``segment_anything.utils.transforms``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..preprocess import resize_image, resized_size


class ResizeLongestSide:
    """Resizes to the longest side ``target_length``; sizes are (height, width), coordinates (x, y)."""

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """[H, W, C] or [H, W] uint8 -> the same at the target size; the resize that SAM was trained with."""
        height, width = image.shape[:2]
        return resize_image(image, self.get_preprocess_shape(height, width, self.target_length))

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """[..., 2] in the original image -> float64 in the resized one."""
        return np.array(coords, dtype=np.float64) * self._scale(original_size)

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """[B, 4] as x0, y0, x1, y1 -> float64 [B, 4]."""
        return self.apply_coords(np.asarray(boxes).reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def apply_image_torch(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] float -> the target size. Close to ``apply_image``, not equal to it."""
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, ...]) -> torch.Tensor:
        """[..., 2] in the original image -> fp32 in the resized one."""
        scale_x, scale_y = self._scale(original_size)
        x, y = coords.to(torch.float32).unbind(-1)
        return torch.stack([x * scale_x, y * scale_y], dim=-1)

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, ...]) -> torch.Tensor:
        """[B, 4] as x0, y0, x1, y1 -> fp32 [B, 4]."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def _scale(self, original_size: tuple[int, ...]) -> tuple[float, float]:
        height, width = original_size
        new_height, new_width = self.get_preprocess_shape(height, width, self.target_length)
        return new_width / width, new_height / height

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """(height, width) after resizing the longer side to ``long_side_length``."""
        return resized_size(oldh, oldw, long_side_length)
