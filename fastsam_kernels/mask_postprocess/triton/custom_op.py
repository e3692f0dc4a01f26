"""``torch.ops.fastsam.mask_statistics`` and ``packed_masks``: compiled graphs and exports keep them whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from ..resize_map import TILE, Resizing
from .kernel import no_pixels, plan


@torch.library.custom_op("fastsam::mask_statistics", mutates_args=())
def mask_statistics_triton(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
    offset: float,
) -> Tensor:
    """Return [N, 7] int32: inside, outside, area and box; see :func:`fastsam_kernels.mask_statistics`."""
    out = no_pixels(len(low_res), low_res.device)
    resizing = Resizing(image_size, (input_height, input_width), (height, width))
    tile = lookup("mask_postprocess", arch_of(low_res.device), low_res.dtype)
    if len(low_res) > 0:
        plan(low_res, resizing, threshold, offset, out, tile, statistics=True).run()
    return out


@mask_statistics_triton.register_fake
def _(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
    offset: float,
) -> Tensor:
    return low_res.new_empty((low_res.shape[0], 7), dtype=torch.int32)


@torch.library.custom_op("fastsam::packed_masks", mutates_args=())
def packed_masks_triton(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.packed_masks` for the arguments."""
    out = low_res.new_empty((len(low_res), width, (height + TILE - 1) // TILE), dtype=torch.int32)
    resizing = Resizing(image_size, (input_height, input_width), (height, width))
    tile = lookup("mask_postprocess", arch_of(low_res.device), low_res.dtype)
    if len(low_res) > 0:
        plan(low_res, resizing, threshold, 0.0, out, tile, statistics=False).run()
    return out


@packed_masks_triton.register_fake
def _(
    low_res: Tensor,
    image_size: int,
    input_height: int,
    input_width: int,
    height: int,
    width: int,
    threshold: float,
) -> Tensor:
    return low_res.new_empty((low_res.shape[0], width, (height + TILE - 1) // TILE), dtype=torch.int32)
