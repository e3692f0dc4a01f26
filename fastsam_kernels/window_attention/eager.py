"""The attention by PyTorch's fused attention, on any device and differentiable."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..windows import Region, regions

# Elements of q, k and v that are put in the order of windows at once. On a CPU they should stay in the cache.
_BLOCKS = {"cpu": 2**19}
_BLOCK_GPU = 2**27
_MAX_WINDOWS = 65_535  # per call of PyTorch's attention on a GPU


def eager(qkv: Tensor, qkv_bias: Tensor, num_heads: int, window_size: int, pool_queries: bool) -> Tensor:
    """Run PyTorch's attention on real tokens, the windows of a region at once; two keys stand for padded ones."""
    batch, height, width, channels = qkv.shape
    window = (window_size, window_size) if window_size else (height, width)
    step = 2 if pool_queries else 1
    out = qkv.new_empty((batch, height // step, width // step, channels // 3))
    for region in regions(height, width, window):
        rows, columns = region.window
        asking = Region(region.top // step, region.left // step, region.windows, (rows // step, columns // step))
        padding = _padding(qkv, rows * columns, math.prod(window))
        source, target = region.cut(qkv), asking.cut(out)
        for block in _blocks(source):
            windows = source[block].transpose(2, 3)  # [images, down, across, rows, columns, 3 * C]
            tokens = _tokens(windows, qkv_bias, 0 if padding is None else 2)
            q, k, v = tokens.chunk(3, -1)
            q = q[:, : rows * columns]
            if pool_queries:
                q = _pooled(q.unflatten(1, (rows, columns))).flatten(1, 2)
            q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, padding).transpose(1, 2)
            grid = attended.reshape(*windows.shape[:3], *asking.window, -1)
            target[block].copy_(grid.transpose(2, 3))
    return out


def _blocks(source: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of images and rows of windows of a region [B, down, rows, across, columns, 3 * C]."""
    batch, down, rows, across, columns, channels = source.shape
    if torch.compiler.is_compiling():
        down_chunk, batch_chunk = down, batch  # every block would be compiled
    else:
        limit = _BLOCKS.get(source.device.type, _BLOCK_GPU) // (rows * across * columns * channels)
        limit = max(min(limit, _MAX_WINDOWS // across), 1)
        down_chunk, batch_chunk = min(limit, down), max(limit // down, 1)
    for image in range(0, batch, batch_chunk):
        for top in range(0, down, down_chunk):
            yield slice(image, image + batch_chunk), slice(top, top + down_chunk)


def _tokens(windows: Tensor, bias: Tensor, more: int) -> Tensor:
    """Return [images, down, across, rows, columns, 3 * C] as [windows, tokens + ``more``, 3 * C], those of the bias."""
    if not more:
        return windows.flatten(0, 2).flatten(1, 2)
    images, down, across, rows, columns, channels = windows.shape
    tokens = windows.new_empty((images * down * across, rows * columns + more, channels))
    tokens[:, -more:] = bias
    tokens[:, :-more].view(windows.shape).copy_(windows)
    return tokens


def _pooled(x: Tensor) -> Tensor:
    """Return the maximum of each 2 x 2 tokens, [N, rows, columns, C] -> [N, rows / 2, columns / 2, C]."""
    x = torch.maximum(x[:, 0::2], x[:, 1::2])
    return torch.maximum(x[:, :, 0::2], x[:, :, 1::2])


def _padding(like: Tensor, tokens: int, size: int) -> Tensor | None:
    """Return what is added to the scores where a window of ``size`` tokens has fewer: zeros, then those of two keys.

    The two stand for all padded keys: e to the power of their numbers sums to as many. One number would do if the
    dtype could hold it: the logarithm of 132 rounded to bf16 is off by 0.8 %, so the second one makes up for the first.
    """
    if tokens == size:
        return None
    missing = size - tokens
    steps = 2 / torch.finfo(like.dtype).eps
    fraction, exponent = math.frexp(math.log(missing))
    first = math.ldexp(math.floor(fraction * steps) / steps, exponent)  # rounded down to the dtype
    rest = missing - math.exp(first)
    scores = like.new_zeros(tokens + 2)
    scores[tokens] = first
    scores[tokens + 1] = math.log(rest) if rest > 0 else -math.inf
    return scores.view(1, 1, 1, -1)
