"""Rows, one per token, to 8-bit codes with a scale each, with the layer norm that comes before.

    y     = LayerNorm(x), or x
    scale = max_c |y_c| / L         L = 127 for int8, 448 for fp8 (e4m3)
    code  = round(y / scale)        to the nearest code, ties to even

No value is cut off, and rows do not depend on each other: what is computed of a token is the same in any batch.
"""

from __future__ import annotations

from torch import Tensor

from ..cross_attention import LayerNormWeights
from ..dispatch import Implementation, Kernels, Operation, register, requires_autograd
from ..quantization.operands import QuantizedRows, scheme_dtype
from .eager import eager
from .reference import reference


def quantize_rows(
    x: Tensor, scheme: str = "int8", *, norm: LayerNormWeights | None = None, kernels: Kernels = "auto"
) -> QuantizedRows:
    """Quantise the last axis of ``x``, each row by its own largest magnitude.

    Args:
        x: [..., C] of floating point.
        scheme: "int8" or "fp8".
        norm: a layer norm over C that comes first, in fp32 at least.
        kernels: "reference", "torch", "triton" or "auto".

    Returns:
        codes [..., C], contiguous, in int8 or float8_e4m3fn, and scales [...] in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown scheme or ``kernels``, or gradients.
        UnsupportedKernelError: "triton" where it cannot run; the message says why.
    """
    return QUANTIZE_ROWS.run(kernels, *_prepare(x, scheme, norm=norm))


def _prepare(
    x: Tensor, scheme: str = "int8", *, norm: LayerNormWeights | None = None
) -> tuple[Tensor, str, LayerNormWeights | None]:
    scheme_dtype(scheme)
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x must be [..., C] of floating point, got {list(x.shape)} of {x.dtype}")
    if norm is not None and not norm.weight.shape == norm.bias.shape == x.shape[-1:]:
        shapes = f"{list(norm.weight.shape)} and {list(norm.bias.shape)}"
        raise ValueError(f"norm must have a weight and a bias of [{x.shape[-1]}], got {shapes}")
    if requires_autograd(x, *(() if norm is None else norm[:2])):
        raise ValueError("quantising rows has no backward: call it under torch.no_grad()")
    return x, scheme, norm


QUANTIZE_ROWS = register(
    Operation("quantize_rows", (Implementation("torch", eager), Implementation("reference", reference)), _prepare)
)
