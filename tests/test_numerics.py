"""The rule of how far a result may be from the truth."""

from __future__ import annotations

import pytest
import torch

from fastsam_kernels.numerics import Budget, relative_error


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10), (torch.float32, 2.0**-23), (torch.float64, 2.0**-23)],
)
def test_twice_the_baseline_and_one_rounding_no_better_than_fp32(dtype: torch.dtype, rounding: float) -> None:
    assert Budget(0.25, dtype).limit == 0.5 + rounding
    assert Budget(0.25, dtype, scale=8.0).limit == 0.5 + 8 * rounding


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth + torch.tensor([0.0, 0.5]), truth) == 0.1
    assert relative_error(torch.tensor([3.0, torch.nan]), truth) == float("inf")
    assert relative_error(torch.tensor([3.0, torch.inf]), truth) == float("inf")
