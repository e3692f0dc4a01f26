"""The upscaling and the mask product as modules compute them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import UpscalingWeights


def reference(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    grid: tuple[int, int],
    eps: float,
    out_dtype: torch.dtype,
    high_res: tuple[Tensor, Tensor] | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """Run the modules of the mask decoder, one after the other."""

    def features_of(images: Tensor) -> Tensor:
        return images if image_index is None else images.index_select(0, image_index)

    def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernel = weight.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)  # [in, out, 2, 2]
        return F.conv_transpose2d(x, kernel, bias[: len(bias) // 4], stride=2)

    x = keys.transpose(1, 2).unflatten(2, grid)
    x = convolution(x, weights.weight1, weights.bias1)
    if high_res is not None:
        x = x + features_of(high_res[1])
    x = F.layer_norm(x.permute(0, 2, 3, 1), weights.norm_weight.shape, weights.norm_weight, weights.norm_bias, eps)
    x = F.gelu(x.permute(0, 3, 1, 2))
    x = convolution(x, weights.weight2, weights.bias2)
    if high_res is not None:
        x = x + features_of(high_res[0])
    x = F.gelu(x)  # [P, C2, 4h, 4w]
    return (hyper @ x.flatten(2)).unflatten(2, x.shape[2:]).to(out_dtype)
