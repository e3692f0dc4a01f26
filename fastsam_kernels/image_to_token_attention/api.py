"""Attention of image tokens to prompt tokens; see :mod:`fastsam_kernels.cross_attention`."""

from __future__ import annotations

from torch import Tensor

from ..cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights, check_dtypes, check_update
from ..dispatch import Implementation, Kernels, Operation, register
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def image_to_token_attention(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, *, kernels: Kernels = "auto"
) -> Tensor:
    """Attend from image tokens to prompt tokens, then project, add the residual and normalise.

    Args:
        image: the image tokens; with ``queries``, ``absorbed.keys`` are what those meet. "triton" takes none.
        absorbed: the prompt tokens.
        norm: the layer norm.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [P, N, C], contiguous, in the dtype of the image tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    return IMAGE_TO_TOKEN_ATTENTION.run(kernels, *_prepare(image, absorbed, norm))


def _prepare(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights
) -> tuple[ImageTokens, AbsorbedTokens, LayerNormWeights]:
    check_dtypes(image, check_update(image, absorbed, norm))
    return image, absorbed, norm


IMAGE_TO_TOKEN_ATTENTION = register(
    Operation(
        "image_to_token_attention",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
