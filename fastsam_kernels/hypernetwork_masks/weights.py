"""The weights of the upscaling, as the operation takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class UpscalingWeights(NamedTuple):
    """Both transposed convolutions as matrices, columns in the order (row, column, channel) of their 2 x 2 output.

    Attributes:
        weight1: [C, 4 * C1].
        bias1: [4 * C1].
        norm_weight, norm_bias: [C1].
        weight2: [C1, 4 * C2].
        bias2: [4 * C2].
    """

    weight1: Tensor
    bias1: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight2: Tensor
    bias2: Tensor


def pack_upscaling(
    weight1: Tensor, bias1: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight2: Tensor, bias2: Tensor
) -> UpscalingWeights:
    """Return the weights as the operation takes them, from ``ConvTranspose2d`` [in, out, 2, 2] and its like."""

    def matrix(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)

    return UpscalingWeights(matrix(weight1), bias1.repeat(4), norm_weight, norm_bias, matrix(weight2), bias2.repeat(4))
