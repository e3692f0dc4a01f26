"""Checks of the values of prompts, each with an error that names the value and the limit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .labels import CORNER_LABELS, POINT_LABELS

if TYPE_CHECKING:
    from torch import Tensor

Corners = TypeVar("Corners", bound="np.ndarray | Sequence[float]")

MAX_COORDINATE = 1e30  # pixels; what fp32 makes of them on the way to a token is finite


def as_array(values: Any) -> np.ndarray:
    """Return ``values`` on the host, without a copy where there can be."""
    # Where nobody has imported torch, or another thread is just doing so, nothing is a tensor.
    torch: Any = sys.modules.get("torch")
    tensors: Any = getattr(torch, "Tensor", ())
    if not isinstance(values, tensors):
        return np.asarray(values)
    values = values.detach().cpu()
    array: np.ndarray = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bf16
    return array


def check_finite(name: str, values: np.ndarray | Tensor) -> None:
    """Raise ``ValueError`` naming the first value of ``values`` that is NaN or infinite."""
    array = as_array(values)
    _check(name, "be finite", array, np.isfinite(array))


def check_coordinates(name: str, values: np.ndarray | Tensor) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is no finite number within ``MAX_COORDINATE`` of 0."""
    check_finite(name, values)
    array = np.asarray(as_array(values), np.float64)  # fp16 cannot be compared with the limit
    _check(name, f"lie within {MAX_COORDINATE:g} px of 0", array, np.abs(array) <= MAX_COORDINATE)


def _check(name: str, rule: str, array: np.ndarray, good: np.ndarray) -> None:
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(f"{name} must {rule}, got {array[where]} at index {list(where)}")


def check_labels(labels: np.ndarray | Tensor, corners: bool = False) -> None:
    """Raise ``ValueError`` naming the first label outside {-1, 0, 1}, or with ``corners`` outside {-1, 0, 1, 2, 3}."""
    array = as_array(labels)
    allowed = (*POINT_LABELS, *CORNER_LABELS) if corners else POINT_LABELS
    bad = np.logical_and.reduce([array != label for label in allowed])
    if bad.any():
        also = ", or 2 and 3 (corners of a box)" if corners else ""
        raise ValueError(f"labels must be 1 (object), 0 (background) or -1 (padding){also}, got {array[bad].flat[0]}")


def check_corners(box: Corners) -> Corners:
    """Return a box whose corners are in order.

    Raises:
        ValueError: they are not.
    """
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise ValueError(f"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {[float(side) for side in box]}")
    return box


def check_mask_inputs(shape: Sequence[int], low_res_size: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless masks of ``shape`` [..., h, w] are what the model takes."""
    height, width = low_res_size
    if tuple(shape[-2:]) != (height, width):
        raise ValueError(
            f"mask_input must be low-resolution logits of {height}x{width} px for this model, "
            f"got {'x'.join(map(str, shape[-2:]))}"
        )
