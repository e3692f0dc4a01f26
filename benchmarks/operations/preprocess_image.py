"""Photographs to the encoder's input, beside Pillow's resize on the host as SAM does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsam_kernels import preprocess_image
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import AnyShape, TileConfig

from ..case import Case, Problem, TuneProblem, candidates, meta
from ..measure import Form, Work

SIDE = 1024
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def _photograph(height: int, width: int, device: torch.device) -> Tensor:
    """Draw noise on a slope, [H, W, 3] uint8."""
    noise = torch.randint(0, 128, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return (noise + torch.linspace(0, 127, width)[:, None]).to(device, torch.uint8)


def _case(height: int, width: int) -> Callable[[torch.device, torch.dtype], Problem]:
    scale = SIDE / max(height, width)
    size = (int(height * scale + 0.5), int(width * scale + 0.5))

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        image = _photograph(height, width, device)
        mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))

        def form(kernels: str) -> Form:
            return lambda: preprocess_image(image, size, SIDE, mean, std, dtype=dtype, kernels=kernels)

        on_host = image.cpu().numpy()

        def pillow() -> Tensor:
            resized = Image.fromarray(on_host).resize((size[1], size[0]), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(resized)).to(device).permute(2, 0, 1)
            out = torch.zeros(3, SIDE, SIDE, device=device, dtype=dtype)
            out[:, : size[0], : size[1]] = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
            return out

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={**{name: form(name) for name in names}, "pillow": pillow},
            truth=lambda: preprocess_image(
                image, size, SIDE, mean.double(), std.double(), dtype=torch.float64, kernels="reference"
            ),
            rows=[0, 1, 2],
            work=Work(bytes=image.numel() + 3 * SIDE * SIDE * dtype.itemsize, flops=0),
            compile=False,
        )

    return make


CASES = [
    Case(f"preprocess_image, {height}x{width}", _case(height, width), dtypes=(torch.float32, torch.bfloat16))
    for height, width in ((1500, 2250), (3000, 4000))
]


def _launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.preprocess_image.triton.kernel import plan

    mean, out = meta(3, dtype=torch.float32), meta(3, SIDE, SIDE, dtype=dtype)
    for height, width in ((600, 800), (3000, 4000)):
        image = meta(height, width, 3, dtype=torch.uint8)
        yield f"{height}x{width}", plan(image, (768, SIDE), mean, mean, out, tile)


LAUNCHES = {AnyShape.ANY: _launches}


def _tuning(device: torch.device, dtype: torch.dtype) -> TuneProblem:
    from fastsam_kernels.preprocess_image.triton.kernel import plan

    # The interpreter only shows that it works.
    (height, width), side = ((3000, 4000), SIDE) if device.type != "cpu" else ((48, 64), 32)
    size = (side * 3 // 4, side)
    image = _photograph(height, width, device)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    out = torch.empty(3, side, side, dtype=dtype, device=device)

    def formula(precision: torch.dtype) -> Tensor:
        return preprocess_image(
            image, size, side, mean.to(precision), std.to(precision), dtype=precision, kernels="reference"
        )

    return TuneProblem(
        launch=lambda tile: plan(image, size, mean, std, out, tile),
        out=out,
        truth=lambda: formula(torch.float64),
        plain=lambda: formula(torch.float32).to(dtype),
        rows=[0, 1, 2],
        candidates=candidates((2, 4, 8), (1,), BLOCK_H=(4, 16, 32), BLOCK_W=(32, 64, 128)),
    )


TUNING = {AnyShape.ANY: _tuning}
