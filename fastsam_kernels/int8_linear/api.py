"""A linear layer on int8 rows and an int8 weight, with what follows it in its epilogue.

    sum_n = sum_k x_k w_nk                                  exact, in integers
    out_n = [residual_n +] [GELU](sum_n * s_x * s_n + b_n)  s_x of the row, s_n of the output channel

Sums of 5120 products of codes up to 127 fit 32 bits. GELU is the exact one, by erf.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..dispatch import Implementation, Kernels, Operation, register
from ..quantization import onednn
from ..quantization.linear import exact_linear, prepare_linear
from ..quantization.operands import QuantizedRows, QuantizedWeight
from .eager import eager


def int8_linear(
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
) -> Tensor:
    """Apply a linear layer to quantised rows.

    Args:
        rows: codes [..., K] and scales [...] of :func:`fastsam_kernels.quantize_rows`.
        weight: codes [N, K] and scales [N]; :func:`pack_int8_weight` prepares one that is used again.
        bias: [N], or None.
        residual: [..., N], added at the end.
        gelu: whether GELU follows the bias.
        dtype: dtype of the result.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        [..., N], contiguous. Sums are exact; all after them is in fp32 and rounded to ``dtype`` once.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown ``kernels``, or gradients.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    arguments = _prepare(rows, weight, bias, residual=residual, gelu=gelu, dtype=dtype)
    return INT8_LINEAR.run(kernels, *arguments)


def pack_int8_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """Return ``weight`` with its codes in the order in which oneDNN multiplies them, where it does so exactly."""
    return weight._replace(packed=onednn.pack(weight.codes))


_prepare = partial(prepare_linear, torch.int8)
INT8_LINEAR = register(
    Operation("int8_linear", (Implementation("torch", eager), Implementation("reference", exact_linear)), _prepare)
)
