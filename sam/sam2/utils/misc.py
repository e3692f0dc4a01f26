"""Small helpers around masks and prompts: ``sam2.utils.misc``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import require
from ...masks.regions import areas_of, label_regions


def get_sdpa_settings() -> tuple[bool, bool, bool]:
    """Return what the official attention asks of the GPU before it chooses a backend.

    Returns:
        whether it is older than Volta, or none; whether flash attention runs on it; whether the plain products stay
        allowed beside it.
    """
    if not torch.cuda.is_available():
        return True, False, True
    major = torch.cuda.get_device_properties(0).major
    return major < 7, major >= 8, major < 8


def get_connected_components(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Label the 8-connected regions of masks, on any device.

    Args:
        mask: [N, 1, H, W], true or not 0 inside.

    Returns:
        labels and areas, both [N, 1, H, W] int32 and 0 outside the mask: a number of the pixel's region, and how many
        pixels it has.

    Raises:
        ValueError: another shape.
        ImportError: no SciPy, which finds regions on a CPU.
    """
    require("mask", mask, Tensor, "a torch.Tensor [N, 1, H, W]")
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"mask must be [N, 1, H, W], got {list(mask.shape)}")
    inside = mask[:, 0] != 0
    labels, sizes = label_regions(inside)
    return labels[:, None], (areas_of(labels, sizes) * inside)[:, None]


def mask_to_box(masks: Tensor) -> Tensor:
    """Return boxes [B, 1, 4] int32 around masks [B, 1, H, W] bool, last row and column included.

    An empty mask has the box W, H, -1, -1.
    """
    require("masks", masks, Tensor, "a torch.Tensor [B, 1, H, W] of bool")
    height, width = masks.shape[-2:]

    def ends(line: Tensor, length: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(length, dtype=torch.int32, device=masks.device)
        return places.where(line, length).amin(-1), places.where(line, -1).amax(-1)

    left, right = ends(masks.any(dim=-2), width)
    top, bottom = ends(masks.any(dim=-1), height)
    return torch.stack([left, top, right, bottom], dim=-1)


def fill_holes_in_mask_scores(mask: Tensor, max_area: float) -> Tensor:
    """Raise the holes of up to ``max_area`` pixels in logits [N, 1, h, w] to 0.1, on any device.

    Raises:
        ValueError: an area that is not more than 0.
    """
    if not max_area > 0:
        raise ValueError(f"max_area must be more than 0 pixels, got {max_area}")
    labels, areas = get_connected_components(mask <= 0)
    return torch.where((labels > 0) & (areas <= max_area), 0.1, mask)


def concat_points(old_point_inputs: dict[str, Tensor] | None, new_points: Tensor, new_labels: Tensor) -> dict[str, Any]:
    """Append points [B, N, 2] and labels [B, N] to those of ``old_point_inputs``, which None is none of."""
    points = {"point_coords": new_points, "point_labels": new_labels}
    if old_point_inputs is None:
        return points
    return {name: torch.cat([old_point_inputs[name], new], dim=1) for name, new in points.items()}
