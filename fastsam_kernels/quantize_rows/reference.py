"""The quantisation as its formula says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_attention import LayerNormWeights
from ..quantization.operands import SCHEMES, QuantizedRows, quantize_wide


def reference(x: Tensor, scheme: str, norm: LayerNormWeights | None) -> QuantizedRows:
    """Normalise in fp32 at least, and quantise."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        wide = F.layer_norm(wide, x.shape[-1:], norm.weight.to(wide.dtype), norm.bias.to(wide.dtype), norm.eps)
    return quantize_wide(wide, SCHEMES[scheme])
