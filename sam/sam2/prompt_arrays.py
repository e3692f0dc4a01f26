"""Prompts as programs give them, in arrays, lists or tensors, to tensors in pixels of a model's square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .utils.transforms import SAM2Transforms

Prompts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def prompt_tensors(
    transforms: SAM2Transforms,
    arrays: tuple[Any, Any, Any, Any],
    normalize: bool,
    size: Sequence[int],
    device: torch.device,
) -> Prompts:
    """Return prompts as :meth:`~sam.sam2.sam2_image_predictor.SAM2ImagePredictor._prep_prompts` does.

    Args:
        transforms: which scale coordinates to the square.
        arrays: points [N, 2] or [P, N, 2], their labels, boxes [4] or [P, 4], masks [1, h, w] or [P, 1, h, w]; None
            for what is not given.
        normalize: coordinates are in pixels of the image, else in 0..1 of it.
        size: (height, width) of the image.
        device: device of the tensors.

    Raises:
        TypeError: no numbers.
        ValueError: points without labels, or another shape.
    """
    point_coords, point_labels, box, mask_logits = arrays
    coords = labels = boxes = mask_input = None
    if point_coords is not None:
        if point_labels is None:
            raise ValueError("point_labels must be given with point_coords")
        points = _tensor("point_coords", point_coords, torch.float, device)
        if points.ndim not in (2, 3) or points.shape[-1] != 2:
            raise ValueError(f"point_coords must be [N, 2] or [P, N, 2], got {list(points.shape)}")
        coords = transforms.transform_coords(points, normalize=normalize, orig_hw=size)
        labels = _tensor("point_labels", point_labels, torch.int, device)
        if coords.ndim == 2:
            coords, labels = coords[None], labels[None]
    if box is not None:
        corners = _tensor("box", box, torch.float, device)
        if corners.shape[-1:] != (4,) or corners.numel() != 4 * (len(corners) if corners.ndim > 1 else 1):
            raise ValueError(f"box must be [4] or [P, 4], got {list(corners.shape)}")
        boxes = transforms.transform_boxes(corners, normalize=normalize, orig_hw=size)
    if mask_logits is not None:
        mask_input = _tensor("mask_input", mask_logits, torch.float, device)
        mask_input = mask_input[None] if mask_input.ndim == 3 else mask_input
    return mask_input, coords, labels, boxes


def _tensor(name: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        if not isinstance(values, Tensor):
            values = np.array(values)  # torch takes no negative strides
        return torch.as_tensor(values, dtype=dtype, device=device)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {values!r:.80}") from None
