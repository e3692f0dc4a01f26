"""``torch.ops.fastsam.window_attention``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from .kernel import plan
from .shapes import WindowShape


@torch.library.custom_op("fastsam::window_attention", mutates_args=())
def window_attention_triton(
    qkv: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int, pool_queries: bool
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.window_attention` for the arguments."""
    out = _result(qkv, pool_queries)
    shape = WindowShape.of(qkv.shape[3] // (3 * num_heads), window_size, pool_queries)
    tile = lookup("window_attention", arch_of(qkv.device), qkv.dtype, shape)
    plan(qkv, qkv_bias, out, num_heads, window_size, pool_queries, tile).run()
    return out


@window_attention_triton.register_fake
def _(qkv: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int, pool_queries: bool) -> Tensor:
    return _result(qkv, pool_queries)


def _result(qkv: Tensor, pool_queries: bool) -> Tensor:
    batch, height, width, channels = qkv.shape
    step = 2 if pool_queries else 1
    return qkv.new_empty((batch, height // step, width // step, channels // 3))
