"""The tables of relative positions."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rel_pos(table: Tensor) -> Tensor:
    """Return the row for each pair of query and key: [2 * size - 1, d] -> [size, size, d]."""
    size = (len(table) + 1) // 2
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]
