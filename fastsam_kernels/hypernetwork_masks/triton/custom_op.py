"""``torch.ops.fastsam.hypernetwork_masks``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from ..weights import UpscalingWeights
from .kernel import plan
from .shapes import UpscalingShape


@torch.library.custom_op("fastsam::hypernetwork_masks", mutates_args=())
def hypernetwork_masks_triton(
    keys: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    height: int,
    width: int,
    eps: float,
    out_dtype: torch.dtype,
    fine: Tensor | None,
    coarse: Tensor | None,
    image_index: Tensor | None,
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.hypernetwork_masks` for the arguments."""
    out = keys.new_empty((keys.shape[0], hyper.shape[1], 4 * height, 4 * width), dtype=out_dtype)
    shape = UpscalingShape.ANY if fine is None else UpscalingShape.FINER
    tile = lookup("hypernetwork_masks", arch_of(keys.device), keys.dtype, shape)
    weights = UpscalingWeights(weight1, bias1, norm_weight, norm_bias, weight2, bias2)
    high_res = None if fine is None or coarse is None else (fine, coarse)
    plan(keys, weights, hyper, out, (height, width), eps, tile, high_res, image_index).run()
    return out


@hypernetwork_masks_triton.register_fake
def _(
    keys: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    height: int,
    width: int,
    eps: float,
    out_dtype: torch.dtype,
    fine: Tensor | None,
    coarse: Tensor | None,
    image_index: Tensor | None,
) -> Tensor:
    return keys.new_empty((keys.shape[0], hyper.shape[1], 4 * height, 4 * width), dtype=out_dtype)
