"""``torch.ops.fastsam.image_to_token_attention``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights
from ...cross_attention.shapes import TokenShape
from ...triton.tiles import arch_of, lookup
from .kernel import plan


@torch.library.custom_op("fastsam::image_to_token_attention", mutates_args=())
def image_to_token_triton(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    image_index: Tensor | None,
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.image_to_token_attention` for the arguments."""
    out = keys.new_empty((token_keys.shape[0], *keys.shape[1:]))
    tile = lookup("image_to_token_attention", arch_of(keys.device), keys.dtype, TokenShape.of(token_keys.shape[2]))
    absorbed = AbsorbedTokens(token_keys, token_bias, token_values)
    norm = LayerNormWeights(norm_weight, norm_bias, eps)
    plan(ImageTokens(keys, key_pe, image_index), absorbed, norm, out, tile).run()
    return out


@image_to_token_triton.register_fake
def _(
    keys: Tensor,
    key_pe: Tensor,
    token_keys: Tensor,
    token_bias: Tensor,
    token_values: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    image_index: Tensor | None,
) -> Tensor:
    return keys.new_empty((token_keys.shape[0], *keys.shape[1:]))
