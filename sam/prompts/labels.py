"""Labels of points: what a click, a padding point or a corner of a box is to the prompt encoder."""

from __future__ import annotations

import torch
from torch import Tensor

LABEL_ABSENT = -2  # fills the token list of a shorter prompt; masked out of every attention
LABEL_PADDING = -1  # the "not a point" token
LABEL_BACKGROUND = 0
LABEL_FOREGROUND = 1
LABEL_BOX_TOP_LEFT = 2
LABEL_BOX_BOTTOM_RIGHT = 3
POINT_LABELS = (LABEL_PADDING, LABEL_BACKGROUND, LABEL_FOREGROUND)


def append_padding_point(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Points [P, N, 2] and labels [P, N] with the one padding point that a prompt without a box ends with."""
    padded_points = torch.cat([points, points.new_zeros(points.shape[0], 1, 2)], dim=1)
    padding = labels.new_full((labels.shape[0], 1), LABEL_PADDING)
    return padded_points, torch.cat([labels, padding], dim=1)


def box_labels(corners: Tensor) -> Tensor:
    """Labels [P, 2] of box corners [P, 2, 2]."""
    pair = torch.arange(LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT + 1, device=corners.device)
    return pair.expand(corners.shape[0], 2)
