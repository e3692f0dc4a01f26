"""Attention of image tokens to prompt tokens as its formula says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights


def reference(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> Tensor:
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
