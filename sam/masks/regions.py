"""Connected regions of masks: how large each is, and masks without the small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam_kernels import connected_components


def label_regions(masks: Tensor, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """Label the 8-connected regions of masks and count their pixels.

    Args:
        masks: [N, H, W] bool.
        kernels: as for :func:`fastsam_kernels.connected_components`.

    Returns:
        labels [N, H, W] int32, 0 outside the mask, and the pixels of every label, [N, H * W + 1] int32.
    """
    labels = connected_components(masks, kernels=kernels)
    flat = labels.flatten(1).long()
    sizes = torch.zeros(len(masks), flat.shape[1] + 1, dtype=torch.int32, device=masks.device)
    return labels, sizes.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))


def areas_of(labels: Tensor, sizes: Tensor) -> Tensor:
    """Return, for every pixel, the pixels of its region [N, H, W] int32; outside the mask those of the outside."""
    return sizes.gather(1, labels.flatten(1).long()).view(labels.shape)


def fill_small_holes(logits: Tensor, max_area: float) -> Tensor:
    """Raise the holes of up to ``max_area`` pixels in the masks of logits [N, 1, h, w] to 0.1; 0 pixels fill none."""
    if not max_area or len(logits) == 0:
        return logits
    outside = logits[:, 0] <= 0
    labels, sizes = label_regions(outside)
    small = outside & (areas_of(labels, sizes) <= max_area)
    return torch.where(small[:, None], 0.1, logits)


def remove_small_regions(
    masks: Tensor, area_threshold: float, mode: str, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Fill holes or drop islands of fewer than ``area_threshold`` pixels, 8-connected.

    When every island of a mask is that small its largest stays.

    Args:
        masks: [N, H, W] bool.
        area_threshold: in pixels.
        mode: "holes" or "islands".
        kernels: as for :func:`fastsam_kernels.connected_components`.

    Returns:
        the masks [N, H, W], and which of them changed, [N] bool.

    Raises:
        ValueError: another ``mode``.
    """
    if mode not in ("holes", "islands"):
        raise ValueError(f"mode must be 'holes' or 'islands', got {mode!r}")
    labels, sizes = label_regions(~masks if mode == "holes" else masks, kernels)
    small = (areas_of(labels, sizes) < area_threshold) & (labels > 0)
    changed = small.flatten(1).any(dim=1)
    if mode == "holes":
        return masks | small, changed
    remaining = masks & ~small
    sizes[:, 0] = 0
    for index in (changed & ~remaining.flatten(1).any(dim=1)).nonzero()[:, 0].tolist():
        remaining[index] = labels[index] == _largest(labels[index], sizes[index])
    return remaining, changed


def _largest(labels: Tensor, sizes: Tensor) -> int:
    """Return the label of most pixels; of several, the one that OpenCV numbers first, by blocks of 2 x 2 pixels."""
    most = (sizes == sizes.max()).nonzero()[:, 0]
    if len(most) == 1:
        return int(most)
    y, x = torch.isin(labels, most.to(labels.dtype)).nonzero().unbind(1)
    block = (y // 2) * (labels.shape[1] // 2 + 1) + x // 2
    return int(labels[y, x][block.argmin()])
