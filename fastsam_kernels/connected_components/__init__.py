"""Connected components of masks, 8-connected: the labels from which small holes and islands are removed.

    label[y, x] = 1 + the first pixel, counted row by row, of the component that contains (y, x);  0 outside the mask

The first pixel names a component whatever the order in which it was found, so every form gives the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import select_implementation

_LARGEST = 2**31 - 2  # pixels of a mask, whose labels are int32


def connected_components(masks: Tensor, *, kernels: str = "auto") -> Tensor:
    """Label the components of each mask.

    Args:
        masks: [N, H, W] bool, any strides.
        kernels: "reference", "torch" (SciPy, on the host), "triton" or "auto".

    Returns:
        [N, H, W] int32, see above.

    Raises:
        ValueError: another shape or dtype, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
        ImportError: the torch form without SciPy.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be [N, H, W] bool, got {list(masks.shape)} of {masks.dtype}")
    if masks[:1].numel() > _LARGEST:
        raise ValueError(f"a mask may have at most {_LARGEST} pixels, got {masks[:1].numel()}")
    chosen = select_implementation("connected_components", kernels, masks.device, _constraint(masks))
    if chosen == "reference":
        return reference(masks)
    if chosen == "torch":
        return eager(masks)
    from .kernel import connected_components_triton

    return connected_components_triton(masks)


def reference(masks: Tensor) -> Tensor:
    """Every pixel takes the least label around it until none changes."""
    height, width = masks.shape[1:]
    outside = height * width + 1
    labels = torch.arange(1, outside, dtype=torch.int32, device=masks.device).view(1, height, width)
    labels = labels.where(masks, outside)
    while labels.numel():
        padded = F.pad(labels, (1, 1, 1, 1), value=outside)
        least = padded.unfold(1, 3, 1).amin(-1).unfold(2, 3, 1).amin(-1).where(masks, outside)
        if torch.equal(least, labels):
            break
        labels = least
    return labels.where(masks, 0)


def eager(masks: Tensor) -> Tensor:
    """SciPy's labels on the host, renamed."""
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError("connected components on a CPU need SciPy: pip install 'fastsam-kernels[amg]'") from None
    neighbours = np.ones((3, 3), bool)
    labels = np.empty(masks.shape, np.int32)
    for out, mask in zip(labels, masks.cpu().numpy(), strict=True):
        found, count = ndimage.label(mask, structure=neighbours)
        flat, first = found.ravel(), np.zeros(count + 1, np.int32)
        inside = np.flatnonzero(flat)[::-1]
        first[flat[inside]] = inside + 1  # the last write is that of the first pixel
        np.take(first, found, out=out)
    return torch.from_numpy(labels).to(masks.device)


def _constraint(masks: Tensor) -> str | None:
    """What keeps the Triton form from these inputs."""
    if masks.numel() == 0:
        return "there are no pixels"
    return None
