"""From the decoder's logits to masks of the image: stability, area, box and bits, without logits of full size.

For logits M of one mask, with the two bilinear resizes of segment-anything as one linear map (``resize_map``):

    L = A_h M A_w^T                                    [H, W], never stored
    inside, outside, area = |L > t + offset|, |L > t - offset|, |L > t|
    box = first and last column and row of L > t
    packed[x, k] bit b = L[32 k + b, x] > t            words along the columns, as COCO's runs go

The taps of A are convex, so a tile whose logits all lie on one side of the thresholds is decided by their least and
greatest. A pixel whose logit is within rounding of a threshold (1e-5 of the largest) may fall either way.

Source: ``postprocess_masks`` and ``utils/amg.py`` of segment-anything.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import packed_eager, statistics_eager
from .reference import packed_reference, statistics_reference
from .resize_map import Resizing
from .statistics import MaskStatistics
from .triton.implementation import TRITON_PACKED, TRITON_STATISTICS


def mask_statistics(
    low_res: Tensor, resizing: Resizing, *, threshold: float = 0.0, offset: float = 1.0, kernels: Kernels = "auto"
) -> MaskStatistics:
    """Compute counts and boxes of masks at their full size.

    Args:
        low_res: [N, h, w] logits, any strides.
        resizing: the sizes between logits and masks.
        threshold: logits above it are in the mask.
        offset: how far stability moves the threshold.
        kernels: "reference", "torch", "triton" or "auto".

    Raises:
        ValueError: shapes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    return MASK_STATISTICS.run(kernels, *_prepare_statistics(low_res, resizing, threshold=threshold, offset=offset))


def packed_masks(low_res: Tensor, resizing: Resizing, *, threshold: float = 0.0, kernels: Kernels = "auto") -> Tensor:
    """Compute masks at their full size, one bit per pixel.

    Args, errors: as :func:`mask_statistics`.

    Returns:
        [N, width, ceil(height / 32)] int32: bit b of word k of column x is the pixel in row 32 k + b. Bits after
        the last row are 0.
    """
    return PACKED_MASKS.run(kernels, *_prepare_packed(low_res, resizing, threshold=threshold))


def _prepare_statistics(
    low_res: Tensor, resizing: Resizing, *, threshold: float = 0.0, offset: float = 1.0
) -> tuple[Tensor, Resizing, float, float]:
    return *_checked(low_res, resizing), threshold, offset


def _prepare_packed(low_res: Tensor, resizing: Resizing, *, threshold: float = 0.0) -> tuple[Tensor, Resizing, float]:
    return *_checked(low_res, resizing), threshold


def _checked(low_res: Tensor, resizing: Resizing) -> tuple[Tensor, Resizing]:
    if low_res.ndim != 3 or not low_res.is_floating_point() or min(low_res.shape[1:]) < 1:
        raise ValueError(f"low_res must be logits [N, h, w], got {list(low_res.shape)} of {low_res.dtype}")
    resizing = Resizing(*resizing)
    sides = (*resizing.input_size, *resizing.output_size)
    if min(sides) < 1 or max(resizing.input_size) > resizing.image_size:
        raise ValueError(f"input_size must lie in the image_size square and no side be under 1, got {resizing}")
    return low_res.detach(), resizing


MASK_STATISTICS = register(
    Operation(
        "mask_statistics",
        (
            TRITON_STATISTICS,
            Implementation("torch", statistics_eager),
            Implementation("reference", statistics_reference),
        ),
        _prepare_statistics,
    )
)
PACKED_MASKS = register(
    Operation(
        "packed_masks",
        (TRITON_PACKED, Implementation("torch", packed_eager), Implementation("reference", packed_reference)),
        _prepare_packed,
    )
)
