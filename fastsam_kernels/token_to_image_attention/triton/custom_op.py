"""``torch.ops.fastsam.token_to_image_attention``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cross_attention.operands import ImageTokens, ValueProjection
from ...cross_attention.shapes import TokenShape
from ...triton.tiles import arch_of, lookup
from .kernel import plan


@torch.library.custom_op("fastsam::token_to_image_attention", mutates_args=())
def token_to_image_triton(
    queries: Tensor,
    keys: Tensor,
    key_pe: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    image_index: Tensor | None,
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.token_to_image_attention` for the arguments."""
    out = queries.new_empty((queries.shape[0], queries.shape[2], len(value_weight)))
    tile = lookup("token_to_image_attention", arch_of(keys.device), queries.dtype, TokenShape.of(queries.shape[2]))
    image = ImageTokens(keys, key_pe, image_index)
    plan(queries, image, ValueProjection(value_weight, value_bias), out, tile).run()
    return out


@token_to_image_triton.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    key_pe: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    image_index: Tensor | None,
) -> Tensor:
    return queries.new_empty((queries.shape[0], queries.shape[2], len(value_weight)))
