"""``torch.ops.fastsam.hypernetwork_masks``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from ..weights import UpscalingWeights
from .kernel import plan


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
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.hypernetwork_masks` for the arguments."""
    out = keys.new_empty((keys.shape[0], hyper.shape[1], 4 * height, 4 * width), dtype=out_dtype)
    tile = lookup("hypernetwork_masks", arch_of(keys.device), keys.dtype)
    weights = UpscalingWeights(weight1, bias1, norm_weight, norm_bias, weight2, bias2)
    plan(keys, weights, hyper, out, (height, width), eps, tile).run()
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
) -> Tensor:
    return keys.new_empty((keys.shape[0], hyper.shape[1], 4 * height, 4 * width), dtype=out_dtype)
