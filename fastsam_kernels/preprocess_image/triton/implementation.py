"""Limitations of the Triton kernel of ``preprocess_image`` and the way to call it; imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import triton_implementation

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _run(
    image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    from .custom_op import preprocess_image_triton

    return preprocess_image_triton(image, *size, image_size, mean.float(), std.float(), dtype)


def _limitation(
    image: Tensor, size: tuple[int, int], image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> str | None:
    return None if dtype in _DTYPES else f"the result must be fp32, fp16 or bf16, got {dtype}"


TRITON = triton_implementation(_run, _limitation, multiplies=False)
