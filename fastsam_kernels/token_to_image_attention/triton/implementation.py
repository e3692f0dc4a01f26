"""Limitations of the Triton kernels of ``token_to_image_attention`` and the way to call them; imports no triton."""

from __future__ import annotations

from torch import Tensor

from ...cross_attention.limits import token_limitation
from ...cross_attention.operands import ImageTokens, ValueProjection
from ...dispatch import triton_implementation


def _run(queries: Tensor, image: ImageTokens, value: ValueProjection) -> Tensor:
    from .custom_op import token_to_image_triton

    return token_to_image_triton(queries, image.tokens, image.pe, *value, image.image_index)


def _limitation(queries: Tensor, image: ImageTokens, value: ValueProjection) -> str | None:
    return token_limitation(queries, len(value.weight) // queries.shape[1])


TRITON = triton_implementation(_run, _limitation, multiplies=True)
