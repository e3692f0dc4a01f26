"""The attention in PyTorch's operations, on any device and differentiable."""

from __future__ import annotations

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of a block of queries on a CPU: what is near its cache. A block has so many queries at the least.
_BLOCK, _MIN_QUERIES = 2**21, 128


def eager(queries: Tensor, keys: Tensor, values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Run objects of equal numbers of keys as one batch, or on a CPU one after the other."""
    width = values.shape[1]
    narrower = width < keys.shape[1]
    if keys.device.type == "cpu":
        if narrower and keys.dtype.itemsize < 4:  # PyTorch's attention keeps wide scores, and wants equal widths
            values = F.pad(values, (0, keys.shape[1] - width))
            narrower = False
        run = _in_blocks if narrower else _fused
        sizes = [(length, 1) for length in lengths]
    else:
        run = _fused
        sizes = [(length, len([*same])) for length, same in groupby(lengths)]
    parts, start, first = [], 0, 0
    for length, count in sizes:
        stop = start + length * count
        q = queries if len(queries) == 1 else queries[first : first + count]
        k, v = (x[start:stop].unflatten(0, (count, length)) for x in (keys, values))
        parts.append(run(q.expand(count, -1, -1), k, v))
        start, first = stop, first + count
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended[..., :width]


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def _in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend [O, N, D] to [O, K, D], [O, K, E] a block of queries at a time."""
    k = k.transpose(1, 2)
    size = max(_BLOCK // k.shape[2], _MIN_QUERIES)
    blocks = [(block @ k).softmax(dim=-1) @ v for block in (q / math.sqrt(q.shape[-1])).split(size, dim=1)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
