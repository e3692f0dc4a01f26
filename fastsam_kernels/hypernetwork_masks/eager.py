"""The upscaling and the mask product as matrix products, on any device and differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd
from .weights import UpscalingWeights

# Prompts, and image tokens per prompt, whose 16 * C2 channels are alive at once. On a CPU they should stay in the
# cache: 2 MB in fp32 for 1024 tokens.
_CHUNKS = {"cpu": (1, 1024)}
_CHUNKS_GPU = (32, 2**31)
_PAIR_OF = {torch.float16: torch.int32, torch.bfloat16: torch.int32, torch.float32: torch.int64}


def eager(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """Compute two products per token and one with the vectors; pixels take their places at the end."""

    def first(prompts: slice, tokens: slice) -> Tensor:
        return _product(keys[prompts, tokens].flatten(0, 1), weights.weight1, weights.bias1)

    return masks_of_products(first, weights, hyper, grid, eps, out_dtype, high_res, image_index)


def masks_of_products(
    first: Callable[[slice, slice], Tensor],
    weights: UpscalingWeights,
    hyper: Tensor,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """Compute ``hypernetwork_masks`` from the first product on.

    Args:
        first: makes W1^T x + b1 of a slice of P prompts and a slice of image tokens, [p * n, 4 * C1], which it gives
            away.
        weights, hyper, grid, eps, out_dtype, high_res, image_index: as of the operation.

    Returns:
        [P, M, 4h, 4w] of ``out_dtype``.
    """
    (height, width), (prompt_chunk, tokens) = grid, _CHUNKS.get(hyper.device.type, _CHUNKS_GPU)
    rows = height if torch.compiler.is_compiling() else max(1, tokens // width)  # every block would be compiled
    parts = []
    for start in range(0, max(len(hyper), 1), prompt_chunk):
        prompts = slice(start, start + prompt_chunk)
        blocks = []
        for top in range(0, height, rows):
            block = slice(top, min(top + rows, height))
            skips = None if high_res is None else _skips_of(*high_res, image_index, prompts, block)
            of_block = slice(top * width, block.stop * width)
            pixels = 16 * (of_block.stop - of_block.start)
            blocks.append(_upscale(first(prompts, of_block), weights, hyper[prompts], pixels, eps, skips))
        parts.append(_in_place(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2), grid))
    masks = parts[0] if len(parts) == 1 else torch.cat(parts)
    return masks.to(out_dtype)


def _skips_of(
    fine: Tensor, coarse: Tensor, image_index: Tensor | None, prompts: slice, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return what ``prompts`` add to tokens in ``rows``: [P or 1, rows, w, a, b, C1] and [.., a, b, c, d, C2]."""

    def of_images(features: Tensor, scale: int) -> Tensor:
        if image_index is not None and len(features) > 1:
            features = features.index_select(0, image_index[prompts])
        elif len(features) > 1:
            features = features[prompts]
        return features[:, :, scale * rows.start : scale * rows.stop].permute(0, 2, 3, 1)

    s1 = of_images(coarse, 2).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5)
    s0 = of_images(fine, 4).unflatten(2, (-1, 2, 2)).unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return s1, s0


def _upscale(
    y: Tensor, weights: UpscalingWeights, hyper: Tensor, pixels: int, eps: float, skips: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Upscale the first product [P * n, C] by vectors [P, M, C2] to ``pixels`` of n tokens, [P, M, n * 4 * 4 (cd)]."""
    prompts, y = len(hyper), y.unflatten(1, (4, -1))  # [P * n, 4 (ab), C1]
    if skips is not None:
        y = _add(y, skips[0], prompts)
    y = _gelu(F.layer_norm(y, weights.norm_weight.shape, weights.norm_weight, weights.norm_bias, eps))
    z = _product(y.flatten(0, 1), weights.weight2, weights.bias2)  # [P * n * 4 (ab), 4 (cd) * C2]
    z = _gelu(z if skips is None else _add(z, skips[1], prompts))
    return hyper @ z.view(prompts, pixels, hyper.shape[2]).transpose(1, 2)


def _add(x: Tensor, skip: Tensor, prompts: int) -> Tensor:
    """Add ``skip`` [P or 1, ...] to the values of P prompts, in place unless autograd records it."""
    values = x.view(prompts, *skip.shape[1:])
    return (values + skip if requires_autograd(x, skip) else values.add_(skip)).view(x.shape)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x @ weight + bias. On a CPU ``addmm`` spreads the bias first, and the product reads it all back."""
    return (x @ weight).add_(bias) if x.device.type == "cpu" else torch.addmm(bias, x, weight)


def _in_place(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rearrange pixels into masks: [P, M, h * w * 4 (ab) * 4 (cd)] -> [P, M, 4h, 4w]."""
    prompts, masks = pixels.shape[:2]
    pair = _PAIR_OF.get(pixels.dtype)
    if pair is not None and not (requires_autograd(pixels) or torch.compiler.is_compiling()):
        # Two pixels that stay neighbours (d) move as one: a copy of single ones takes six times as long on a CPU.
        pairs = pixels.view(pair).view(prompts * masks, *grid, 2, 2, 2).permute(0, 1, 3, 5, 2, 4)
        return pairs.reshape(prompts, masks, 4 * grid[0], 2 * grid[1]).view(pixels.dtype)
    pixels = pixels.view(prompts * masks, *grid, 4, 4).permute(0, 4, 3, 1, 2).reshape(prompts * masks, 16, *grid)
    pixels = F.pixel_shuffle(F.pixel_shuffle(pixels, 2), 2)  # first (ab) takes its place, then (cd)
    return pixels.view(prompts, masks, *pixels.shape[-2:])


def _gelu(x: Tensor) -> Tensor:
    """Apply gelu, in place unless autograd records it."""
    return F.gelu(x) if requires_autograd(x) else torch.ops.aten.gelu_(x)
