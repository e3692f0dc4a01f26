"""Connected components of masks at the sizes of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastsam_kernels import connected_components
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import AnyShape, ShapeClass, TileConfig

from ..case import Case, Problem, TuneProblem, draw, few_rows, meta
from ..measure import Form, Work
from .mask_postprocess import discs


def _masks(count: int, side: int, device: torch.device) -> Tensor:
    """Draw discs with a speckled border: one large component and many small ones."""
    smooth = discs(count, side, device, torch.float32, 20.0)
    noise = draw((count, side, side), device, torch.float32, 1, 2.0)
    return smooth + noise > 0


def _case(count: int, side: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        masks, rows = _masks(count, side, device), few_rows(count)

        def form(kernels: str) -> Form:
            return lambda: connected_components(masks, kernels=kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: connected_components(masks[rows], kernels="reference").double(),
            rows=rows,
            work=Work(bytes=5 * masks.numel(), flops=0),
            compile=False,
        )

    return make


CASES = [
    Case("connected_components, 4 masks, 256x256", _case(4, 256), ("cpu", "cuda"), (torch.float32,)),
    Case("connected_components, 64 masks, 1024x1024", _case(64, 1024), ("cuda",), (torch.float32,)),
]


def _launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.connected_components.triton.kernel import plan

    masks = meta(64, 1024, 1024, dtype=dtype)
    parents, labels = (meta(64, 1024, 1024, dtype=torch.int32) for _ in range(2))
    for name, launch in zip(("runs", "joins", "names"), plan(masks, parents, labels, tile), strict=True):
        yield f"{name}, 1024x1024", launch


LAUNCHES = {AnyShape.ANY: _launches}


# Three launches that only mean something together: there is nothing that ``tune`` could time by itself.
TUNING: dict[ShapeClass, Callable[[torch.device, torch.dtype], TuneProblem]] = {}
