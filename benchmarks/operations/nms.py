"""Box suppression at the counts of automatic masks: a grid of 32 x 32 clicks gives up to 3072 boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastsam_kernels import nms
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import AnyShape, ShapeClass, TileConfig

from ..case import Case, Problem, TuneProblem, meta
from ..measure import Form, Work

THRESHOLD = 0.7


def _boxes(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw objects that are found about ten times each, and scores."""
    generator = torch.Generator().manual_seed(0)
    corner, size = (
        torch.rand(count // 10 + 1, 2, generator=generator),
        torch.rand(count // 10 + 1, 2, generator=generator),
    )
    objects = 1024 * torch.cat([corner, corner + 0.05 + 0.2 * size], dim=1)
    boxes = objects.repeat(10, 1)[:count] + 6 * torch.randn(count, 4, generator=generator)
    return boxes.round().to(device), torch.rand(count, generator=generator).to(device)


def _case(count: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        boxes, scores = _boxes(count, device)

        def keep_flags(kernels: str) -> Tensor:
            """Return 1 for each box that stays, [N]."""
            return torch.zeros(count, device=device).index_fill(0, nms(boxes, scores, THRESHOLD, kernels=kernels), 1.0)

        def form(kernels: str) -> Form:
            return lambda: keep_flags(kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: keep_flags("reference").double(),
            rows=list(range(count)),
            work=Work(bytes=20 * count, flops=0, scalar_ops=16 * count * count / 2),
            compile=False,
        )

    return make


CASES = [Case(f"nms, {count} boxes", _case(count), dtypes=(torch.float32,)) for count in (300, 3072)]


def _launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.nms.triton.kernel import plan, words_of

    for count in (300, 3072, 16384):
        boxes, bits = meta(count, 4, dtype=dtype), meta(count, words_of(count), dtype=torch.int32)
        keep = meta(count, dtype=torch.bool)
        for name, launch in zip(("overlaps", "sweep"), plan(boxes, THRESHOLD, bits, keep, tile), strict=True):
            yield f"{name}, {count} boxes", launch


LAUNCHES = {AnyShape.ANY: _launches}


# Two launches that only mean something together: there is nothing that ``tune`` could time by itself.
TUNING: dict[ShapeClass, Callable[[torch.device, torch.dtype], TuneProblem]] = {}
