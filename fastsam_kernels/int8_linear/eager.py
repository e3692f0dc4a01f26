"""The layer by products of bytes, of oneDNN on a CPU and cuBLAS on a GPU; elsewhere by exact sums in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization import onednn
from ..quantization.operands import QuantizedRows, QuantizedWeight

_CPU_ROWS = 512
_EXACT_INPUTS = 1024  # 1024 * 127 * 127 is below 2^24: fp32 sums them exactly in any order
_MIN_ROWS_GPU = 17  # of torch._int_mm


def eager(
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply some rows after others on a CPU, so that the epilogue finds them in the cache."""
    codes, scales = rows.codes.reshape(-1, rows.codes.shape[-1]), rows.scales.reshape(-1, 1)
    outputs, on_cpu = len(weight.codes), codes.device.type == "cpu"
    packed = onednn.pack(weight.codes) if weight.packed is None else weight.packed
    out = torch.empty((len(codes), outputs), dtype=dtype, device=codes.device)
    shift = torch.zeros(outputs, device=codes.device) if bias is None else bias.float()
    added = None if residual is None else residual.reshape(len(codes), outputs)
    step = _CPU_ROWS if on_cpu else max(len(codes), 1)
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        product = _scaled_product(codes[part], weight, packed)
        target = out[part] if dtype == torch.float32 else product
        torch.addcmul(shift, product, scales[part], out=target)
        if gelu:
            torch.ops.aten.gelu_(target)
        if added is not None:
            target += added[part]
        if dtype != torch.float32:
            out[part] = target
    return out.view(*rows.scales.shape, outputs)


def _scaled_product(codes: Tensor, weight: QuantizedWeight, packed: Tensor | None) -> Tensor:
    """Return sums [M, N] in fp32, times the scales of the output channels."""
    if packed is not None:
        return onednn.multiply(codes, packed, weight.scales)
    sums = _int_mm(codes, weight.codes) if codes.device.type == "cuda" else _exact_sums(codes, weight.codes)
    return sums.float() * weight.scales


def _int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    missing = max(_MIN_ROWS_GPU - len(codes), 0)
    padded = F.pad(codes, (0, 0, 0, missing)) if missing else codes
    return torch._int_mm(padded, weight.t())[: len(codes)]


def _exact_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """Return sums in int32, of as many products at a time as fp32 sums without rounding."""
    parts = (x.float().split(_EXACT_INPUTS, 1) for x in (codes, weight))
    first, *others = (F.linear(x, w).to(torch.int32) for x, w in zip(*parts, strict=True))
    for sums in others:
        first += sums
    return first
