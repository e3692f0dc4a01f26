"""Connected components of masks, 8-connected: the labels from which small holes and islands are removed.

    label[y, x] = 1 + the first pixel, counted row by row, of the component that contains (y, x);  0 outside the mask

The first pixel names a component whatever the order in which it was found, so every
implementation gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON

_MAX_PIXELS = 2**31 - 2  # per mask, whose labels are int32


def connected_components(masks: Tensor, *, kernels: Kernels = "auto") -> Tensor:
    """Label the components of each mask.

    Args:
        masks: [N, H, W] bool, any strides.
        kernels: "reference", "torch" (SciPy, on the host), "triton" or "auto".

    Returns:
        [N, H, W] int32; 0 outside the mask, else 1 + the first pixel of the component, counted row by row.

    Raises:
        ValueError: another shape or dtype, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
        ImportError: "torch" without SciPy.
    """
    return CONNECTED_COMPONENTS.run(kernels, *_prepare(masks))


def _prepare(masks: Tensor) -> tuple[Tensor]:
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be [N, H, W] bool, got {list(masks.shape)} of {masks.dtype}")
    if masks[:1].numel() > _MAX_PIXELS:
        raise ValueError(f"a mask may have at most {_MAX_PIXELS} pixels, got {masks[:1].numel()}")
    return (masks,)


CONNECTED_COMPONENTS = register(
    Operation(
        "connected_components",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
