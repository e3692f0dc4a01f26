"""How results are compared."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in fp64; NaN or infinity anywhere fails."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    assert torch.isfinite(actual).all(), "the result is not finite"
    assert torch.isfinite(expected).all(), "the expected values are not finite"
    wide, truth = actual.double(), expected.double()
    return float((wide - truth).norm() / truth.norm())


def assert_close_l2(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = relative_l2(actual, expected)
    assert error <= tolerance, f"{what}: relative L2 error {error:.2e} is over the budget of {tolerance:.0e}"


def assert_close_max(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} against {list(expected.shape)}"
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= tolerance, f"{what}: largest error {error:.2e} is over the budget of {tolerance:.0e}"
