"""The decoder's cross-attentions on a flat list of tensors, which tests draw, cut and differentiate one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsam_kernels import (
    AbsorbedTokens,
    ImageTokens,
    LayerNormWeights,
    ValueProjection,
    image_to_token_attention,
    token_to_image_attention,
    two_way_attention,
)

HEADS, HEAD_DIM, EPS = 8, 8, 1e-5
Inputs = tuple[Tensor, ...]


def draw(shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype, device: Any) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)


def to_image_inputs(
    prompts: int,
    tokens: int,
    grid: int,
    dtype: torch.dtype,
    device: Any = "cpu",
    channels: int = 64,
    images: int = 0,
    head_dim: int = HEAD_DIM,
) -> Inputs:
    """Draw queries, image tokens, positions, and weight and bias of the values."""
    shapes = (
        ((prompts, HEADS, tokens, channels), 0.3),
        ((images or prompts, grid * grid, channels), 1.0),
        ((grid * grid, channels), 1.0),
        ((HEADS * head_dim, channels), channels**-0.5),
        ((HEADS * head_dim,), 1.0),
    )
    return tuple(draw(shape, seed, scale, dtype, device) for seed, (shape, scale) in enumerate(shapes))


def to_token_inputs(
    prompts: int, tokens: int, grid: int, dtype: torch.dtype, device: Any = "cpu", channels: int = 64, images: int = 0
) -> Inputs:
    """Draw image tokens, positions, absorbed keys, bias and values, and weight and bias of the norm."""
    absorbed = (prompts, HEADS, tokens, channels)
    shapes = (
        ((images or prompts, grid * grid, channels), 1.0),
        ((grid * grid, channels), 1.0),
        (absorbed, 0.3),
        (absorbed[:3], 1.0),
        (absorbed, 0.5),
        ((channels,), 1.0),
        ((channels,), 0.3),
    )
    return tuple(draw(shape, seed, scale, dtype, device) for seed, (shape, scale) in enumerate(shapes))


def two_way_inputs(
    prompts: int,
    tokens: int,
    grid: int,
    dtype: torch.dtype,
    device: Any = "cpu",
    channels: int = 64,
    images: int = 0,
    head_dim: int = HEAD_DIM,
) -> Inputs:
    """Draw those of ``to_token_inputs``, then queries, and weight and bias of the values."""
    update = to_token_inputs(prompts, tokens, grid, dtype, device, channels, images)
    queries, _, _, value_weight, value_bias = to_image_inputs(
        prompts, tokens, grid, dtype, device, channels, head_dim=head_dim
    )
    return (*update, queries, value_weight, value_bias)


def to_image_operands(inputs: Inputs, index: Tensor | None = None) -> tuple[Tensor, ImageTokens, ValueProjection]:
    queries, tokens, pe, value_weight, value_bias = inputs
    return queries, ImageTokens(tokens, pe, index), ValueProjection(value_weight, value_bias)


def to_token_operands(
    inputs: Inputs, index: Tensor | None = None, image_queries: Tensor | None = None
) -> tuple[ImageTokens, AbsorbedTokens, LayerNormWeights]:
    tokens, pe, keys, bias, values, norm_weight, norm_bias = inputs
    image = ImageTokens(tokens, pe, index, image_queries)
    return image, AbsorbedTokens(keys, bias, values), LayerNormWeights(norm_weight, norm_bias, EPS)


def two_way_operands(
    inputs: Inputs, index: Tensor | None = None, image_queries: Tensor | None = None
) -> tuple[ImageTokens, AbsorbedTokens, LayerNormWeights, Tensor, ValueProjection]:
    *update, queries, value_weight, value_bias = inputs
    operands = to_token_operands(tuple(update), index, image_queries)
    return (*operands, queries, ValueProjection(value_weight, value_bias))


def to_image(*inputs: Tensor, index: Tensor | None = None, kernels: str = "auto") -> Tensor:
    return token_to_image_attention(*to_image_operands(inputs, index), kernels=kernels)


def to_token(
    *inputs: Tensor, index: Tensor | None = None, image_queries: Tensor | None = None, kernels: str = "auto"
) -> Tensor:
    return image_to_token_attention(*to_token_operands(inputs, index, image_queries), kernels=kernels)


def two_way(
    *inputs: Tensor, index: Tensor | None = None, image_queries: Tensor | None = None, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    return two_way_attention(*two_way_operands(inputs, index, image_queries), kernels=kernels)


def one_after_the_other(
    *inputs: Tensor, kernels: str = "reference", index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two attentions apart."""
    *update, queries, value_weight, value_bias = inputs
    tokens = to_token(*update, index=index, kernels=kernels)
    return tokens, to_image(queries, tokens, update[1], value_weight, value_bias, kernels=kernels)
