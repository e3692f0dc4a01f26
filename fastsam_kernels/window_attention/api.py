"""Attention of SAM 2's image encoder (Hiera), inside windows or over the whole grid.

For a query i and a key j of the same window (or of the grid) and one head of d channels:

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j

Where a stage begins, queries are the maximum of each 2 x 2 tokens of their window, and the result has half the rows
and columns. Windows start in the upper left corner; those that reach over the lower or right edge are zero-padded
*before* the projection to q, k and v, so a padded key and value is that projection's bias, and takes part in the
softmax. All n padded tokens of a window are alike: together they are one key with the score q_i . b_k / sqrt(d) + ln n
and the value b_v, which is what the fused forms compute.

Sources: SAM 2 (arXiv 2408.00714), Hiera (arXiv 2306.00989); ``hieradet.py`` of sam2.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def window_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    window_size: int,
    qkv_bias: Tensor | None,
    pool_queries: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """Attend straight from the projection to q, k and v.

    Args:
        qkv: [B, H, W, 3 * C], channels in the order (q k v, head, d), any strides.
        num_heads: C = num_heads * d.
        window_size: side of a window, 0 for all of the grid.
        qkv_bias: [3 * C], the bias of the projection, which stands for what is padded; None is zero.
        pool_queries: whether queries are the maximum of 2 x 2 tokens; the grid and the windows must be even then.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [B, H, W, C], with ``pool_queries`` [B, H / 2, W / 2, C], contiguous, in the dtype of ``qkv``.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    prepared = _prepare(qkv, num_heads=num_heads, window_size=window_size, qkv_bias=qkv_bias, pool_queries=pool_queries)
    return WINDOW_ATTENTION.run(kernels, *prepared)


def _prepare(
    qkv: Tensor, *, num_heads: int, window_size: int, qkv_bias: Tensor | None, pool_queries: bool = False
) -> tuple[Tensor, Tensor, int, int, bool]:
    if qkv.ndim != 4 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(f"qkv must be [B, H, W, 3 * {num_heads} heads * d], got {list(qkv.shape)}")
    if window_size < 0:
        raise ValueError(f"window_size must be at least 0, got {window_size}")
    if pool_queries and any(side % 2 for side in (*qkv.shape[1:3], window_size)):
        grid = f"{qkv.shape[1]} x {qkv.shape[2]}"
        raise ValueError(f"queries are pooled in even grids and windows, got {grid} tokens, windows of {window_size}")
    if qkv_bias is None:
        qkv_bias = qkv.new_zeros(qkv.shape[3])
    if qkv_bias.shape != (qkv.shape[3],):
        raise ValueError(f"qkv_bias must be [{qkv.shape[3]}], got {list(qkv_bias.shape)}")
    if qkv_bias.dtype != qkv.dtype:
        raise ValueError(f"qkv_bias must have the dtype of qkv, {qkv.dtype}, got {qkv_bias.dtype}")
    return qkv, qkv_bias, num_heads, window_size, pool_queries


WINDOW_ATTENTION = register(
    Operation(
        "window_attention",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
