"""Suppression of boxes a block at a time, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .overlaps import overlaps

_BLOCK = 256  # boxes


def eager(boxes: Tensor, threshold: float) -> Tensor:
    """Suppress a block of boxes by those kept before it, then among themselves.

    Among themselves, all decisions are made anew from the previous ones until none changes. The first i boxes are
    right after i rounds, so that this ends, and only where ``reference`` does.
    """
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(boxes), _BLOCK):
        block = slice(start, start + _BLOCK)
        free = ~overlaps(boxes[:start][keep[:start]], boxes[block], threshold).any(dim=0)
        rivals = overlaps(boxes[block], boxes[block], threshold).triu(diagonal=1)
        before, stays = free, free & ~(rivals & free[:, None]).any(dim=0)
        while not torch.equal(before, stays):
            before, stays = stays, free & ~(rivals & stays[:, None]).any(dim=0)
        keep[block] = stays
    return keep
