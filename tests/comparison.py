"""How results are compared.

A kernel is held against the truth in fp64, within ``fastsam_kernels.numerics.Budget``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam_kernels.numerics import Budget, relative_error


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in fp64; NaN or infinity anywhere fails."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    assert torch.isfinite(actual).all(), "the result is not finite"
    assert torch.isfinite(expected).all(), "the expected values are not finite"
    return relative_error(actual, expected)


def assert_close_l2(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = relative_l2(actual, expected)
    assert error <= tolerance, f"{what}: relative L2 error {error:.2e} is over the budget of {tolerance:.0e}"


def assert_close_max(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} against {list(expected.shape)}"
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= tolerance, f"{what}: largest error {error:.2e} is over the budget of {tolerance:.0e}"


def to_fp64(value: Any) -> Any:
    """Tensors of floating point in ``value``, a tensor or nested tuples of them, widened."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        widened = [to_fp64(item) for item in value]
        return type(value)(*widened) if hasattr(value, "_fields") else tuple(widened)
    return value


def assert_within_budget(actual: Tensor, formula: Callable[..., Tensor], inputs: Sequence[Any], what: str) -> None:
    """Hold ``actual`` against ``formula(*inputs)``, plain PyTorch, computed in fp64 and in the inputs' dtype.

    Both the relative L2 error and the largest error must be within the budget.
    """
    truth = formula(*(to_fp64(value) for value in inputs)).double()
    plain = formula(*inputs).to(actual.dtype).double()
    assert actual.shape == truth.shape, f"{what}: {list(actual.shape)} against {list(truth.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: the result is not finite"
    error, baseline = actual.double() - truth, plain - truth
    for measure, size, scale in (
        ("relative L2 error", lambda x: float(x.norm() / truth.norm()), 1.0),
        ("largest error", lambda x: float(x.abs().max()), float(truth.abs().max())),
    ):
        result, limit = size(error), Budget(size(baseline), actual.dtype, scale).limit
        assert result <= limit, (
            f"{what}: {measure} {result:.2e} is over the budget of {limit:.2e} "
            f"(plain PyTorch in the same dtype {size(baseline):.2e})"
        )


State = dict[str, Tensor]


def assert_same_weights(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
