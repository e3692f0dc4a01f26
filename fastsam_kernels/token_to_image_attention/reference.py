"""Attention of prompt tokens to image tokens as its formula says."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cross_attention.operands import ImageTokens, ValueProjection


def reference(queries: Tensor, image: ImageTokens, value: ValueProjection) -> Tensor:
    """Compute ``token_to_image_attention``."""
    keys = image.tokens if image.image_index is None else image.tokens[image.image_index]
    weights = torch.einsum("phtc,pnc->phtn", queries, keys + image.pe).softmax(dim=-1)
    attended = torch.einsum("phtn,pnc->phtc", weights, keys)
    values = torch.einsum("phtc,hdc->pthd", attended, value.weight.unflatten(0, (queries.shape[1], -1)))
    return values.flatten(2) + value.bias
