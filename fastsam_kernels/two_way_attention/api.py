"""Both cross-attentions in one pass over the image tokens; see :mod:`fastsam_kernels.cross_attention`."""

from __future__ import annotations

from torch import Tensor

from ..cross_attention.operands import (
    AbsorbedTokens,
    ImageTokens,
    LayerNormWeights,
    ValueProjection,
    check_dtypes,
    check_update,
    check_value,
)
from ..dispatch import Implementation, Kernels, Operation, choice_for, register, resolve_kernels
from .eager import eager
from .reference import reference
from .triton.implementation import TRITON


def two_way_attention(
    image: ImageTokens,
    absorbed: AbsorbedTokens,
    norm: LayerNormWeights,
    queries: Tensor,
    value: ValueProjection,
    *,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ``image_to_token_attention``, then ``token_to_image_attention`` on the image tokens that it updated.

    The decoder may run both at once because the tokens of the next attention to the image do not depend on how this
    block changed it.

    Args:
        image, absorbed, norm: arguments of the former.
        queries, value: arguments of the latter; [P, H, Q, C] of at most as many tokens as ``absorbed`` has.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        image tokens [P, N, C], contiguous, and what the prompts' tokens learn from them, [P, Q, H * d]; both in the
        dtype of the image tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    return TWO_WAY_ATTENTION.run(kernels, *_prepare(image, absorbed, norm, queries, value))


def without_unused_queries(image: ImageTokens, kernels: Kernels) -> ImageTokens:
    """Return ``image``, without its ``queries`` where :func:`two_way_attention` would not compute scores from them.

    Image queries spare the implementations in PyTorch the sums with the positions and most of the scores; the Triton
    kernel reads the image tokens in any case.
    """
    choice = choice_for(kernels, TWO_WAY_ATTENTION.name)
    if resolve_kernels(choice, image.tokens.device, image.tokens.dtype) == TRITON.name:
        return image._replace(queries=None)
    return image


def _prepare(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, queries: Tensor, value: ValueProjection
) -> tuple[ImageTokens, AbsorbedTokens, LayerNormWeights, Tensor, ValueProjection]:
    named = check_update(image, absorbed, norm)
    prompts, heads, tokens, channels = absorbed.values.shape
    count = queries.shape[2] if queries.ndim == 4 else 0
    if queries.shape != (prompts, heads, count, channels) or not 1 <= count <= tokens:
        expected = f"[{prompts}, {heads}, 1 to {tokens}, {channels}]"
        raise ValueError(f"queries must be {expected}, got {list(queries.shape)}")
    check_value(queries, value)
    named["queries"], named["value.weight"], named["value.bias"] = queries, value.weight, value.bias
    check_dtypes(image, named)
    return image, absorbed, norm, queries, value


TWO_WAY_ATTENTION = register(
    Operation(
        "two_way_attention",
        (TRITON, Implementation("torch", eager), Implementation("reference", reference)),
        _prepare,
    )
)
