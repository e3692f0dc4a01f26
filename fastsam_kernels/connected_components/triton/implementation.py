"""Limitations of the Triton kernels of ``connected_components`` and the way to call them; imports no triton."""

from __future__ import annotations

from torch import Tensor

from ...dispatch import triton_implementation


def _run(masks: Tensor) -> Tensor:
    from .custom_op import connected_components_triton

    return connected_components_triton(masks)


def _limitation(masks: Tensor) -> str | None:
    return "there are no pixels" if masks.numel() == 0 else None


TRITON = triton_implementation(_run, _limitation, multiplies=False)
