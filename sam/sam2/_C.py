"""The operation that the official package compiles for CUDA, on any device: ``sam2._C``."""  # noqa: N999 - the official name

from __future__ import annotations

from torch import Tensor

from .utils.misc import get_connected_components


def get_connected_componnets(inputs: Tensor) -> list[Tensor]:  # the official spelling
    """Return labels and areas of the 8-connected regions of masks [N, 1, H, W] uint8."""
    return [*get_connected_components(inputs)]
