"""``torch.ops.fastsam.nms``: the kernels as an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from .kernel import plan, words_of


@torch.library.custom_op("fastsam::nms", mutates_args=())
def nms_triton(boxes: Tensor, threshold: float) -> Tensor:
    """Mark the boxes [N, 4] fp32, best first, that stay: [N] bool; see :func:`fastsam_kernels.nms`."""
    words = words_of(len(boxes))
    bits = torch.empty((len(boxes), words), dtype=torch.int32, device=boxes.device)
    keep = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    if len(boxes) == 0:
        return keep
    tile = lookup("nms", arch_of(boxes.device), boxes.dtype)
    for launch in plan(boxes.contiguous(), threshold, bits, keep, tile):
        launch.run()
    return keep


@nms_triton.register_fake
def _(boxes: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty(len(boxes), dtype=torch.bool)
