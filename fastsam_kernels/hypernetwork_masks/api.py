"""Upscaling of the image tokens and their product with the hypernetwork vectors: the last step of SAM's mask decoder.

For a token x [C] of a grid h x w, C1 = C / 4, C2 = C / 8:

    y[ab]  = gelu(norm(W1[ab]^T x + b1))         [2 x 2, C1]            ConvTranspose2d(C, C1, 2, stride 2), LayerNorm2d
    z[abcd] = gelu(W2[cd]^T y[ab] + b2)          [2 x 2 x 2 x 2, C2]    ConvTranspose2d(C1, C2, 2, stride 2)
    mask[m, 4i + 2a + c, 4j + 2b + d] = hyper[m] . z[abcd]              for the token in row i, column j

Source: Segment Anything (arXiv 2304.02643), appendix A; ``mask_decoder.py`` of segment-anything. gelu is the erf form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON
from .weights import UpscalingWeights


def hypernetwork_masks(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    *,
    grid: tuple[int, int],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Compute mask logits from image tokens, for the masks whose vectors are given and no others.

    Args:
        keys: [P, h * w, C] image tokens of P prompts, any strides.
        weights: from :func:`pack_upscaling`, in the dtype of ``keys``.
        hyper: [P, M, C / 8] outputs of hypernetworks, in the dtype of ``keys``.
        grid: (h, w).
        eps: of the layer norm.
        out_dtype: of the result; None is that of ``keys``.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [P, M, 4 * h, 4 * w].

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    prepared = _prepare(keys, weights, hyper, grid=grid, eps=eps, out_dtype=out_dtype)
    return HYPERNETWORK_MASKS.run(kernels, *prepared)


def _prepare(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    *,
    grid: tuple[int, int],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, UpscalingWeights, Tensor, tuple[int, int], float, torch.dtype]:
    if keys.ndim != 3 or keys.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"keys must be [P, {grid[0]} * {grid[1]}, C], got {list(keys.shape)}")
    prompts, _, channels = keys.shape
    if hyper.ndim != 3 or hyper.shape[0] != prompts or hyper.shape[2] * 8 != channels or not hyper.shape[1]:
        raise ValueError(f"hyper must be [{prompts}, masks, {channels} / 8], got {list(hyper.shape)}")
    narrow, narrower = channels // 4, channels // 8
    expected = ((channels, 4 * narrow), (4 * narrow,), (narrow,), (narrow,), (narrow, 4 * narrower), (4 * narrower,))
    for name, weight, shape in zip(weights._fields, weights, expected, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for keys of {channels} channels, got {list(weight.shape)}")
    others = {tensor.dtype for tensor in (*weights, hyper)} - {keys.dtype}
    if others:
        raise ValueError(f"weights and hyper must have the dtype of keys, {keys.dtype}, got {others.pop()}")
    return keys, weights, hyper, grid, eps, keys.dtype if out_dtype is None else out_dtype


HYPERNETWORK_MASKS = register(
    Operation(
        "hypernetwork_masks",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
