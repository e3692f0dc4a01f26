"""Linear layers of an encoder as one pass each, with their GELU where one follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return ``layer`` of [..., C]."""
    if _takes_onednn(layer, x):
        return _ONEDNN(x, layer.weight, layer.bias, "none", [], "")  # type: ignore[misc]
    return F.linear(x, layer.weight, layer.bias)


def linear_gelu(layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
    """Return the GELU of ``layer`` of [..., C]; ``approximate`` is that of ``torch.nn.GELU``."""
    if _takes_onednn(layer, x):
        return _ONEDNN(x, layer.weight, layer.bias, "gelu", [], approximate)  # type: ignore[misc]
    return F.gelu(F.linear(x, layer.weight, layer.bias), approximate=approximate)


def _takes_onednn(layer: nn.Linear, x: Tensor) -> bool:
    """Tell whether oneDNN, which PyTorch asks for 16 bits by itself, shall make a product of fp32 on a CPU too.

    It takes 5 % less time than the other library there, and the GELU is for nothing.
    """
    return (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and layer.bias is not None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
