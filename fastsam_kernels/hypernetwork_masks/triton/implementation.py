"""Limitations of the Triton kernel of ``hypernetwork_masks`` and the way to call it; imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import triton_implementation
from ..weights import UpscalingWeights

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_MASKS = 4  # per prompt


def _run(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    from .custom_op import hypernetwork_masks_triton

    fine, coarse = (None, None) if high_res is None else high_res
    return hypernetwork_masks_triton(keys, *weights, hyper, *grid, eps, out_dtype, fine, coarse, image_index)


def _limitation(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> str | None:
    for name, dtype in (("keys", keys.dtype), ("the result", out_dtype)):
        if dtype not in _DTYPES:
            return f"{name} must be fp32, fp16 or bf16, got {dtype}"
    channels = keys.shape[2]
    if channels < 64 or channels & (channels - 1):
        return f"the channels must be a power of two of at least 64, got {channels}"
    if keys.shape[0] == 0:
        return "there are no prompts"
    if hyper.shape[1] > _MAX_MASKS:
        return f"it makes at most {_MAX_MASKS} masks per prompt, got {hyper.shape[1]}"
    return None


TRITON = triton_implementation(_run, _limitation, multiplies=True)
