"""Linear layers of an encoder as one pass each, with their GELU where one follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None


class Linears:
    """Computes the linear layers of a block.

    PyTorch asks oneDNN for products of 16 bits on a CPU by itself, and here also for those of fp32: they take a tenth
    less time there, and the GELU is for nothing. It reads weights in an order of its own.

    Args:
        keeps_order: put each weight in that order once, for a block that runs in chunks, and not with every chunk.
    """

    def __init__(self, keeps_order: bool = False) -> None:
        self._ordered: dict[nn.Linear, Tensor] | None = {} if keeps_order else None

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Apply ``layer`` to [..., C]."""
        if _takes_onednn(layer, x):
            return self._onednn(layer, x, "none", "")
        return F.linear(x, layer.weight, layer.bias)

    def gelu(self, layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
        """Apply ``layer`` and a GELU to [..., C]; ``approximate`` as in ``torch.nn.GELU``."""
        if _takes_onednn(layer, x):
            return self._onednn(layer, x, "gelu", approximate)
        return F.gelu(F.linear(x, layer.weight, layer.bias), approximate=approximate)

    def _onednn(self, layer: nn.Linear, x: Tensor, after: str, approximate: str) -> Tensor:
        assert _ONEDNN is not None
        weight: Tensor = layer.weight
        if self._ordered is not None:
            if layer not in self._ordered:
                self._ordered[layer] = _ONEDNN._reorder_linear_weight(weight, x.numel() // x.shape[-1])
            weight = self._ordered[layer]
        return _ONEDNN._linear_pointwise(x, weight, layer.bias, after, [], approximate)


def _takes_onednn(layer: nn.Linear, x: Tensor) -> bool:
    return (
        _ONEDNN is not None
        and bool(torch.backends.mkldnn.enabled)
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and layer.bias is not None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
