"""Upscaling of the image tokens and their product with the hypernetwork vectors: the last step of SAM's mask decoder.

For a token x [C] of a grid h x w, C1 = C / 4, C2 = C / 8:

    y[ab]  = gelu(norm(W1[ab]^T x + b1 + s1))    [2 x 2, C1]            ConvTranspose2d(C, C1, 2, stride 2), LayerNorm2d
    z[abcd] = gelu(W2[cd]^T y[ab] + b2 + s0)     [2 x 2 x 2 x 2, C2]    ConvTranspose2d(C1, C2, 2, stride 2)
    mask[m, 4i + 2a + c, 4j + 2b + d] = hyper[m] . z[abcd]              for the token in row i, column j

s1 and s0 are SAM 2's: the pixels (2i + a, 2j + b) and (4i + 2a + c, 4j + 2b + d) of features of finer grids. SAM has
none.

Source: Segment Anything (arXiv 2304.02643), appendix A; ``mask_decoder.py`` of segment-anything and of sam2. gelu is
the erf form.
"""

from __future__ import annotations

from typing import Any

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
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Compute mask logits from image tokens, for the masks whose vectors are given and no others.

    Args:
        keys: [P, h * w, C] image tokens of P prompts, any strides.
        weights: from :func:`pack_upscaling`, in the dtype of ``keys``.
        hyper: [P, M, C / 8] outputs of hypernetworks, in the dtype of ``keys``.
        grid: (h, w).
        eps: epsilon of the layer norm.
        out_dtype: dtype of the result; None is that of ``keys``.
        high_res: s0 [I, C / 8, 4h, 4w] and s1 [I, C / 4, 2h, 2w] of I images, in the dtype of ``keys``; any strides,
            those of ``torch.channels_last`` are the fastest to read.
        image_index: [P] int64, the image of each prompt; None for one image, or for one image per prompt.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [P, M, 4 * h, 4 * w].

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    options = {"eps": eps, "out_dtype": out_dtype, "high_res": high_res, "image_index": image_index}
    prepared = _prepare(keys, weights, hyper, grid=grid, **options)  # type: ignore[arg-type]
    return HYPERNETWORK_MASKS.run(kernels, *prepared)


def _prepare(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    *,
    grid: tuple[int, int],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> tuple[Any, ...]:
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
    if high_res is not None:
        _check_high_res(keys, grid, high_res, image_index)
    return keys, weights, hyper, grid, eps, keys.dtype if out_dtype is None else out_dtype, high_res, image_index


def _check_high_res(
    keys: Tensor, grid: tuple[int, int], high_res: tuple[Tensor, Tensor], image_index: Tensor | None
) -> None:
    (prompts, _, channels), (height, width), images = keys.shape, grid, len(high_res[0])
    expected = (images, channels // 8, 4 * height, 4 * width), (images, channels // 4, 2 * height, 2 * width)
    for name, features, shape in zip(("s0", "s1"), high_res, expected, strict=True):
        if features.shape != shape or features.dtype != keys.dtype:
            actual = f"{list(features.shape)} of {features.dtype}"
            raise ValueError(f"{name} of high_res must be {list(shape)} of {keys.dtype}, got {actual}")
    if image_index is None and images not in (1, prompts):
        raise ValueError(f"high_res of {images} images needs an image_index [{prompts}]")
    if image_index is not None and (image_index.shape != (prompts,) or image_index.dtype != torch.int64):
        raise ValueError(f"image_index must be [{prompts}] int64, got {list(image_index.shape)} of {image_index.dtype}")


HYPERNETWORK_MASKS = register(
    Operation(
        "hypernetwork_masks",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
