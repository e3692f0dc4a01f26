"""Attention of SAM's image encoder with decomposed relative position, inside windows or over the whole grid.

For a query i and a key j of the same window (or of the grid), in row h and column w of it, and one head of d channels:

    score(i, j) = q_i . k_j / sqrt(d) + q_i . R_h[h_i - h_j] + q_i . R_w[w_i - w_j]
    out_i       = sum_j softmax_j(score(i, j)) v_j

q is not scaled in the two terms of position. Windows start in the upper left corner; those that reach over the lower
or right edge are zero-padded *before* the projection to q, k and v, so a padded key and value is that projection's
bias, and takes part in the softmax.

The tables are taken as they are stored, a row a distance: the fused kernel needs a product with 2 * size - 1 rows,
where tables gathered for every pair of positions would be size / 2 times as much to read.

Sources: Segment Anything (arXiv 2304.02643), ViTDet (arXiv 2203.16527), MViTv2 (arXiv 2112.01526, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd, select_implementation

# Biases alive at once in the torch form: on a CPU 4 MB in fp32 for a thread, a GPU wants larger products.
_SCORES_A_THREAD = 2**20
_THREADS_OF_A_GRAPH = 4
_SCORES_ELSEWHERE = 2**26
_QUERIES_AT_ONCE = 1024  # of a head: PyTorch's attention on a CPU takes its large tiles from 768 on
HEAD_DIMS = (32, 64, 80)


def rel_pos_attention(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    *,
    num_heads: int,
    window_size: int,
    qkv_bias: Tensor | None,
    kernels: str = "auto",
) -> Tensor:
    """Self-attention straight from the projection to q, k and v.

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
    _check(qkv, rel_pos_h, rel_pos_w, num_heads, window_size, qkv_bias)
    if qkv_bias is None:
        qkv_bias = qkv.new_zeros(qkv.shape[3])
    inputs = (qkv, rel_pos_h, rel_pos_w, qkv_bias)
    constraint = _constraint(qkv, num_heads, window_size)
    chosen = select_implementation("rel_pos_attention", kernels, qkv.device, constraint, *inputs, products=qkv.dtype)
    if chosen == "reference":
        return reference(*inputs, num_heads, window_size)
    if chosen == "torch":
        return eager(*inputs, num_heads, window_size)
    from .kernel import rel_pos_attention_triton

    return rel_pos_attention_triton(*inputs, num_heads, window_size)


def reference(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """Pad, cut into windows, attend with the whole bias in memory, and put together again."""
    batch, height, width, channels = qkv.shape
    size_h, size_w = (window_size, window_size) if window_size else (height, width)
    rows, columns = -(-height // size_h), -(-width // size_w)
    padded = qkv_bias.expand(batch, rows * size_h, columns * size_w, channels).clone()
    padded[:, :height, :width] = qkv
    windows = padded.view(batch, rows, size_h, columns, size_w, 3, num_heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = windows  # [B, rows, columns, heads, size_h, size_w, d] each
    rel_h = torch.einsum("...hwc,hkc->...hwk", q, gather_rel_pos(rel_pos_h))
    rel_w = torch.einsum("...hwc,wkc->...hwk", q, gather_rel_pos(rel_pos_w))
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2).flatten(-3, -2)  # [..., tokens, tokens]
    q, k, v = (x.flatten(-3, -2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    out = scores.softmax(dim=-1) @ v  # [B, rows, columns, heads, tokens, d]
    out = out.unflatten(-2, (size_h, size_w)).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, rows * size_h, columns * size_w, -1)[:, :height, :width].contiguous()


def gather_rel_pos(table: Tensor) -> Tensor:
    """[2 * size - 1, d] -> [size, size, d], the row for each pair of query and key."""
    size = (len(table) + 1) // 2
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]


def eager(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """PyTorch's fused attention on real tokens only, the windows of a region at once, a block of biases at a time."""
    batch, height, width, channels = qkv.shape
    size = (window_size, window_size) if window_size else (height, width)
    gathered_h, gathered_w = gather_rel_pos(rel_pos_h), gather_rel_pos(rel_pos_w)
    _, k_bias, v_bias = qkv_bias.view(3, num_heads, -1)
    out = qkv.new_empty((batch, height, width, channels // 3))
    for region in _regions(height, width, size):
        rows, columns = region.window
        windows = region.cut(qkv).unflatten(-1, (3, num_heads, -1)).permute(5, 0, 1, 3, 6, 2, 4, 7)
        # [windows, heads, rows, columns, d] each; views of a whole grid
        q, k, v = (part.flatten(0, 2) for part in windows)
        rel_h = torch.einsum("nmhwc,hkc->nmhwk", q, gathered_h[:rows])  # of all keys of the window, padded ones too
        rel_w = torch.einsum("nmhwc,wkc->nmhwk", q, gathered_w[:columns])
        k, v, padding = k.flatten(2, 3), v.flatten(2, 3), None
        if region.window != size:
            # All padded keys have one k and one v: together they are one key, with the sum of their weights.
            k, v = (
                torch.cat([x, b.expand(len(x), 1, -1, -1).transpose(1, 2)], 2) for x, b in ((k, k_bias), (v, v_bias))
            )
            padding = _padding_bias(rel_h, rel_w, region.window)
        attended = _attend(q, k, v, rel_h[..., :rows, None], rel_w[..., None, :columns], padding)
        attended = attended.view(*windows.shape[1:]).permute(0, 1, 4, 2, 5, 3, 6)
        region.cut(out).unflatten(-1, (num_heads, -1)).copy_(attended)
    return out


class _Region(NamedTuple):
    """A rectangle of the grid that windows of one size fill: all that are whole, or those cut at an edge."""

    top: int
    left: int
    windows: tuple[int, int]
    window: tuple[int, int]

    def cut(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, windows down, rows, windows across, columns, C], a view."""
        (down, across), (rows, columns) = self.windows, self.window
        x = x[:, self.top : self.top + down * rows, self.left : self.left + across * columns]
        return x.unflatten(2, (across, columns)).unflatten(1, (down, rows))


def _regions(height: int, width: int, size: tuple[int, int]) -> Iterator[_Region]:
    def spans(length: int, window: int) -> list[tuple[int, int, int]]:
        whole, rest = divmod(length, window)
        return [(0, whole, window)] * (whole > 0) + [(whole * window, 1, rest)] * (rest > 0)

    for top, down, rows in spans(height, size[0]):
        for left, across, columns in spans(width, size[1]):
            yield _Region(top, left, (down, across), (rows, columns))


def _padding_bias(rel_h: Tensor, rel_w: Tensor, window: tuple[int, int]) -> Tensor:
    """log of the sum of e^bias over the padded keys of a cut window: those below the grid, then those beside it.

    ``rel_h`` and ``rel_w`` are those of all keys, [windows, heads, rows, columns, size]; the result ends in 1.
    """
    rows, columns = window
    parts = []
    if rows < rel_h.shape[-1]:
        parts.append(rel_h[..., rows:].logsumexp(-1) + rel_w.logsumexp(-1))
    if columns < rel_w.shape[-1]:
        parts.append(rel_h[..., :rows].logsumexp(-1) + rel_w[..., columns:].logsumexp(-1))
    return torch.stack(parts, -1).logsumexp(-1, keepdim=True).to(rel_h.dtype)  # autocast widens it


def _scores_at_once(on_cpu: bool) -> int:
    if not on_cpu:
        return _SCORES_ELSEWHERE
    # A graph cannot ask for the number of threads.
    return _SCORES_A_THREAD * (_THREADS_OF_A_GRAPH if torch.compiler.is_compiling() else torch.get_num_threads())


def _attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, padding: Tensor | None) -> Tensor:
    """Queries [N, heads, rows, columns, d] on keys [N, heads, keys, d].

    The bias is the sum of ``rel_h`` [N, heads, rows, columns, key rows, 1] and ``rel_w`` [..., 1, key columns], and
    ``padding`` [N, heads, rows, columns, 1] for a last key that has no place.
    """
    count, heads, rows, columns, _ = q.shape
    limit = _scores_at_once(q.device.type == "cpu")
    some_rows = min(max(_QUERIES_AT_ONCE // columns, 1), rows)
    some_heads = min(max(limit // (some_rows * columns * k.shape[2]), 1), heads)
    some = max(limit // (heads * rows * columns * k.shape[2]), 1)
    out = q.new_empty(q.shape)
    recorded = requires_autograd(q, k, v, rel_h, rel_w)
    # Memory fresh from the system for every block would cost a CPU as much as the attention itself.
    block_shape = (min(some, count), some_heads, some_rows, columns, rel_h.shape[4], rel_w.shape[5])
    buffer = None if recorded or torch.compiler.is_compiling() else q.new_empty(block_shape)
    for n in range(0, count, some):
        for head in range(0, heads, some_heads):
            windows = (slice(n, n + some), slice(head, head + some_heads))
            for top in range(0, rows, some_rows):
                block = (*windows, slice(top, top + some_rows))
                bias = _outer_sum(rel_h[block], rel_w[block], buffer).flatten(-2)
                if padding is not None:
                    bias = torch.cat([bias, padding[block]], -1)
                queries = q[block].flatten(2, 3)
                attended = F.scaled_dot_product_attention(queries, k[windows], v[windows], bias.flatten(2, 3))
                out[block] = attended.unflatten(2, (-1, columns))
    return out


def _outer_sum(rel_h: Tensor, rel_w: Tensor, buffer: Tensor | None) -> Tensor:
    """Their sum, in the first cells of ``buffer`` if there is one."""
    if buffer is None:
        return rel_h + rel_w
    shape = (
        *rel_h.shape[:-1],
        rel_w.shape[-1],
    )
    return torch.add(rel_h, rel_w, out=buffer.flatten()[: math.prod(shape)].view(shape))


def _check(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, num_heads: int, window_size: int, qkv_bias: Tensor | None
) -> None:
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


def _constraint(qkv: Tensor, num_heads: int, window_size: int) -> str | None:
    """What keeps the Triton form from these inputs."""
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"qkv must be fp32, fp16 or bf16, got {qkv.dtype}"
    head_dim = qkv.shape[3] // (3 * num_heads)
    if head_dim not in HEAD_DIMS:
        return f"the head dimension must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if qkv.numel() == 0:
        return "qkv is empty"
    return None
