"""Clicks of automatic masks: the grid of each layer of crops, and the crops of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..images.geometry import ResizePolicy
from ..prompts.checks import check_finite
from ..utils.amg import generate_crop_boxes

Box = tuple[int, int, int, int]

# No image has a side of more than 2^30 pixels; how many layers one has room for is known when it comes.
MAX_LAYERS = 30


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``least <= value <= most``, which NaN never is."""
    if not least <= value <= most:
        allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def point_grid(points: Any) -> np.ndarray:
    """Return clicks [N, 2] in the unit square as an array of float64.

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    grid = np.asarray(points, dtype=np.float64)
    if grid.shape == (0,):
        return grid.reshape(0, 2)
    if grid.ndim != 2 or grid.shape[1] != 2:
        raise ValueError(f"each of point_grids must be [N, 2], got {list(grid.shape)}")
    check_finite("point_grids", grid)
    return grid


def check_layers(layers: int, size: Sequence[int]) -> None:
    """Raise ``ValueError`` where the last layer's crops of an image of ``size`` (height, width) are below a pixel.

    One layer is always allowed.
    """
    limit = max(1, max(size).bit_length() - 1)
    if layers > limit:
        raise ValueError(
            f"crop_n_layers must be at most {limit} for an image of {size[1]}x{size[0]}, got {layers}: "
            "the crops of a further layer are smaller than a pixel"
        )


def crops_of(
    size: Sequence[int],
    layers: int,
    overlap_ratio: float,
    resize_policy: ResizePolicy,
    generate: Callable[..., tuple[list[list[int]], list[int]]] = generate_crop_boxes,
) -> list[tuple[Box, int]]:
    """Return the boxes in an image of ``size`` (height, width) that clicks are made in, and the layer of each.

    Those without a pixel, before or after they are resized by ``resize_policy``, are left out.

    Raises:
        ValueError: so many layers that the last one's crops are smaller than a pixel.
    """
    check_layers(layers, size)
    crops = zip(*generate((size[0], size[1]), layers, overlap_ratio), strict=True)
    return [
        ((x0, y0, x1, y1), layer)
        for (x0, y0, x1, y1), layer in crops
        if x0 < x1 and y0 < y1 and _has_pixels(y1 - y0, x1 - x0, resize_policy)
    ]


def _has_pixels(height: int, width: int, resize_policy: ResizePolicy) -> bool:
    try:
        resize_policy(height, width)
    except ValueError:
        return False
    return True
