"""Prompts in tensors: the labels that complete them, and checks of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import require
from ..system.tensors import is_making_graph, is_plain, is_wrapped
from .checks import check_coordinates, check_finite, check_labels, check_mask_inputs
from .labels import LABEL_BOX_BOTTOM_RIGHT, LABEL_BOX_TOP_LEFT, LABEL_PADDING


def append_padding_point(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Append the padding point of a prompt without a box to points [P, N, 2] and labels [P, N]."""
    padded_points = torch.cat([points, points.new_zeros(points.shape[0], 1, 2)], dim=1)
    padding = labels.new_full((labels.shape[0], 1), LABEL_PADDING)
    return padded_points, torch.cat([labels, padding], dim=1)


def box_labels(corners: Tensor) -> Tensor:
    """Return the labels [P, 2] of box corners [P, 2, 2]."""
    pair = torch.arange(LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT + 1, device=corners.device)
    return pair.expand(corners.shape[0], 2)


def check_prompts(
    points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None, corners: bool = False
) -> None:
    """Raise ``ValueError`` for values of prompts that no model takes; with ``corners`` points may be corners of boxes.

    Only values on the CPU are read; values of traced graphs or of ``torch.func`` cannot be.
    """
    for name, values, check in (
        ("points", points and points[0], check_coordinates),
        ("boxes", boxes, check_coordinates),
        ("mask_inputs", masks, check_finite),
    ):
        if values is not None and _readable(values):
            check(name, values)
    if points is not None and _readable(points[1]):
        check_labels(points[1], corners)


def _readable(values: Tensor) -> bool:
    if is_making_graph():
        return False
    return not is_wrapped(values) and is_plain(values) and values.device.type == "cpu"


def check_prompt_tensors(
    coords: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None,
    masks: Tensor | None,
    mask_size: tuple[int, int],
    corners: bool = False,
) -> None:
    """Check the prompts of an official predictor's call: their shapes, and values that are on the CPU.

    Args:
        coords, labels: [P, N, 2] and [P, N]; with ``corners`` points may be corners of boxes.
        boxes: [P, 4].
        masks: [P, 1, h, w] or [1, 1, h, w].
        mask_size: (h, w) that the model takes.

    Raises:
        TypeError: no tensor.
        ValueError: shapes that do not agree, NaN, infinity or an unknown label.
    """
    given = {"point_coords": coords, "point_labels": labels, "boxes": boxes, "mask_input": masks}
    for name, tensor in given.items():
        require(name, tensor, (Tensor, type(None)), "a torch.Tensor (predict takes arrays)")
    counts = {}
    if coords is not None:
        if labels is None:
            raise ValueError("point_labels must be given with point_coords")
        if coords.ndim != 3 or coords.shape[-1] != 2:
            raise ValueError(f"point_coords must be [P, N, 2], got {list(coords.shape)}")
        if labels.shape != coords.shape[:2]:
            raise ValueError(f"point_labels must be {list(coords.shape[:2])}, got {list(labels.shape)}")
        counts["point_coords"] = coords.shape[0]
    if boxes is not None:
        if boxes.shape[-1:] != (4,) or boxes.ndim not in (2, 3) or boxes.numel() != 4 * boxes.shape[0]:
            raise ValueError(f"boxes must be [P, 4], got {list(boxes.shape)}")
        counts["boxes"] = boxes.shape[0]
    if len(set(counts.values())) > 1:
        raise ValueError(f"the number of prompts differs: {counts}")
    if masks is not None:
        if masks.ndim != 4 or masks.shape[1] != 1:
            raise ValueError(f"mask_input must be [P, 1, h, w], got {list(masks.shape)}")
        check_mask_inputs(masks.shape, mask_size)
        counts["mask_input"] = masks.shape[0]
        if len({*counts.values(), 1}) > 2:
            raise ValueError(f"the number of prompts differs: {counts}")
    for name, tensor in (("point_coords", coords), ("boxes", boxes), ("mask_input", masks)):
        if tensor is not None and tensor.device.type == "cpu":
            check_finite(name, tensor)
    if coords is not None and labels is not None and labels.device.type == "cpu":
        check_labels(labels, corners)
