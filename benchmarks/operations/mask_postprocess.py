"""Statistics and bits of masks from low-resolution logits, at the sizes of SAM: 256 x 256 logits per mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import Resizing, mask_statistics, packed_masks
from fastsam_kernels.mask_postprocess import MaskStatistics
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import AnyShape, TileConfig

from ..case import Case, Problem, TuneProblem, candidates, few_rows, meta
from ..measure import Form, Work

SQUARE = Resizing(1024, (1024, 1024), (1024, 1024))
PHOTOGRAPH = Resizing(1024, (683, 1024), (1500, 2250))


def discs(masks: int, side: int, device: torch.device, dtype: torch.dtype, steepness: Tensor | float = 100.0) -> Tensor:
    """Return logits [masks, side, side] of uneven discs, of a radius from 1/40 to 1/4 of a side.

    ``steepness`` is how far the logits fall over a radius, for all masks or [masks]: those of 100 are stable, those
    of 20 are not.
    """
    generator = torch.Generator().manual_seed(0)
    centre, radius = (torch.rand(masks, *shape, generator=generator).to(device) for shape in ((2,), (1, 1)))
    uneven = torch.randn(masks, 1, side // 8, side // 8, generator=generator).to(device)
    place = (torch.arange(side, device=device) + 0.5) / side
    away = (place - centre[:, :1]).square()[:, None] + (place - centre[:, 1:]).square()[:, :, None]
    logits = torch.as_tensor(steepness, device=device).reshape(-1, 1, 1) * (1 - away.sqrt() / (0.025 + 0.225 * radius))
    logits += 0.5 * F.interpolate(uneven, (side, side), mode="bilinear")[:, 0]
    return logits.clamp(-25, 20).to(dtype)


def _numbers(statistics: MaskStatistics) -> Tensor:
    return torch.cat([torch.stack(statistics[:3], dim=1), statistics.boxes], dim=1).float()


def _case(form: Callable[[Tensor, str], Tensor], masks: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        logits, rows = discs(masks, 256, device, dtype), few_rows(masks)

        def named(kernels: str) -> Form:
            return lambda: form(logits, kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: named(name) for name in names},
            truth=lambda: form(logits[rows].double(), "reference").double(),
            rows=rows,
            work=Work(bytes=logits.nbytes, flops=0),
            compile=False,
        )

    return make


def _statistics(resizing: Resizing) -> Callable[[Tensor, str], Tensor]:
    return lambda logits, kernels: _numbers(mask_statistics(logits, resizing, kernels=kernels))


def _bytes(resizing: Resizing) -> Callable[[Tensor, str], Tensor]:
    return lambda logits, kernels: packed_masks(logits, resizing, kernels=kernels).view(torch.uint8).float()


CASES = [
    Case(f"mask_postprocess, {what} of {masks} masks, {name}", _case(form(resizing), masks), devices)
    for name, resizing in (("1024x1024", SQUARE), ("1500x2250", PHOTOGRAPH))
    for masks, devices in ((64, ("cpu", "cuda")), (3072, ("cuda",)))
    for what, form in (("statistics", _statistics), ("bits", _bytes))
    if not (what == "bits" and masks == 3072)  # statistics come first; few masks are made
]


def _launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.mask_postprocess.triton.kernel import plan

    low_res = meta(192, 256, 256, dtype=dtype)
    for name, resizing in (("1024x1024", SQUARE), ("1500x2250", PHOTOGRAPH)):
        height, width = resizing.output_size
        numbers = meta(192, 7, dtype=torch.int32)
        words = meta(192, width, -(-height // 32), dtype=torch.int32)
        yield f"statistics, {name}", plan(low_res, resizing, 0.0, 1.0, numbers, tile, statistics=True)
        yield f"bits, {name}", plan(low_res, resizing, 0.0, 0.0, words, tile, statistics=False)


LAUNCHES = {AnyShape.ANY: _launches}


def _tuning(device: torch.device, dtype: torch.dtype) -> TuneProblem:
    """Tune on the statistics: they are taken of every mask, bits are made of the few that stay."""
    from fastsam_kernels.mask_postprocess.triton.kernel import no_pixels, plan

    # The interpreter only shows that it works.
    masks, side, size = (512, 256, 1024) if device.type != "cpu" else (1, 16, 64)
    resizing = Resizing(4 * side, (4 * side, 4 * side), (size, size))
    logits, rows = discs(masks, side, device, dtype), few_rows(masks)
    out = no_pixels(masks, device)
    return TuneProblem(
        launch=lambda tile: plan(logits, resizing, 0.0, 1.0, out, tile, statistics=True),
        out=out,
        truth=lambda: _statistics(resizing)(logits[rows].double(), "reference"),
        plain=lambda: _statistics(resizing)(logits[rows], "reference"),
        rows=rows,
        candidates=candidates((1, 2, 4, 8), (1,), BLOCK_W=(16, 32, 64, 128)),
        reset=lambda: out.copy_(no_pixels(masks, device)),
    )


TUNING = {AnyShape.ANY: _tuning}
