"""Limitations of the Triton kernel of mask post-processing and the way to call it; imports no triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import triton_implementation
from ..resize_map import Resizing
from ..statistics import MaskStatistics

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _statistics(low_res: Tensor, resizing: Resizing, threshold: float, offset: float) -> MaskStatistics:
    from .custom_op import mask_statistics_triton

    numbers = mask_statistics_triton(
        low_res, resizing.image_size, *resizing.input_size, *resizing.output_size, threshold, offset
    ).long()
    area = numbers[:, 2]
    return MaskStatistics(numbers[:, 0], numbers[:, 1], area, numbers[:, 3:] * (area > 0)[:, None])


def _packed(low_res: Tensor, resizing: Resizing, threshold: float) -> Tensor:
    from .custom_op import packed_masks_triton

    return packed_masks_triton(low_res, resizing.image_size, *resizing.input_size, *resizing.output_size, threshold)


def _limitation(low_res: Tensor, *sizes: Any) -> str | None:
    if low_res.dtype not in _DTYPES:
        return f"low_res must be fp32, fp16 or bf16, got {low_res.dtype}"
    return None


TRITON_STATISTICS = triton_implementation(_statistics, _limitation, multiplies=False)
TRITON_PACKED = triton_implementation(_packed, _limitation, multiplies=False)
