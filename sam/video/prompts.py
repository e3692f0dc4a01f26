"""Prompts of one object on one frame, from what callers give."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts.checks import check_coordinates, check_labels
from ..prompts.labels import CORNER_LABELS
from ..prompts.prompt import Prompt
from .state import State


def frame_number(state: State, frame_idx: Any) -> int:
    """Return the number of a frame of the video.

    Raises:
        TypeError: no whole number.
        ValueError: the video has no such frame.
    """
    frame = operator.index(frame_idx)
    if not 0 <= frame < state["num_frames"]:
        raise ValueError(f"frame_idx must be a frame of the video, 0 to {state['num_frames'] - 1}, got {frame}")
    return frame


def points_of(points: Any, labels: Any, box: Any, clear_old_points: bool) -> tuple[Tensor, Tensor]:
    """Return a prompt as points [1, N, 2] float32 and labels [1, N] int32; the corners of a box come first.

    Raises:
        ValueError: points without labels, no prompt at all, a box beside older points, or wrong shapes or values.
    """
    if (points is None) != (labels is None):
        raise ValueError("points and labels must be provided together")
    if points is None and box is None:
        raise ValueError("at least one of points or box must be provided as input")
    coords = torch.zeros(1, 0, 2) if points is None else _tensor("points", points, torch.float32)
    kinds = torch.zeros(1, 0, dtype=torch.int32) if labels is None else _tensor("labels", labels, torch.int32)
    coords = coords[None] if coords.ndim == 2 else coords
    kinds = kinds[None] if kinds.ndim == 1 else kinds
    if coords.ndim != 3 or len(coords) != 1 or coords.shape[2] != 2:
        raise ValueError(f"points must be [N, 2] or [1, N, 2], got {list(coords.shape)}")
    if kinds.shape != coords.shape[:2]:
        raise ValueError(f"labels must be one per point, {coords.shape[1]} of them, got {list(kinds.shape)}")
    if box is not None:
        if not clear_old_points:
            raise ValueError("a box comes before all points, so it needs clear_old_points=True")
        corners = _tensor("box", box, torch.float32)
        if corners.numel() != 4:
            raise ValueError(f"box must be one x0, y0, x1, y1, got {list(corners.shape)}")
        coords = torch.cat([corners.reshape(1, 2, 2).to(coords.device), coords], dim=1)
        corner_labels = torch.tensor([CORNER_LABELS], dtype=torch.int32, device=kinds.device)
        kinds = torch.cat([corner_labels, kinds], dim=1)
    check_coordinates("points", coords)
    check_labels(kinds, corners=True)
    return coords, kinds


def mask_of(mask: Any, image_size: int, device: torch.device) -> Tensor:
    """Return a mask [H, W] as [1, 1, image_size, image_size] float32, 1 inside.

    Of arrays everything but 0 is inside. Tensors may also hold parts of 1, and all above 1 is 1; where the size is
    another, their resized parts are cut at 0.5, as those of arrays are.

    Raises:
        ValueError: another shape.
    """
    if not isinstance(mask, Tensor):
        mask = torch.from_numpy(np.asarray(mask) != 0)
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"mask must be [H, W], got {list(mask.shape)}")
    given = mask.to(device).float().clamp(0, 1)[None, None]
    size = (image_size, image_size)
    if given.shape[-2:] == size:
        return given
    resized = F.interpolate(given, size=size, mode="bilinear", align_corners=False, antialias=True)
    return (resized >= 0.5).float()


def check_prompt(prompt: Any) -> None:
    """Check a prompt of an object: a :class:`sam.Prompt` of points, a box or both, or a mask [H, W].

    Raises:
        TypeError: neither.
        ValueError: an empty prompt, or one with low-resolution logits.
    """
    if isinstance(prompt, Prompt):
        if prompt.mask_input is not None:
            raise ValueError("a mask of a video is given as an array [H, W] and not as mask_input")
        if prompt.box is None and (prompt.points is None or len(prompt.points) == 0):
            raise ValueError("the prompt is empty: give points, a box or a mask")
        return
    shape = getattr(prompt, "shape", None)
    if shape is None or len(shape) != 2 or 0 in shape:
        kind = type(prompt).__name__ if shape is None else f"shape {list(shape)}"
        raise TypeError(f"a prompt must be a sam.Prompt or a mask [H, W], got {kind}")


def _tensor(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    """Return a copy of ``values``, so that the state keeps what was given."""
    if isinstance(values, Tensor):
        return values.detach().to(dtype, copy=True)
    try:
        return torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers: {error}") from None
