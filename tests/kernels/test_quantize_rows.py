"""``quantize_rows``: every form against levels in fp64, whose nearest code it must be."""

from __future__ import annotations

import pytest
import torch
from kernels.foundation import DTYPES, guarded
from torch import Tensor

from fastsam_kernels import LayerNormWeights, QuantizedRows, quantize_rows, quantize_weight
from fastsam_kernels.quantization.operands import LARGEST, SCHEMES

FORMS = ["reference", "torch"]
# Half of the distance between neighbouring codes, relative to the code where they grow with it.
HALF_STEP = {"int8": (0.5, 0.0), "fp8": (2.0**-10, 2.0**-4)}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with a few far out, as activations have them."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    x = torch.randn(shape, generator=generator)
    return (x * torch.where(torch.rand(shape, generator=generator) < 0.01, 30.0, 1.0)).to(dtype)


def norm_of(channels: int) -> LayerNormWeights:
    return LayerNormWeights(1 + 0.3 * draw(channels), 0.2 * draw(channels + 1)[1:], 1e-6)


def assert_nearest(rows: QuantizedRows, values: Tensor, scheme: str) -> None:
    """Every scale is that of its row, and every code the nearest to its value, up to rounding in fp32."""
    codes, scales = rows
    largest = values.double().abs().amax(-1)
    expected = torch.where(largest == 0, 1.0, largest / LARGEST[SCHEMES[scheme]])
    assert codes.dtype == SCHEMES[scheme]
    assert codes.is_contiguous()
    assert scales.dtype == torch.float32
    assert torch.allclose(scales.double(), expected, rtol=2e-6, atol=0)
    levels = values.double() / scales.double()[..., None]
    absolute, relative = HALF_STEP[scheme]
    limit = torch.maximum(torch.tensor(absolute), relative * levels.abs()) + 1e-5 * levels.abs().clamp(min=1)
    assert ((codes.double() - levels).abs() <= limit).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 96), (2, 7, 4, 80), (530, 33)], ids=str)
@pytest.mark.parametrize("kernels", FORMS)
def test_codes_are_the_nearest(kernels: str, shape: tuple[int, ...], dtype: torch.dtype, scheme: str) -> None:
    x = guarded(draw(*shape, dtype=dtype))
    assert_nearest(quantize_rows(x, scheme, kernels=kernels), x, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", FORMS)
def test_the_norm_comes_first(kernels: str, dtype: torch.dtype, scheme: str) -> None:
    x = draw(40, 96, dtype=dtype)
    norm = LayerNormWeights(*(weight.to(dtype) for weight in norm_of(96)[:2]), 1e-6)
    y = torch.nn.functional.layer_norm(x.double(), (96,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert_nearest(quantize_rows(x, scheme, norm=norm, kernels=kernels), y, scheme)


@pytest.mark.parametrize("kernels", FORMS)
def test_rows_do_not_depend_on_each_other(kernels: str) -> None:
    x, norm, order = draw(1100, 64), norm_of(64), torch.randperm(1100, generator=torch.Generator().manual_seed(1))
    whole = quantize_rows(x, norm=norm, kernels=kernels)
    permuted = quantize_rows(x[order], norm=norm, kernels=kernels)
    assert torch.equal(permuted.codes, whole.codes[order])
    assert torch.equal(permuted.scales, whole.scales[order])
    alone = quantize_rows(x[700], norm=norm, kernels=kernels)
    assert torch.equal(alone.codes, whole.codes[700])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernels", FORMS)
def test_rows_of_zeros_and_of_nan(kernels: str, scheme: str) -> None:
    x = draw(4, 16)
    x[1], x[2, 3], x[3] = 0, torch.nan, 1e-45
    codes, scales = quantize_rows(x, scheme, kernels=kernels)
    assert (codes[1].double() == 0).all()
    assert (codes[3].double() == 0).all()
    assert scales[1] == scales[3] == 1
    assert torch.isnan(scales[2]), "a row with NaN computes to NaN"


def test_a_weight_has_a_scale_per_output_channel() -> None:
    weight = draw(24, 40)
    codes, scales, packed = quantize_weight(weight, "int8")
    assert_nearest(QuantizedRows(codes, scales), weight, "int8")
    assert packed is None
    weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="weight has values that are not finite"):
        quantize_weight(weight, "int8")
    with pytest.raises(ValueError, match=r"weight must be \[N, K\] of floating point, got \[40\] of torch.float32"):
        quantize_weight(weight[0], "int8")


def test_bad_arguments() -> None:
    x = draw(3, 8)
    with pytest.raises(ValueError, match="scheme must be one of int8, fp8, got 'int4'"):
        quantize_rows(x, "int4")
    with pytest.raises(ValueError, match=r"x must be \[..., C\] of floating point, got \[3, 8\] of torch.int8"):
        quantize_rows(x.to(torch.int8))
    with pytest.raises(ValueError, match=r"norm must have a weight and a bias of \[8\], got \[9\] and \[9\]"):
        quantize_rows(x, norm=norm_of(9))
    with pytest.raises(ValueError, match="quantising rows has no backward"):
        quantize_rows(x.requires_grad_())
