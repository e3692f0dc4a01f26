"""Inputs of ``hypernetwork_masks``, for its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam_kernels import UpscalingWeights, pack_upscaling

EPS = 1e-6
Inputs = tuple[Tensor, UpscalingWeights, Tensor, tuple[int, int]]


def make_inputs(
    prompts: int,
    grid: tuple[int, int],
    masks: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    channels: int = 256,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    narrow, narrower = channels // 4, channels // 8
    weights = pack_upscaling(
        draw(channels, narrow, 2, 2, scale=channels**-0.5),
        draw(narrow, scale=0.5),
        1 + draw(narrow, scale=0.2),
        draw(narrow, scale=0.3),
        draw(narrow, narrower, 2, 2, scale=narrow**-0.5),
        draw(narrower, scale=0.3),
    )
    weights = UpscalingWeights(*(weight.to(dtype) for weight in weights))
    keys, hyper = draw(prompts, grid[0] * grid[1], channels), draw(prompts, masks, narrower)
    return keys.to(dtype), weights, hyper.to(dtype), grid


def finer_features(
    images: int,
    grid: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw s0 and s1, one of them channels last in memory."""
    generator = torch.Generator().manual_seed(7)
    shapes = (images, channels // 8, 4 * grid[0], 4 * grid[1]), (images, channels // 4, 2 * grid[0], 2 * grid[1])
    s0, s1 = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return s0.contiguous(memory_format=torch.channels_last), s1
