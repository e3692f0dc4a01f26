"""Error budgets: one rule for tests, benchmarks, tuning and ``sam.verify``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The error that a result may have: twice that of plain PyTorch in the same dtype, and one rounding.

    It is the rule of flash-attention's tests; no tolerance is chosen by hand. The rounding is that of the dtype and no
    better than fp32: sums in another order are no error.

    Attributes:
        baseline: the error of plain PyTorch against the formula in fp64.
        dtype: dtype of the arithmetic.
        scale: what the rounding is relative to: 1 for relative errors, the largest value for absolute ones.
    """

    baseline: float
    dtype: torch.dtype
    scale: float = 1.0

    @property
    def limit(self) -> float:
        """Return the largest error that is allowed."""
        return 2 * self.baseline + self.scale * max(torch.finfo(self.dtype).eps, torch.finfo(torch.float32).eps)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return ||result - truth|| / ||truth|| in fp64; infinity where ``result`` is not finite."""
    exact = truth.double()
    error = float((result.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")  # NaN differs from itself
