"""Connected components of masks, 8-connected: the islands of a mask, or its holes in the inverted mask.

    label(p) = 1 + the smallest y * W + x of the pixels (x, y) that p is connected with;  0 outside the mask

Neighbours share a side or a corner. The label names the component and does not depend on how it was found.
Source: the partition of ``cv2.connectedComponents`` with ``connectivity=8``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose


def connected_components(masks: Tensor, *, kernels: str = "auto") -> Tensor:
    """A label for each pixel.

    Args:
        masks: [N, H, W] bool.
        kernels: "reference", "torch" (computed on the CPU, needs SciPy), "triton" or "auto".

    Returns:
        [N, H, W] int32, contiguous: 0 outside the mask, else 1 + the smallest flat index of the component.

    Raises:
        ValueError: another shape or dtype, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be [N, H, W] of torch.bool, got {list(masks.shape)} of {masks.dtype}")
    chosen = choose("connected_components", kernels, masks.device, None)
    if chosen == "reference":
        return reference(masks)
    if chosen == "torch":
        return torch_form(masks)
    from .kernel import connected_components_triton

    return connected_components_triton(masks)


def reference(masks: Tensor) -> Tensor:
    """Every pixel takes the smallest label around it until nothing changes."""
    count, height, width = masks.shape
    places = torch.arange(1, height * width + 1, device=masks.device).view(height, width).double()
    labels = -places.where(masks, torch.inf).view(count, 1, height, width)  # -inf outside the mask
    before = torch.full_like(labels, torch.nan)
    while not torch.equal(labels, before):
        before = labels
        labels = F.max_pool2d(labels, 3, stride=1, padding=1).where(masks[:, None], -torch.inf)
    return (-labels[:, 0]).where(masks, 0).to(torch.int32)


def torch_form(masks: Tensor) -> Tensor:
    """SciPy's labels of all masks in one volume, renamed."""
    from scipy import ndimage

    neighbours = np.zeros((3, 3, 3), bool)
    neighbours[1] = True  # within a mask, not between masks
    labels, count = ndimage.label(masks.cpu().numpy(), structure=neighbours)
    flat = labels.ravel()
    size = masks.shape[1] * masks.shape[2]
    inside = np.flatnonzero(flat)
    names = np.zeros(count + 1, np.int32)
    names[flat[inside[::-1]]] = inside[::-1] % max(size, 1) + 1  # the first pixel of a component writes last
    return torch.from_numpy(names[labels]).to(masks.device)
