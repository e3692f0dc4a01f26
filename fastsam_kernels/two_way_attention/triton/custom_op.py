"""``torch.ops.fastsam.two_way_attention``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection
from ...cross_attention.shapes import TokenShape
from ...triton.tiles import arch_of, lookup
from .kernel import plan


@torch.library.custom_op("fastsam::two_way_attention", mutates_args=())
def two_way_triton(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    queries: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    image_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the registered operation; see :func:`fastsam_kernels.two_way_attention` for the arguments."""
    out_keys = keys.new_empty((len(queries), *keys.shape[1:]))
    out = queries.new_empty((len(queries), queries.shape[2], len(value_weight)))
    tile = lookup("two_way_attention", arch_of(keys.device), keys.dtype, TokenShape.of(queries.shape[2]))
    plan(
        ImageTokens(keys, key_pe, image_index),
        AbsorbedTokens(token_keys, token_bias, token_values),
        LayerNormWeights(norm_weight, norm_bias, eps),
        queries,
        ValueProjection(value_weight, value_bias),
        out_keys,
        out,
        tile,
    ).run()
    return out_keys, out


@two_way_triton.register_fake
def _(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    queries: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    image_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out_keys = keys.new_empty((len(queries), *keys.shape[1:]))
    return out_keys, queries.new_empty((len(queries), queries.shape[2], len(value_weight)))
