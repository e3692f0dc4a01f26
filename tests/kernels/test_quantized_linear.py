"""``int8_linear`` and ``fp8_linear``: sums against integer arithmetic, the whole against the formula in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels.foundation import DTYPES
from torch import Tensor

from fastsam_kernels import (
    QuantizedRows,
    QuantizedWeight,
    fp8_linear,
    int8_form,
    int8_linear,
    limitation,
    pack_int8_weight,
    quantize_rows,
    quantize_weight,
    why_not_quantized,
)
from fastsam_kernels.int8_linear import eager as eager_module
from fastsam_kernels.numerics import relative_error
from fastsam_kernels.quantization import onednn

CPU = torch.device("cpu")
LINEARS = {"int8": int8_linear, "fp8": fp8_linear}
INT8_FORMS = ["reference", "torch", "exact sums"]
SHAPES = [(1, 8, 16), (5, 64, 48), (33, 100, 30), (600, 768, 96), (17, 3072, 24)]  # rows, K, N


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a form; "exact sums" is that of "torch" where oneDNN does not sum exactly."""
    if request.param == "exact sums":
        monkeypatch.setattr(onednn, "sums_exactly", lambda: False)
        return "torch"
    return request.param


def codes(*shape: int, extreme: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if extreme:
        return 127 * (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(torch.int8)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def integer_sums(x: Tensor, w: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)


@pytest.mark.parametrize("extreme", [False, True], ids=["codes of any size", "largest codes"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernels", INT8_FORMS, indirect=True)
def test_sums_are_exact(kernels: str, shape: tuple[int, int, int], extreme: bool) -> None:
    rows, inputs, outputs = shape
    x, w = codes(rows, inputs, extreme=extreme), codes(outputs, inputs, extreme=extreme)
    x[0], w[0] = 127, 127  # the largest sum of all
    weight = pack_int8_weight(QuantizedWeight(w, torch.ones(outputs)))
    out = int8_linear(QuantizedRows(x, torch.ones(rows)), weight, None, kernels=kernels)
    # Of sums beyond 2^24 fp32 holds the nearest.
    assert torch.equal(out, integer_sums(x, w).to(torch.float32))


# What oneDNN may use is read when it is first called: a process each. Without VNNI, in the first two, its sums of bytes
# are wrong on a CPU that has AVX2 or AVX-512.
@pytest.mark.parametrize(
    "instructions",
    ["AVX512_CORE", *(pytest.param(name, marks=pytest.mark.slow) for name in ("AVX2", "AVX512_CORE_VNNI"))],
)
def test_sums_are_exact_whatever_onednn_may_use(instructions: str) -> None:
    program = (
        "import torch; from fastsam_kernels import *; w = torch.full((32, 768), 127, dtype=torch.int8); w[::2] = -127;"
        "x = torch.full((48, 768), 127, dtype=torch.int8); rows = QuantizedRows(x, torch.ones(48));"
        "out = int8_linear(rows, pack_int8_weight(QuantizedWeight(w, torch.ones(32))), None);"
        "assert torch.equal(out.long(), x.long() @ w.long().t()), out; print(int8_form(torch.device('cpu')))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("oneDNN", "exact sums in fp32"))


def test_what_multiplies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "sums_exactly", lambda: True)
    assert int8_form(CPU) == "oneDNN"
    monkeypatch.setattr(onednn, "sums_exactly", lambda: False)
    assert int8_form(CPU) == "exact sums in fp32 (oneDNN cuts off sums of bytes here)"
    assert pack_int8_weight(QuantizedWeight(codes(8, 8), torch.ones(8))).packed is None


def problem(scheme: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    x, w, bias, residual = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    return quantize_rows(x, scheme, kernels="reference"), quantize_weight(0.05 * w, scheme), bias, residual


def formula(rows: QuantizedRows, weight: QuantizedWeight, bias: Any, residual: Any, gelu: bool) -> Tensor:
    out = (rows.codes.double() * rows.scales.double()[..., None]) @ (
        weight.codes.double() * weight.scales.double()[:, None]
    ).t()
    out = out if bias is None else out + bias.double()
    out = F.gelu(out) if gelu else out
    return out if residual is None else out + residual.double()


@pytest.mark.parametrize("options", ["plain", "bias", "bias, gelu", "bias, residual", "bias, gelu, residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", INT8_FORMS, indirect=True)
def test_the_epilogue_of_int8(kernels: str, dtype: torch.dtype, options: str) -> None:
    """Everything after the sums is in fp32, and one rounding to the dtype."""
    rows, weight, bias, residual = problem("int8", 530, 96, 40, dtype)
    given = bias if "bias" in options else None, residual if "residual" in options else None, "gelu" in options
    out = int8_linear(rows, weight, given[0], residual=given[1], gelu=given[2], dtype=dtype, kernels=kernels)
    assert out.dtype == dtype
    assert relative_error(out, formula(rows, weight, *given)) <= max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8(dtype: torch.dtype) -> None:
    rows, weight, bias, residual = problem("fp8", 37, 96, 40, dtype)
    out = fp8_linear(rows, weight, bias, residual=residual, gelu=True, dtype=dtype, kernels="reference")
    assert relative_error(out, formula(rows, weight, bias, residual, True)) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("kernels", INT8_FORMS, indirect=True)
def test_rows_of_any_shape_and_order(kernels: str) -> None:
    """A batch computes what its rows do, bit by bit, wherever they stand."""
    rows, weight, bias, residual = problem("int8", 1200, 64, 40, torch.float32)
    weight = pack_int8_weight(weight)
    whole = int8_linear(rows, weight, bias, residual=residual, gelu=True, kernels=kernels)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(3))
    permuted = QuantizedRows(rows.codes[order], rows.scales[order])
    assert torch.equal(
        int8_linear(permuted, weight, bias, residual=residual[order], gelu=True, kernels=kernels), whole[order]
    )
    grid = QuantizedRows(rows.codes.view(2, 20, 30, 64), rows.scales.view(2, 20, 30))
    out = int8_linear(grid, weight, bias, residual=residual.view(2, 20, 30, 40), gelu=True, kernels=kernels)
    assert out.shape == (2, 20, 30, 40)
    assert torch.equal(out.view(1200, 40), whole)


def test_rows_that_are_not_finite_stay_so() -> None:
    x = torch.randn(3, 32)
    x[1, 5] = torch.nan
    out = int8_linear(quantize_rows(x), quantize_weight(torch.randn(8, 32), "int8"), None)
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, 2]]).all()


def test_rows_for_a_gpu_are_padded_to_what_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def products(x: Tensor, w: Tensor) -> Tensor:
        seen.append(len(x))
        return (x.int() @ w.int()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", products)
    for rows in (3, 40):
        x, w = codes(rows, 16), codes(8, 16)
        assert torch.equal(eager_module._int_mm(x, w).long(), integer_sums(x, w))
    assert seen == [17, 40]


def test_bad_arguments() -> None:
    rows, weight, bias, residual = problem("int8", 6, 16, 8, torch.float32)
    for arguments, message in (
        ((rows._replace(codes=rows.codes.float()), weight, None), "rows must have codes of torch.int8 and scales of"),
        ((rows._replace(scales=rows.scales[:2]), weight, None), r"rows of \[6, 16\] need a scale each, got \[2\]"),
        ((rows, weight._replace(codes=weight.codes[:, :4]), None), r"must be \[..., K\] and the weight \[N, K\], got"),
        ((rows, weight, bias[:3]), r"bias must be \[8\], got \[3\]"),
        ((rows, weight, bias.clone().requires_grad_()), "a linear layer in 8 bits has no backward"),
    ):
        with pytest.raises(ValueError, match=message):
            int8_linear(*arguments)
    with pytest.raises(ValueError, match=r"residual must be \[6, 8\], got \[8, 6\]"):
        int8_linear(rows, weight, bias, residual=residual.t())
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        int8_linear(rows, weight, bias, dtype=torch.int32)
    with pytest.raises(ValueError, match="rows must have codes of"):
        fp8_linear(rows, weight, bias)


def test_what_a_device_cannot_do_is_named() -> None:
    assert why_not_quantized("int8", CPU) is None
    assert why_not_quantized("fp8", CPU, "reference") is None
    assert why_not_quantized("fp8", CPU) == (
        "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, got cpu; kernels='reference' computes what it "
        "gives, slowly, and 'int8' runs here"
    )
    with pytest.raises(ValueError, match="scheme must be one of int8, fp8, got 'int4'"):
        why_not_quantized("int4", CPU)
    rows, weight, *_ = problem("int8", 6, 16, 8, torch.float32)
    assert limitation("int8_linear", "torch", rows, weight, None) is None
