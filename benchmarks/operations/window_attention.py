"""Attention of SAM 2's image encoders at 1024 x 1024 pixels: windows of four stages, the whole grid, pooled queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam_kernels import window_attention
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig
from fastsam_kernels.window_attention.reference import reference
from fastsam_kernels.window_attention.triton.shapes import WindowShape

from ..case import Case, Problem, TuneProblem, candidates, draw
from ..measure import Form, Work


class Size(NamedTuple):
    """Attention of one block: heads and their channels, the side of the grid and of a window (0: the grid)."""

    heads: int
    head_dim: int
    grid: int
    window_size: int
    pool_queries: bool = False

    @property
    def shape_class(self) -> WindowShape:
        return WindowShape.of(self.head_dim, self.window_size, self.pool_queries)


def _sizes(heads: int, head_dim: int, windows: tuple[int, ...]) -> dict[str, Size]:
    """Return the kinds of blocks: those of a stage, the first of a stage, and the global ones."""
    sizes = {}
    for stage, window in enumerate(windows):
        if stage:
            before = windows[stage - 1]
            sizes[f"into stage {stage + 1}"] = Size(heads << stage, head_dim, 512 >> stage, before, True)
        sizes[f"stage {stage + 1}"] = Size(heads << stage, head_dim, 256 >> stage, window)
    return {**sizes, "global": Size(heads << 2, head_dim, 64, 0)}


SIZES = {
    "tiny": _sizes(1, 96, (8, 4, 14, 7)),  # and small
    "base_plus": _sizes(2, 56, (8, 4, 14, 7)),
    "large": _sizes(2, 72, (8, 4, 16, 8)),
}


class Inputs(NamedTuple):
    qkv: Tensor
    qkv_bias: Tensor
    num_heads: int
    window_size: int
    pool_queries: bool


def _inputs(size: Size, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    channels = 3 * size.heads * size.head_dim
    qkv, bias = draw((batch, size.grid, size.grid, channels), device, dtype, 1), draw((channels,), device, dtype, 2)
    return Inputs(qkv, bias, size.heads, size.window_size, size.pool_queries)


def _truth(inputs: Inputs, rows: list[int]) -> Tensor:
    """Compute the formula in fp64, one image at a time, of these rows."""
    images = (inputs.qkv[row : row + 1].double() for row in rows)
    return torch.cat([reference(image, inputs.qkv_bias.double(), *inputs[2:]) for image in images])


def work(size: Size, batch: int, element_size: int) -> Work:
    """Count q, k and v read and the result written once, both products over all keys, and the exponentials."""
    tokens, keys = batch * size.grid**2, (size.window_size or size.grid) ** 2
    channels, queries = size.heads * size.head_dim, tokens // (4 if size.pool_queries else 1)
    return Work(
        bytes=(3 * tokens + queries) * channels * element_size,
        flops=4 * queries * channels * keys,
        scalar_ops=queries * size.heads * keys,
    )


def _case(size: Size, batch: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs = _inputs(size, batch, device, dtype)

        def form(kernels: str) -> Form:
            return lambda: window_attention(
                inputs.qkv,
                num_heads=size.heads,
                window_size=size.window_size,
                qkv_bias=inputs.qkv_bias,
                pool_queries=size.pool_queries,
                kernels=kernels,
            )

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        rows = sorted({0, batch - 1})
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: _truth(inputs, rows),
            rows=rows,
            work=work(size, batch, inputs.qkv.element_size()),
            compile=False,
        )

    return make


CASES = [
    Case(
        f"window_attention, {variant} {kind}, batch {batch}",
        _case(size, batch),
        devices=("cpu", "cuda") if (variant, batch) == ("tiny", 1) else ("cuda",),
        late=variant != "tiny",
    )
    for variant, sizes in SIZES.items()
    for kind, size in sizes.items()
    for batch in (1, 8)
]
# The others differ from these in the number of heads and of windows alone.
_COMPILED = {"tiny": tuple(SIZES["tiny"]), "base_plus": ("stage 3", "global"), "large": ("stage 1", "stage 3")}


def _launches(shape: WindowShape) -> Callable[[torch.dtype, TileConfig], Iterator[tuple[str, Launch]]]:
    def launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
        for variant, kinds in _COMPILED.items():
            for kind in kinds:
                if SIZES[variant][kind].shape_class is shape:
                    yield f"{variant} {kind}", meta_launch(SIZES[variant][kind], 8, dtype, tile)

    return launches


def meta_launch(size: Size, batch: int, dtype: torch.dtype, tile: TileConfig) -> Launch:
    """Return the launch on tensors without memory."""
    from fastsam_kernels.window_attention.triton.kernel import plan

    inputs = _inputs(size, batch, torch.device("meta"), dtype)
    return plan(*inputs[:2], _result(inputs), *inputs[2:], tile)


def _result(inputs: Inputs) -> Tensor:
    batch, height, width, channels = inputs.qkv.shape
    step = 2 if inputs.pool_queries else 1
    return inputs.qkv.new_empty((batch, height // step, width // step, channels // 3))


LAUNCHES = {shape: _launches(shape) for shape in WindowShape}


def _tuning(size: Size) -> Callable[[torch.device, torch.dtype], TuneProblem]:
    def tuning(device: torch.device, dtype: torch.dtype) -> TuneProblem:
        from fastsam_kernels.window_attention.triton.kernel import plan

        shown, batch = size, 8
        if device.type == "cpu":  # the interpreter only shows that it works
            shown, batch = size._replace(heads=1, grid=8, window_size=min(size.window_size, 6)), 1
        inputs, rows = _inputs(shown, batch, device, dtype), sorted({0, batch - 1})
        out, exact = _result(inputs), dtype == torch.float32
        return TuneProblem(
            launch=lambda tile: plan(*inputs[:2], out, *inputs[2:], tile),
            out=out,
            truth=lambda: _truth(inputs, rows),
            plain=lambda: reference(inputs.qkv[rows], *inputs[1:]),
            rows=rows,
            candidates=candidates(
                (1, 2, 4) if size.shape_class is WindowShape.SMALL_POOLED else (4, 8),
                (1, 2, 3),
                BLOCK_Q=(16, 32) if exact else (16, 64) if size.shape_class is WindowShape.SMALL_POOLED else (64, 128),
                BLOCK_K=(16, 32) if exact else (32, 64, 128),
            ),
        )

    return tuning


TUNING = {
    WindowShape.SMALL: _tuning(SIZES["tiny"]["stage 1"]),
    WindowShape.SMALL_POOLED: _tuning(SIZES["tiny"]["into stage 2"]),
    WindowShape.WINDOWED_64: _tuning(SIZES["base_plus"]["stage 3"]),
    WindowShape.WINDOWED_96: _tuning(SIZES["tiny"]["stage 3"]),
    WindowShape.GLOBAL_64: _tuning(SIZES["base_plus"]["global"]),
    WindowShape.GLOBAL_96: _tuning(SIZES["tiny"]["global"]),
}
