"""A linear layer on fp8 rows (e4m3) and an fp8 weight; the formula is that of :mod:`fastsam_kernels.int8_linear`.

Products of two codes are exact in fp32; their sums are rounded as the hardware does.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from ..quantization.linear import exact_linear, prepare_linear
from ..quantization.operands import QuantizedRows, QuantizedWeight


def fp8_linear(
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
) -> Tensor:
    """Apply a linear layer to quantised rows; arguments and errors are those of :func:`fastsam_kernels.int8_linear`."""
    return FP8_LINEAR.run(kernels, *_prepare(rows, weight, bias, residual=residual, gelu=gelu, dtype=dtype))


_prepare = partial(prepare_linear, torch.float8_e4m3fn)
FP8_LINEAR = register(Operation("fp8_linear", (Implementation("reference", exact_linear),), _prepare))
