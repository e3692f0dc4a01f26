"""Upscaling of the image tokens and their product with the hypernetwork vectors: the last step of SAM's mask decoder.

For a token x [C] of a grid h x w, C1 = C / 4, C2 = C / 8:

    y[ab]  = gelu(norm(W1[ab]^T x + b1))         [2 x 2, C1]            ConvTranspose2d(C, C1, 2, stride 2), LayerNorm2d
    z[abcd] = gelu(W2[cd]^T y[ab] + b2)          [2 x 2 x 2 x 2, C2]    ConvTranspose2d(C1, C2, 2, stride 2)
    mask[m, 4i + 2a + c, 4j + 2b + d] = hyper[m] . z[abcd]              for the token in row i, column j

Source: Segment Anything (arXiv 2304.02643), appendix A; ``mask_decoder.py`` of segment-anything. gelu is the erf form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd, select_implementation

# Prompts, and image tokens of each, whose 16 * C2 channels are alive at once in the torch form. On a CPU they should
# stay in the cache: 2 MB in fp32 for 1024 tokens.
_AT_ONCE = {"cpu": (1, 1024)}
_AT_ONCE_ELSEWHERE = (32, 2**31)
MAX_MASKS = 4  # a prompt, in the Triton form
_PAIR_OF = {torch.float16: torch.int32, torch.bfloat16: torch.int32, torch.float32: torch.int64}


class UpscalingWeights(NamedTuple):
    """Both transposed convolutions as matrices; columns in the order (row, column, channel) of their 2 x 2 output.

    Attributes:
        weight1: [C, 4 * C1].
        bias1: [4 * C1].
        norm_weight, norm_bias: [C1].
        weight2: [C1, 4 * C2].
        bias2: [4 * C2].
    """

    weight1: Tensor
    bias1: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight2: Tensor
    bias2: Tensor


def pack_upscaling(
    weight1: Tensor, bias1: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight2: Tensor, bias2: Tensor
) -> UpscalingWeights:
    """The weights as the operation takes them, from those of ``ConvTranspose2d`` [in, out, 2, 2] and its like."""

    def matrix(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)

    return UpscalingWeights(matrix(weight1), bias1.repeat(4), norm_weight, norm_bias, matrix(weight2), bias2.repeat(4))


def hypernetwork_masks(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    *,
    grid: tuple[int, int],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Mask logits from image tokens, for the masks whose vectors are given and no others.

    Args:
        keys: [P, h * w, C] image tokens of P prompts, any strides.
        weights: from :func:`pack_upscaling`, in the dtype of ``keys``.
        hyper: [P, M, C / 8] outputs of the hypernetworks asked for, in the dtype of ``keys``.
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
    _check(keys, weights, hyper, grid)
    out_dtype = keys.dtype if out_dtype is None else out_dtype
    inputs, constraint = (keys, *weights, hyper), _constraint(keys, hyper, out_dtype)
    chosen = select_implementation("hypernetwork_masks", kernels, keys.device, constraint, *inputs, products=keys.dtype)
    if chosen == "reference":
        return reference(keys, weights, hyper, grid, eps).to(out_dtype)
    if chosen == "torch":
        return eager(keys, weights, hyper, grid, eps).to(out_dtype)
    from .kernel import hypernetwork_masks_triton

    return hypernetwork_masks_triton(keys, *weights, hyper, *grid, eps, out_dtype)


def reference(keys: Tensor, weights: UpscalingWeights, hyper: Tensor, grid: tuple[int, int], eps: float) -> Tensor:
    """The modules of the mask decoder, one after the other."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernel = weight.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)  # [in, out, 2, 2]
        return F.conv_transpose2d(x, kernel, bias[: len(bias) // 4], stride=2)

    x = keys.transpose(1, 2).unflatten(2, grid)
    x = convolution(x, weights.weight1, weights.bias1)
    x = F.layer_norm(x.permute(0, 2, 3, 1), weights.norm_weight.shape, weights.norm_weight, weights.norm_bias, eps)
    x = F.gelu(x.permute(0, 3, 1, 2))
    x = F.gelu(convolution(x, weights.weight2, weights.bias2))  # [P, C2, 4h, 4w]
    return (hyper @ x.flatten(2)).unflatten(2, x.shape[2:])


def eager(keys: Tensor, weights: UpscalingWeights, hyper: Tensor, grid: tuple[int, int], eps: float) -> Tensor:
    """Two matrix products a token and one with the vectors; the pixels are put in place at the end."""
    prompts_at_once, tokens_at_once = _AT_ONCE.get(keys.device.type, _AT_ONCE_ELSEWHERE)
    if torch.compiler.is_compiling():
        tokens_at_once = keys.shape[1]  # every block would be compiled
    parts = []
    for some_keys, some_hyper in zip(keys.split(prompts_at_once), hyper.split(prompts_at_once), strict=True):
        blocks = [_upscale(block, weights, some_hyper, eps) for block in some_keys.split(tokens_at_once, dim=1)]
        parts.append(_in_place(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2), grid))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _upscale(keys: Tensor, weights: UpscalingWeights, hyper: Tensor, eps: float) -> Tensor:
    """[P, n, C] and [P, M, C2] -> the pixels of n tokens, [P, M, n * 4 (ab) * 4 (cd)]."""
    y = _product(keys.flatten(0, 1), weights.weight1, weights.bias1).unflatten(1, (4, -1))  # [P * n, 4 (ab), C1]
    y = _gelu(F.layer_norm(y, weights.norm_weight.shape, weights.norm_weight, weights.norm_bias, eps))
    z = _gelu(_product(y.flatten(0, 1), weights.weight2, weights.bias2))  # [P * n * 4 (ab), 4 (cd) * C2]
    return hyper @ z.view(len(hyper), 16 * keys.shape[1], hyper.shape[2]).transpose(1, 2)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias. On a CPU ``addmm`` spreads the bias first, and the product reads it all back."""
    return (x @ weight).add_(bias) if x.device.type == "cpu" else torch.addmm(bias, x, weight)


def _in_place(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """[P, M, h * w * 4 (ab) * 4 (cd)] -> [P, M, 4h, 4w]"""
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
    """In place unless gradients are recorded."""
    return F.gelu(x) if requires_autograd(x) else torch.ops.aten.gelu_(x)


def _check(keys: Tensor, weights: UpscalingWeights, hyper: Tensor, grid: tuple[int, int]) -> None:
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


def _constraint(keys: Tensor, hyper: Tensor, out_dtype: torch.dtype) -> str | None:
    """What keeps the Triton form from these inputs."""
    supported = (torch.float32, torch.float16, torch.bfloat16)
    for what, dtype in (("keys", keys.dtype), ("the result", out_dtype)):
        if dtype not in supported:
            return f"{what} must be fp32, fp16 or bf16, got {dtype}"
    channels = keys.shape[2]
    if channels < 64 or channels & (channels - 1):
        return f"the channels must be a power of two of at least 64, got {channels}"
    if keys.shape[0] == 0:
        return "there are no prompts"
    if hyper.shape[1] > MAX_MASKS:
        return f"it makes at most {MAX_MASKS} masks a prompt, got {hyper.shape[1]}"
    return None
