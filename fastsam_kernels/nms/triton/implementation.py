"""Limitations of the Triton kernels of ``nms`` and the way to call them; imports no triton."""

from __future__ import annotations

from torch import Tensor

from ...dispatch import triton_implementation

MAX_BOXES = 16384  # the one program of the sweep holds a bit for each


def _run(boxes: Tensor, threshold: float) -> Tensor:
    from .custom_op import nms_triton

    return nms_triton(boxes, threshold)


def _limitation(boxes: Tensor, threshold: float) -> str | None:
    if len(boxes) > MAX_BOXES:
        return f"it takes up to {MAX_BOXES} boxes, got {len(boxes)}"
    return None


TRITON = triton_implementation(_run, _limitation, multiplies=False)
