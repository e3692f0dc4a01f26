"""``torch.ops.fastsam.preprocess_image``: an operation that compiled graphs and exports keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton.tiles import arch_of, lookup
from .kernel import plan


@torch.library.custom_op("fastsam::preprocess_image", mutates_args=())
def preprocess_image_triton(
    image: Tensor, height: int, width: int, image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Run the registered operation; see :func:`fastsam_kernels.preprocess_image` for the arguments."""
    out = torch.empty((3, image_size, image_size), dtype=dtype, device=image.device)
    tile = lookup("preprocess_image", arch_of(image.device), dtype)
    plan(image, (height, width), mean, std, out, tile).run()
    return out


@preprocess_image_triton.register_fake
def _(image: Tensor, height: int, width: int, image_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((3, image_size, image_size), dtype=dtype, device=image.device)
