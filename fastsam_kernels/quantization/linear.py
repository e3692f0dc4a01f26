"""Arguments of the linear layers in 8 bits, and the formula that both have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd
from .operands import QuantizedRows, QuantizedWeight

Arguments = tuple[QuantizedRows, QuantizedWeight, Tensor | None, Tensor | None, bool, torch.dtype]


def prepare_linear(
    codes_dtype: torch.dtype,
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Check the arguments of a linear layer on codes of a dtype, and return them as its forms take them.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or gradients.
    """
    for name, (codes, scales) in (("rows", rows), ("weight", weight[:2])):
        if codes.dtype != codes_dtype or scales.dtype != torch.float32:
            expected = f"codes of {codes_dtype} and scales of torch.float32"
            raise ValueError(f"{name} must have {expected}, got {codes.dtype} and {scales.dtype}")
        if codes.shape[:-1] != scales.shape:
            raise ValueError(f"{name} of {list(codes.shape)} need a scale each, got {list(scales.shape)}")
    if weight.codes.ndim != 2 or rows.codes.shape[-1:] != weight.codes.shape[1:]:
        shapes = f"{list(rows.codes.shape)} and {list(weight.codes.shape)}"
        raise ValueError(f"rows must be [..., K] and the weight [N, K], got {shapes}")
    outputs = len(weight.codes)
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {list(bias.shape)}")
    shape = (*rows.scales.shape, outputs)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {list(shape)}, got {list(residual.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    if requires_autograd(*(tensor for tensor in (bias, residual) if tensor is not None)):
        raise ValueError("a linear layer in 8 bits has no backward: call it under torch.no_grad()")
    return rows, weight, bias, residual, gelu, dtype


def exact_linear(
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the layer in fp64, in which sums of products of 8-bit codes are exact, and round it once."""
    sums = rows.codes.double() @ weight.codes.double().t()
    out = sums * rows.scales.double()[..., None] * weight.scales.double()
    if bias is not None:
        out = out + bias.double()
    if gelu:
        out = F.gelu(out)
    if residual is not None:
        out = out + residual.double()
    return out.to(dtype)
