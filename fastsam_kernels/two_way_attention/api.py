"""The two cross-attentions of SAM's mask decoder, with the projections of the image side absorbed into the token side.

For image tokens x_n [C] at positions e_n, heads h of d channels, and the tokens t of one prompt:

    token to image:  s_n = (W_k,h (x_n + e_n) + b_k,h) . q_ht / sqrt(d);  o_ht = sum_n softmax_n(s) (W_v,h x_n + b_v,h)
    image to token:  s_t = (W_q,h (x_n + e_n) + b_q,h) . k_ht / sqrt(d)      y_n = W_o concat_h sum_t softmax_t(s) v_ht

K, V and Q of the image are never formed, because the few tokens can carry their weights instead:

    token to image:  a_ht = W_k,h^T q_ht / sqrt(d);  s_n = a_ht . (x_n + e_n)  (b_k is the same for all n: it cancels);
                     o_ht = W_v,h (sum_n softmax_n(s) x_n) + b_v,h
    image to token:  a_ht = W_q,h^T k_ht / sqrt(d), b_ht = b_q,h . k_ht / sqrt(d);  s_t = a_ht . (x_n + e_n) + b_ht;
                     u_ht = W_o,h v_ht + b_o / H;  y_n = sum_ht softmax_t(s) u_ht,  then the residual and the norm.

With N = 4096 and C = 256 that is less work than projecting the image up to about 16 tokens per prompt, and memory sees
the image tokens once. The operations take the absorbed operands a, b and u (:class:`AbsorbedTokens`). Only the queries
of an image that no prompt has touched are worth forming and keeping (``ImageTokens.queries``), for the implementations
in PyTorch: their scores then take 16 products per token and head instead of 256.

Source: Segment Anything (arXiv 2304.02643), appendix A; ``transformer.py`` of segment-anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import resolve_kernels, select_implementation
from .eager import image_to_token_eager, token_to_image_eager, two_way_eager
from .operands import (
    AbsorbedTokens,
    ImageTokens,
    LayerNormWeights,
    ValueProjection,
    check_dtypes,
    check_image,
    check_queries,
    check_update,
    check_value,
)
from .reference import image_to_token_reference, token_to_image_reference, two_way_reference

MAX_TOKENS = 16  # per prompt, for which absorption saves work, and which the kernels hold in registers


def token_to_image_attention(
    queries: Tensor, image: ImageTokens, value: ValueProjection, *, kernels: str = "auto"
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
    check_image(queries, image)
    check_value(queries, value)
    check_dtypes(image, {"queries": queries, "value.weight": value.weight, "value.bias": value.bias})
    chosen = select_implementation(
        "token_to_image_attention",
        kernels,
        image.tokens.device,
        _constraint(queries, value.weight.shape[0] // queries.shape[1]),
        queries,
        image.tokens,
        image.pe,
        *value,
        products=image.tokens.dtype,
    )
    if chosen == "reference":
        return token_to_image_reference(queries, image, value)
    if chosen == "torch":
        return token_to_image_eager(queries, image, value)
    from .token_to_image_kernel import token_to_image_triton

    return token_to_image_triton(queries, image.tokens, image.pe, *value, image.image_index)


def image_to_token_attention(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, *, kernels: str = "auto"
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
    check_update(image, absorbed, norm)
    constraint = _constraint(absorbed.values, 16) if image.queries is None else _IMAGE_QUERIES
    chosen = select_implementation(
        "image_to_token_attention",
        kernels,
        image.tokens.device,
        constraint,
        image.tokens,
        image.pe,
        *absorbed,
        norm.weight,
        norm.bias,
        products=image.tokens.dtype,
    )
    if chosen == "reference":
        return image_to_token_reference(image, absorbed, norm)
    if chosen == "torch":
        return image_to_token_eager(image, absorbed, norm)
    from .image_to_token_kernel import image_to_token_triton

    return image_to_token_triton(image.tokens, image.pe, *absorbed, *norm, image.image_index)


def two_way_attention(
    image: ImageTokens,
    absorbed: AbsorbedTokens,
    norm: LayerNormWeights,
    queries: Tensor,
    value: ValueProjection,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run :func:`image_to_token_attention`, then :func:`token_to_image_attention` on the updated image tokens.

    The decoder may run both at once because the tokens of the next attention to the image do not depend on how this
    block changed it.

    Args:
        image, absorbed, norm: of the former.
        queries, value: of the latter; [P, H, Q, C] of at most as many tokens as ``absorbed`` has.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        image tokens [P, N, C], contiguous, and what the prompts' tokens learn from them, [P, Q, H * d]; both in the
        dtype of the image tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown ``kernels``.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    check_update(image, absorbed, norm)
    check_queries(queries, absorbed)
    check_value(queries, value)
    check_dtypes(image, {"queries": queries, "value.weight": value.weight, "value.bias": value.bias})
    constraint: str | None = _IMAGE_QUERIES
    if image.queries is None:
        constraint = _constraint(absorbed.values, len(value.weight) // queries.shape[1])
    chosen = select_implementation(
        "two_way_attention",
        kernels,
        image.tokens.device,
        constraint,
        image.tokens,
        image.pe,
        *absorbed,
        norm.weight,
        norm.bias,
        queries,
        *value,
        products=image.tokens.dtype,
    )
    if chosen == "reference":
        return two_way_reference(image, absorbed, norm, queries, value)
    if chosen == "torch":
        return two_way_eager(image, absorbed, norm, queries, value)
    from .two_way_kernel import two_way_triton

    count, tokens = queries.shape[2], absorbed.values.shape[2]
    if count < tokens:  # the kernel has one number of tokens
        queries = F.pad(queries, (0, 0, 0, tokens - count))
    updated, learned = two_way_triton(image.tokens, image.pe, *absorbed, *norm, queries, *value, image.image_index)
    return updated, learned[:, :count]


def without_unused_queries(image: ImageTokens, kernels: str) -> ImageTokens:
    """Return ``image``, without its ``queries`` where :func:`two_way_attention` would not compute scores from them.

    Image queries spare the implementations in PyTorch the sums with the positions and most of the scores; the Triton
    kernel reads the image tokens in any case.
    """
    if resolve_kernels(kernels, image.tokens.device, image.tokens.dtype) == "triton":
        return image._replace(queries=None)
    return image


_IMAGE_QUERIES = "it computes scores from the image tokens, and image.queries are given"


def _constraint(tokens: Tensor, head_dim: int) -> str | None:
    """What keeps the Triton kernels from these inputs."""
    prompts, heads, count, channels = tokens.shape
    if tokens.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the tensors must be fp32, fp16 or bf16, got {tokens.dtype}"
    if count > MAX_TOKENS:
        return f"a prompt may have up to {MAX_TOKENS} tokens, got {count}"
    for what, number, least in (("channels", channels, 64), ("heads", heads, 2), ("channels a head", head_dim, 1)):
        if number < least or number & (number - 1):
            return f"the {what} must be a power of two of at least {least}, got {number}"
    if prompts == 0:
        return "there are no prompts"
    return None
