"""Components of masks by SciPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def eager(masks: Tensor) -> Tensor:
    """Label components by SciPy on the host, and rename its labels."""
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError("connected components on a CPU need SciPy: pip install 'fastsam-kernels[amg]'") from None
    neighbours = np.ones((3, 3), bool)
    labels = np.empty(masks.shape, np.int32)
    for out, mask in zip(labels, masks.cpu().numpy(), strict=True):
        labelled, count = ndimage.label(mask, structure=neighbours)
        flat, first = labelled.ravel(), np.zeros(count + 1, np.int32)
        inside = np.flatnonzero(flat)[::-1]
        first[flat[inside]] = inside + 1  # the last write is that of the first pixel
        np.take(first, labelled, out=out)
    return torch.from_numpy(labels).to(masks.device)
