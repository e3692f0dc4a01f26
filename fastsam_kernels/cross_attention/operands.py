"""Operands of the attentions between prompt tokens and image tokens, as values, and the checks of their shapes.

Throughout: I images, P prompts, N image tokens, T tokens per prompt, C channels, H heads of d channels each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImageTokens(NamedTuple):
    """The image tokens that prompts attend to.

    Attributes:
        tokens: [I, N, C]; I is P, or what ``image_index`` counts.
        pe: [N, C] positions, added to the tokens for scores and neither to values nor to the residual.
        image_index: [P] int64, the row of ``tokens`` of each prompt; None when every prompt has its own.
        queries: [I, N, H * d], W_q (x_n + e_n) + b_q where they are given, see :class:`AbsorbedTokens`.
    """

    tokens: Tensor
    pe: Tensor
    image_index: Tensor | None = None
    queries: Tensor | None = None


class AbsorbedTokens(NamedTuple):
    """Prompt tokens that have absorbed the projections of the image tokens that attend to them.

    Attributes:
        keys: [P, H, T, C], W_q,h^T k_ht / sqrt(d); [P, H, T, d], k_ht / sqrt(d), beside image queries.
        bias: [P, H, T], b_q,h . k_ht / sqrt(d), or zero beside image queries; -inf for tokens that are padding,
            never for all of a prompt.
        values: [P, H, T, C], W_o,h v_ht + b_o / H.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor


class ValueProjection(NamedTuple):
    """The projection W_v, b_v of the image tokens to values.

    Attributes:
        weight: [H * d, C].
        bias: [H * d].
    """

    weight: Tensor
    bias: Tensor


class LayerNormWeights(NamedTuple):
    """A layer norm over C channels: ``weight`` and ``bias`` [C], and ``eps``."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


def check_image(absorbed: Tensor, image: ImageTokens) -> None:
    """Raise ``ValueError`` unless ``image`` fits tokens ``absorbed`` [P, H, T, C]."""
    if absorbed.ndim != 4:
        raise ValueError(f"the absorbed tokens must be [P, H, T, C], got {list(absorbed.shape)}")
    (prompts, _, _, channels), (tokens, pe, index, _) = absorbed.shape, image
    if tokens.ndim != 3 or tokens.shape[2] != channels or (index is None and len(tokens) != prompts):
        images = prompts if index is None else "I"
        raise ValueError(f"image.tokens must be [{images}, N, {channels}], got {list(tokens.shape)}")
    if pe.shape != tokens.shape[1:]:
        raise ValueError(f"image.pe must be {list(tokens.shape[1:])}, got {list(pe.shape)}")
    if index is not None and (index.shape != (prompts,) or index.dtype != torch.int64):
        raise ValueError(f"image.image_index must be [{prompts}] of int64, got {list(index.shape)} {index.dtype}")


def check_value(queries: Tensor, value: ValueProjection) -> None:
    """Raise ``ValueError`` unless ``value`` fits ``queries`` [P, H, T, C]."""
    heads, channels = queries.shape[1], queries.shape[3]
    if value.weight.ndim != 2 or value.weight.shape[1] != channels or len(value.weight) % heads:
        raise ValueError(f"value.weight must be [{heads} * d, {channels}], got {list(value.weight.shape)}")
    if value.bias.shape != value.weight.shape[:1]:
        raise ValueError(f"value.bias must be [{len(value.weight)}], got {list(value.bias.shape)}")


def check_update(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> dict[str, Tensor]:
    """Raise ``ValueError`` unless the shapes of an update of the image tokens fit together.

    Returns:
        the tensors by name, for :func:`check_dtypes`.
    """
    check_image(absorbed.keys if image.queries is None else absorbed.values, image)
    expected: tuple[int, ...] = absorbed.values.shape
    if image.queries is not None:
        heads, width = absorbed.values.shape[1], image.queries.shape[-1]
        if image.queries.shape[:-1] != image.tokens.shape[:-1] or width % heads:
            shape = f"[{image.tokens.shape[0]}, {image.tokens.shape[1]}, {heads} * d]"
            raise ValueError(f"image.queries must be {shape}, got {list(image.queries.shape)}")
        expected = (*absorbed.values.shape[:3], width // heads)
    if absorbed.keys.shape != expected or absorbed.bias.shape != expected[:3]:
        raise ValueError(
            f"absorbed.keys and absorbed.bias must be {list(expected)} and {list(expected[:3])} beside these values, "
            f"got {list(absorbed.keys.shape)} and {list(absorbed.bias.shape)}"
        )
    named = {"norm.weight": norm.weight, "norm.bias": norm.bias}
    for name, vector in named.items():
        if vector.shape != image.tokens.shape[2:]:
            raise ValueError(f"{name} must be [{image.tokens.shape[2]}], got {list(vector.shape)}")
    named["absorbed.keys"], named["absorbed.bias"], named["absorbed.values"] = absorbed
    return named


def check_dtypes(image: ImageTokens, others: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` unless ``image`` and the ``others``, named for the message, have one dtype."""
    dtype = image.tokens.dtype
    named = {"image.pe": image.pe, **others}
    if image.queries is not None:
        named["image.queries"] = image.queries
    for name, tensor in named.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of the image tokens, {dtype}, got {tensor.dtype}")
