"""Attention of SAM's image encoder with decomposed relative position, inside windows or over the whole grid.

For a query i and a key j of the same window (or of the grid), in row h and column w of it, and one head of d channels:

    score(i, j) = q_i . k_j / sqrt(d) + q_i . R_h[h_i - h_j] + q_i . R_w[w_i - w_j]
    out_i       = sum_j softmax_j(score(i, j)) v_j

q is not scaled in the two terms of position. Windows start in the upper left corner; those that reach over the lower
or right edge are zero-padded *before* the projection to q, k and v, so a padded key and value is that projection's
bias, and takes part in the softmax.

The tables are taken as they are stored, one row per distance: the fused kernel needs a product with 2 * size - 1 rows,
where tables gathered for every pair of positions would be size / 2 times as much to read.

Sources: Segment Anything (arXiv 2304.02643), ViTDet (arXiv 2203.16527), MViTv2 (arXiv 2112.01526, section 4.1).
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def rel_pos_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    num_heads: int,
    window_size: int,
    qkv_bias: Tensor | None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Attend straight from the projection to q, k and v.

    Args:
        qkv: [B, H, W, 3 * C], channels in the order (q k v, head, d), any strides.
        rel_pos_h, rel_pos_w: [2 * size - 1, d] rows for the distances 1 - size to size - 1 between query and key;
            the size is that of the window, or H and W.
        num_heads: C = num_heads * d.
        window_size: side of a window, 0 for all of the grid.
        qkv_bias: [3 * C], the bias of the projection, which stands for what is padded; None is zero.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [B, H, W, C], contiguous, in the dtype of ``qkv``.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    prepared = _prepare(qkv, rel_pos_h, rel_pos_w, num_heads=num_heads, window_size=window_size, qkv_bias=qkv_bias)
    return REL_POS_ATTENTION.run(kernels, *prepared)


def _prepare(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, *, num_heads: int, window_size: int, qkv_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    if qkv.ndim != 4 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(f"qkv must be [B, H, W, 3 * {num_heads} heads * d], got {list(qkv.shape)}")
    if window_size < 0:
        raise ValueError(f"window_size must be at least 0, got {window_size}")
    head_dim = qkv.shape[3] // (3 * num_heads)
    for name, table, side in (("rel_pos_h", rel_pos_h, qkv.shape[1]), ("rel_pos_w", rel_pos_w, qkv.shape[2])):
        size = window_size or side
        if table.shape != (2 * size - 1, head_dim):
            raise ValueError(f"{name} must be [2 * {size} - 1, {head_dim}], got {list(table.shape)}")
    if qkv_bias is not None and qkv_bias.shape != (qkv.shape[3],):
        raise ValueError(f"qkv_bias must be [{qkv.shape[3]}], got {list(qkv_bias.shape)}")
    for name, tensor in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w), ("qkv_bias", qkv_bias)):
        if tensor is not None and tensor.dtype != qkv.dtype:
            raise ValueError(f"{name} must have the dtype of qkv, {qkv.dtype}, got {tensor.dtype}")
    if qkv_bias is None:
        qkv_bias = qkv.new_zeros(qkv.shape[3])
    return qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size


REL_POS_ATTENTION = register(
    Operation(
        "rel_pos_attention",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
