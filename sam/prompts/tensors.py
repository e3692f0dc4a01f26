"""Prompts in tensors: the labels that complete them, and checks of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..system.tensors import is_making_graph, is_plain
from .checks import check_coordinates, check_finite, check_labels
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
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return False
    return is_plain(values) and values.device.type == "cpu"
