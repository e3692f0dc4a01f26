"""``torch.ops.fastsam.connected_components``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from .kernel import plan


@torch.library.custom_op("fastsam::connected_components", mutates_args=())
def connected_components_triton(masks: Tensor) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.connected_components`."""
    parents = torch.empty(masks.shape, dtype=torch.int32, device=masks.device)
    labels = torch.empty_like(parents)
    tile = lookup("connected_components", arch_of(masks.device), masks.dtype)
    for launch in plan(masks, parents, labels, tile):
        launch.run()
    return labels


@connected_components_triton.register_fake
def _(masks: Tensor) -> Tensor:
    return torch.empty(masks.shape, dtype=torch.int32, device=masks.device)
