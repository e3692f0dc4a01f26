"""Upscaling and hypernetwork mask product at the sizes of SAM: 64 x 64 tokens of 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastsam_kernels import UpscalingWeights, hypernetwork_masks, pack_upscaling
from fastsam_kernels.hypernetwork_masks.reference import reference
from fastsam_kernels.hypernetwork_masks.triton.shapes import UpscalingShape
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig

from ..case import Case, Problem, TuneProblem, candidates, draw, few_rows, meta
from ..measure import Form, Work

EPS = 1e-6
GELU_INSTRUCTIONS = 14  # of the polynomial that 16-bit kernels use


def _weights(device: torch.device, dtype: torch.dtype) -> UpscalingWeights:
    shapes = ((256, 64, 2, 2), (64,), (64,), (64,), (64, 32, 2, 2), (32,))
    scales = (0.06, 1.0, 0.2, 0.3, 0.12, 0.3)
    tensors = [draw(shape, device, dtype, seed, scales[seed]) for seed, shape in enumerate(shapes)]
    tensors[2] += 1  # the norm's weight
    return pack_upscaling(*tensors)


def meta_weights(dtype: torch.dtype) -> UpscalingWeights:
    """Return the weights of SAM without memory."""
    shapes = ((256, 256), (256,), (64,), (64,), (64, 128), (128,))
    return UpscalingWeights(*(meta(*shape, dtype=dtype) for shape in shapes))


def finer_features(images: int, device: torch.device, dtype: torch.dtype, side: int = 64) -> tuple[Tensor, Tensor]:
    """Draw s0 and s1 of SAM 2, channels last."""
    s0 = draw((images, 4 * side, 4 * side, 32), device, dtype, 12)
    s1 = draw((images, 2 * side, 2 * side, 64), device, dtype, 13)
    return s0.permute(0, 3, 1, 2), s1.permute(0, 3, 1, 2)


def _truth(
    keys: Tensor,
    weights: UpscalingWeights,
    hyper: Tensor,
    grid: tuple[int, int],
    finer: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    wide = UpscalingWeights(*(w.double() for w in weights))
    features = None if finer is None else (finer[0].double(), finer[1].double())
    return reference(keys.double(), wide, hyper.double(), grid, EPS, torch.float64, features)


def work(prompts: int, masks: int, element_size: int, *, finer: bool = False) -> Work:
    """Count the least work on a 64 x 64 grid: keys read and fp32 logits written once, all products, both GELUs.

    Features of finer grids are one image's, read once.
    """
    tokens = 4096 * prompts
    features = 4096 * (16 * 32 + 4 * 64) * element_size if finer else 0
    return Work(
        bytes=tokens * 256 * element_size + features + prompts * masks * 65536 * 4,
        flops=tokens * (2 * 256 * 256 + 2 * 256 * 128 + 2 * 16 * 32 * masks),
        scalar_ops=tokens * GELU_INSTRUCTIONS * (256 + 512),
    )


def _case(prompts: int, masks: int, *, finer: bool = False) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        weights, grid = _weights(device, dtype), (64, 64)
        keys, hyper = draw((prompts, 4096, 256), device, dtype, 10), draw((prompts, masks, 32), device, dtype, 11)
        features = finer_features(1, device, dtype) if finer else None
        rows = few_rows(prompts)

        def form(kernels: str) -> Form:
            return lambda: hypernetwork_masks(
                keys, weights, hyper, grid=grid, out_dtype=torch.float32, high_res=features, kernels=kernels
            )

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: _truth(keys[rows], weights, hyper[rows], grid, features),
            rows=rows,
            work=work(prompts, masks, keys.element_size(), finer=finer),
        )

    return make


CASES = [
    *(Case(f"hypernetwork_masks, {prompts} prompts x 3 masks", _case(prompts, 3)) for prompts in (1, 64)),
    Case("hypernetwork_masks, 1024 prompts x 3 masks", _case(1024, 3), devices=("cuda",)),
    Case("hypernetwork_masks, 64 prompts x 1 mask, finer features", _case(64, 1, finer=True)),
    Case("hypernetwork_masks, 1024 prompts x 1 mask, finer features", _case(1024, 1, finer=True), devices=("cuda",)),
]


def _launches(shape: UpscalingShape) -> Callable[[torch.dtype, TileConfig], Iterator[tuple[str, Launch]]]:
    def launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
        for masks in (3, 1):
            launch = meta_launch(64, masks, dtype, tile, finer=shape is UpscalingShape.FINER)
            yield f"{masks} masks, 64x64" + (", finer features" if shape is UpscalingShape.FINER else ""), launch

    return launches


def meta_launch(prompts: int, masks: int, dtype: torch.dtype, tile: TileConfig, *, finer: bool) -> Launch:
    """Return the launch on tensors without memory, with features of one image or without."""
    from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

    keys, hyper = meta(prompts, 4096, 256, dtype=dtype), meta(prompts, masks, 32, dtype=dtype)
    out = meta(prompts, masks, 256, 256, dtype=torch.float32)
    features = finer_features(1, torch.device("meta"), dtype) if finer else None
    index = meta(prompts, dtype=torch.int64) if finer else None
    return plan(keys, meta_weights(dtype), hyper, out, (64, 64), EPS, tile, features, index)


LAUNCHES = {shape: _launches(shape) for shape in UpscalingShape}


def _tuning(shape: UpscalingShape) -> Callable[[torch.device, torch.dtype], TuneProblem]:
    def tuning(device: torch.device, dtype: torch.dtype) -> TuneProblem:
        from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

        prompts, side = (64, 64) if device.type != "cpu" else (1, 4)  # the interpreter only shows that it works
        weights, grid = _weights(device, dtype), (side, side)
        keys, hyper = draw((prompts, side * side, 256), device, dtype, 10), draw((prompts, 3, 32), device, dtype, 11)
        finer = finer_features(1, device, dtype, side) if shape is UpscalingShape.FINER else None
        out = torch.empty(prompts, 3, 4 * side, 4 * side, device=device)
        rows = few_rows(prompts)
        exact = dtype == torch.float32
        return TuneProblem(
            launch=lambda tile: plan(keys, weights, hyper, out, grid, EPS, tile, finer),
            out=out,
            truth=lambda: _truth(keys[rows], weights, hyper[rows], grid, finer),
            plain=lambda: reference(keys[rows], weights, hyper[rows], grid, EPS, dtype, finer),
            rows=rows,
            candidates=candidates(
                (4, 8),
                (1, 2, 3),
                BLOCK_N=(16, 32) if exact else (32, 64, 128),
                BLOCK_C=(32, 64) if exact else (256, 128),
            ),
        )

    return tuning


TUNING = {shape: _tuning(shape) for shape in UpscalingShape}
