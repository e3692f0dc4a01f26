"""Small modules, and prompts drawn of masks for training: ``sam2.modeling.sam2_utils``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import require
from ...modeling import common
from ...modeling.common import DropPath, LayerNorm2d
from ...modeling.memory_attention import get_activation_fn, get_clones
from ...modeling.memory_choice import select_closest_cond_frames
from ...modeling.position_encoding import get_1d_sine_pe
from ..utils.misc import mask_to_box

__all__ = [
    "MLP",
    "DropPath",
    "LayerNorm2d",
    "get_1d_sine_pe",
    "get_activation_fn",
    "get_clones",
    "get_next_point",
    "mask_to_box",
    "sample_box_points",
    "sample_one_point_from_error_center",
    "sample_random_points_from_errors",
    "select_closest_cond_frames",
]


class MLP(common.MLP):
    """``num_layers`` linears with an activation between them: [..., input_dim] -> [..., output_dim]."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        activation: type[nn.Module] = nn.ReLU,
        sigmoid_output: bool = False,
    ) -> None:
        super().__init__(input_dim, hidden_dim, output_dim, num_layers, sigmoid_output, activation)


def sample_box_points(
    masks: Tensor,
    noise: float = 0.1,
    noise_bound: int = 20,
    top_left_label: int = 2,
    bottom_right_label: int = 3,
) -> tuple[Tensor, Tensor]:
    """Draw a box around each mask whose corners are off by a share of its sides.

    Args:
        masks: [B, 1, H, W] bool.
        noise: the most that a corner is off, as a share of the box's width and height; 0 for exact boxes.
        noise_bound: the most in pixels.
        top_left_label, bottom_right_label: labels of the corners.

    Returns:
        corners [B, 2, 2] as (x, y), within the image, and their labels [B, 2] int32.
    """
    boxes, (height, width) = mask_to_box(masks), masks.shape[-2:]
    if noise > 0.0:
        sides = boxes[..., 2:] - boxes[..., :2]
        reach = (sides * noise).clamp(max=float(noise_bound)).repeat(1, 1, 2)
        drawn = boxes + (2 * torch.rand(boxes.shape, device=boxes.device) - 1) * reach
        limits = torch.tensor([width, height, width, height], device=boxes.device) - 1
        boxes = drawn.clamp(torch.zeros_like(limits), limits)
    labels = torch.tensor([[top_left_label, bottom_right_label]], dtype=torch.int, device=masks.device)
    return boxes.reshape(-1, 2, 2), labels.repeat(len(masks), 1)


def sample_random_points_from_errors(
    gt_masks: Tensor, pred_masks: Tensor | None, num_pt: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw clicks where a prediction is wrong; where it is right everywhere, on the background.

    Args:
        gt_masks: [B, 1, H, W] bool, the truth.
        pred_masks: the same of a prediction; None for an empty one.
        num_pt: clicks per mask.

    Returns:
        points [B, num_pt, 2] as (x, y) fp32 and labels [B, num_pt] int32: 1 where the object was missed, else 0.
    """
    excess, missed = _errors(gt_masks, pred_masks)
    right = ~(excess | missed).flatten(1).any(dim=1)[:, None, None, None]
    allowed = torch.stack([excess | (right & ~gt_masks), missed], dim=-1)  # [B, 1, H, W, label]
    drawn = torch.rand(len(gt_masks), num_pt, *allowed.shape[2:], device=gt_masks.device) * allowed
    indices = drawn.flatten(2).argmax(dim=2)
    pixel, width = indices // 2, gt_masks.shape[-1]
    return torch.stack([pixel % width, pixel // width], dim=2).float(), (indices % 2).int()


def sample_one_point_from_error_center(
    gt_masks: Tensor, pred_masks: Tensor | None, padding: bool = True
) -> tuple[Tensor, Tensor]:
    """Click in the middle of the worst error: the wrong pixel that is farthest from what is right.

    Args:
        gt_masks: [B, 1, H, W] bool, the truth.
        pred_masks: the same of a prediction; None for an empty one.
        padding: the edge of the image counts as right.

    Returns:
        points [B, 1, 2] as (x, y) fp32 and labels [B, 1] int32: 1 where the object was missed, else 0.

    Raises:
        ImportError: no SciPy.
    """
    from scipy.ndimage import distance_transform_edt

    errors = [error[:, 0].cpu().numpy() for error in _errors(gt_masks, pred_masks)]
    points, labels = [], []
    for pair in zip(*errors, strict=True):
        framed = [np.pad(error, 1) for error in pair] if padding else pair
        inner = slice(1, -1) if padding else slice(None)
        depths = [distance_transform_edt(error)[inner, inner] for error in framed]
        label = int(depths[1].max() > depths[0].max())
        y, x = np.unravel_index(depths[label].argmax(), depths[label].shape)
        points.append([[float(x), float(y)]])
        labels.append([label])
    device = gt_masks.device
    return torch.tensor(points, device=device), torch.tensor(labels, dtype=torch.int32, device=device)


def get_next_point(gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
    """Click where a prediction is wrong, "uniform" for anywhere or "center" for the middle of the worst error.

    Raises:
        ValueError: another ``method``.
    """
    methods = {"uniform": sample_random_points_from_errors, "center": sample_one_point_from_error_center}
    if method not in methods:
        raise ValueError(f"method must be 'uniform' or 'center', got {method!r}")
    return methods[method](gt_masks, pred_masks)


def _errors(gt_masks: Tensor, pred_masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where a prediction is too much and where it misses the truth, [B, 1, H, W] each."""
    require("gt_masks", gt_masks, Tensor, "a torch.Tensor [B, 1, H, W] of bool")
    pred_masks = torch.zeros_like(gt_masks) if pred_masks is None else pred_masks
    if gt_masks.dtype != torch.bool or gt_masks.ndim != 4 or gt_masks.shape[1] != 1:
        raise ValueError(f"gt_masks must be [B, 1, H, W] of bool, got {list(gt_masks.shape)} of {gt_masks.dtype}")
    if pred_masks.dtype != torch.bool or pred_masks.shape != gt_masks.shape:
        raise ValueError(f"pred_masks must be {list(gt_masks.shape)} of bool, got {list(pred_masks.shape)}")
    return ~gt_masks & pred_masks, gt_masks & ~pred_masks
