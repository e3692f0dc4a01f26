"""Linear layers of an encoder as one pass each, with their GELU where one follows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.quantized_linear import QuantizedLinear, linear_dtype, norm_of

_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None


class Linears:
    """Computes the linear layers of a block, those in 8 bits too.

    PyTorch asks oneDNN for products of 16 bits on a CPU by itself, and here also for those of fp32: they take a tenth
    less time there, and the GELU is for nothing. It reads weights in an order of its own.

    Args:
        kernels: implementation of the layers in 8 bits.
        keeps_order: put each weight in that order once, for a block that runs in chunks, and not with every chunk.
    """

    def __init__(self, kernels: str, keeps_order: bool = False) -> None:
        self._kernels = kernels
        self._ordered: dict[nn.Linear, Tensor] | None = {} if keeps_order else None

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """Apply ``layer`` to [..., C]."""
        if isinstance(layer, QuantizedLinear):
            return layer.multiply(layer.quantize(x, self._kernels), linear_dtype(x), self._kernels)
        if _takes_onednn(layer, x):
            return self._onednn(layer, x, "none", "")
        return F.linear(x, layer.weight, layer.bias)

    def normed(self, norm: Any, layer: Any, x: Tensor) -> Tensor:
        """Apply a layer norm and ``layer`` to [..., C]."""
        if isinstance(layer, QuantizedLinear):
            return layer.multiply(layer.quantize(x, self._kernels, norm_of(norm)), linear_dtype(x), self._kernels)
        return self(layer, norm(x))

    def normed_gelu(self, norm: Any, layer: Any, x: Tensor, approximate: str) -> Tensor:
        """Apply a layer norm, ``layer`` and a GELU to [..., C]; ``approximate`` as in ``torch.nn.GELU``."""
        if isinstance(layer, QuantizedLinear):
            rows = layer.quantize(x, self._kernels, norm_of(norm))
            if approximate == "none":
                return layer.multiply(rows, linear_dtype(x), self._kernels, gelu=True)
            return F.gelu(layer.multiply(rows, linear_dtype(x), self._kernels), approximate=approximate)
        x = norm(x)
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
