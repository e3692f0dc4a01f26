"""Products of 8-bit integers by oneDNN on a CPU, which are asked whether they are exact before anyone relies on them.

Without VNNI in effect oneDNN multiplies bytes by instructions that add two products in 16 bits, and what does not fit
is cut off: sums are wrong, and nothing says so. The flags of the CPU do not tell, as ``ONEDNN_MAX_CPU_ISA`` keeps
oneDNN from what the CPU has. So a product of the largest codes is computed once per process and compared.

oneDNN is fast for unsigned rows only: codes go in plus 128, and it takes 128 times the sums of the weight off again.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_ROWS = 512  # that a weight is put in order for


def pack(codes: Tensor) -> Tensor | None:
    """Return a weight [N, K] in int8 as :func:`multiply` takes it; None where oneDNN does not multiply it exactly."""
    if codes.device.type != "cpu" or codes.is_meta or not sums_exactly():
        return None
    return _packed(codes)


def multiply(codes: Tensor, packed: Tensor, weight_scales: Tensor) -> Tensor:
    """Return the products [M, N] in fp32 of codes [M, K] and a packed weight, times the weight's scales [N]."""
    unsigned = codes.contiguous().view(torch.uint8).bitwise_xor(128)
    zeros = _zeros(len(weight_scales))
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, weight_scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def sums_exactly() -> bool:
    """Return whether oneDNN sums products of bytes exactly in this process."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return False
    with torch.no_grad(), torch.inference_mode(False):
        try:
            return all(_is_exact(rows, inputs) for rows in (1, 48) for inputs in (64, 768))
        except RuntimeError:  # built without these products
            return False


def int8_form(device: torch.device) -> str:
    """Return in words how products of int8 are computed by ``kernels="torch"`` on a device."""
    if device.type == "cuda":
        return "torch._int_mm"
    if device.type == "cpu" and sums_exactly():
        return "oneDNN"
    why = "oneDNN cuts off sums of bytes here" if device.type == "cpu" else f"nothing multiplies bytes on {device.type}"
    return f"exact sums in fp32 ({why})"


def _is_exact(rows: int, inputs: int) -> bool:
    """Compare a product of codes of the largest magnitude, in every mix of signs, with its sums in fp64."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (rows + 32, inputs), generator=generator, dtype=torch.int8) * 2 - 1
    signs[0], signs[rows] = 1, 1  # the largest sum of all
    codes, weight = (127 * signs).split((rows, 32))
    product = multiply(codes, _packed(weight), torch.ones(32))
    return torch.equal(product.double(), codes.double() @ weight.double().t())


def _packed(codes: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(codes, [_ROWS, codes.shape[1]])


@cache
def _zeros(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int64)
