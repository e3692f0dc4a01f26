"""Attention of prompt tokens to image tokens; see :mod:`fastsam_kernels.cross_attention`."""

from __future__ import annotations

from torch import Tensor

from ..cross_attention.operands import ImageTokens, ValueProjection, check_dtypes, check_image, check_value
from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def token_to_image_attention(
    queries: Tensor, image: ImageTokens, value: ValueProjection, *, kernels: Kernels = "auto"
) -> Tensor:
    """Attend from prompt tokens to image tokens, before the output projection.

    Args:
        queries: [P, H, T, C], W_k,h^T q_ht / sqrt(d).
        image: the image tokens.
        value: the projection of their values.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [P, T, H * d] in the dtype of the image tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    return TOKEN_TO_IMAGE_ATTENTION.run(kernels, *_prepare(queries, image, value))


def _prepare(
    queries: Tensor, image: ImageTokens, value: ValueProjection
) -> tuple[Tensor, ImageTokens, ValueProjection]:
    check_image(queries, image)
    check_value(queries, value)
    check_dtypes(image, {"queries": queries, "value.weight": value.weight, "value.bias": value.bias})
    return queries, image, value


TOKEN_TO_IMAGE_ATTENTION = register(
    Operation(
        "token_to_image_attention",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
