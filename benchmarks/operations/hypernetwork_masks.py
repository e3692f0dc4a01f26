"""Upscaling and hypernetwork mask product at the sizes of SAM: 64 x 64 tokens of 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastsam_kernels import UpscalingWeights, hypernetwork_masks, pack_upscaling
from fastsam_kernels.hypernetwork_masks.reference import reference
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import AnyShape, TileConfig

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


def _truth(keys: Tensor, weights: UpscalingWeights, hyper: Tensor, grid: tuple[int, int]) -> Tensor:
    wide = UpscalingWeights(*(w.double() for w in weights))
    return reference(keys.double(), wide, hyper.double(), grid, EPS, torch.float64)


def work(prompts: int, masks: int, element_size: int) -> Work:
    """Count the least work on a 64 x 64 grid: keys read and fp32 logits written once, all products, both GELUs."""
    tokens = 4096 * prompts
    return Work(
        bytes=tokens * 256 * element_size + prompts * masks * 65536 * 4,
        flops=tokens * (2 * 256 * 256 + 2 * 256 * 128 + 2 * 16 * 32 * masks),
        scalar_ops=tokens * GELU_INSTRUCTIONS * (256 + 512),
    )


def _case(prompts: int, masks: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        weights, grid = _weights(device, dtype), (64, 64)
        keys, hyper = draw((prompts, 4096, 256), device, dtype, 10), draw((prompts, masks, 32), device, dtype, 11)
        rows = few_rows(prompts)

        def form(kernels: str) -> Form:
            return lambda: hypernetwork_masks(keys, weights, hyper, grid=grid, out_dtype=torch.float32, kernels=kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: _truth(keys[rows], weights, hyper[rows], grid),
            rows=rows,
            work=work(prompts, masks, keys.element_size()),
        )

    return make


CASES = [
    *(Case(f"hypernetwork_masks, {prompts} prompts x 3 masks", _case(prompts, 3)) for prompts in (1, 64)),
    Case("hypernetwork_masks, 1024 prompts x 3 masks", _case(1024, 3), devices=("cuda",)),
]


def _launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

    weights = meta_weights(dtype)
    for masks in (3, 1):
        keys, hyper = meta(64, 4096, 256, dtype=dtype), meta(64, masks, 32, dtype=dtype)
        out = meta(64, masks, 256, 256, dtype=torch.float32)
        yield f"{masks} masks, 64x64", plan(keys, weights, hyper, out, (64, 64), EPS, tile)


LAUNCHES = {AnyShape.ANY: _launches}


def _tuning(device: torch.device, dtype: torch.dtype) -> TuneProblem:
    from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

    prompts, side = (64, 64) if device.type != "cpu" else (1, 4)  # the interpreter only shows that it works
    weights, grid = _weights(device, dtype), (side, side)
    keys, hyper = draw((prompts, side * side, 256), device, dtype, 10), draw((prompts, 3, 32), device, dtype, 11)
    out = torch.empty(prompts, 3, 4 * side, 4 * side, device=device)
    rows = few_rows(prompts)
    exact = dtype == torch.float32
    return TuneProblem(
        launch=lambda tile: plan(keys, weights, hyper, out, grid, EPS, tile),
        out=out,
        truth=lambda: _truth(keys[rows], weights, hyper[rows], grid),
        plain=lambda: reference(keys[rows], weights, hyper[rows], grid, EPS, dtype),
        rows=rows,
        candidates=candidates(
            (4, 8), (1, 2, 3), BLOCK_N=(16, 32) if exact else (32, 64, 128), BLOCK_C=(32, 64) if exact else (256, 128)
        ),
    )


TUNING = {AnyShape.ANY: _tuning}
