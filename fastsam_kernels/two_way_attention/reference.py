"""The cross-attentions as their formulas say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection


def token_to_image_reference(queries: Tensor, image: ImageTokens, value: ValueProjection) -> Tensor:
    """Compute ``token_to_image_attention``."""
    keys = image.tokens if image.image_index is None else image.tokens[image.image_index]
    weights = torch.einsum("phtc,pnc->phtn", queries, keys + image.pe).softmax(dim=-1)
    attended = torch.einsum("phtn,pnc->phtc", weights, keys)
    values = torch.einsum("phtc,hdc->pthd", attended, value.weight.unflatten(0, (queries.shape[1], -1)))
    return values.flatten(2) + value.bias


def image_to_token_reference(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> Tensor:
    """Compute ``image_to_token_attention``."""
    keys = image.tokens if image.image_index is None else image.tokens[image.image_index]
    if image.queries is None:
        scores = torch.einsum("pnc,phtc->pnht", keys + image.pe, absorbed.keys)
    else:
        q = image.queries if image.image_index is None else image.queries[image.image_index]
        scores = torch.einsum("pnhd,phtd->pnht", q.unflatten(-1, (absorbed.keys.shape[1], -1)), absorbed.keys)
    weights = (scores + absorbed.bias[:, None]).softmax(dim=-1)
    attended = torch.einsum("pnht,phtc->pnc", weights, absorbed.values)
    return F.layer_norm(keys + attended, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def two_way_reference(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, queries: Tensor, value: ValueProjection
) -> tuple[Tensor, Tensor]:
    """Compute ``two_way_attention``: one attention after the other."""
    tokens = image_to_token_reference(image, absorbed, norm)
    return tokens, token_to_image_reference(queries, ImageTokens(tokens, image.pe), value)
