"""Attention of prompt tokens to image tokens at the sizes of SAM: 8 heads, 64 x 64 image tokens of 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastsam_kernels import ImageTokens, ValueProjection, token_to_image_attention
from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig

from ..case import Case, Problem, TuneProblem, candidates, draw, few_rows, meta
from ..measure import Form, Work

HEADS, CHANNELS, HEAD_CHANNELS = 8, 256, 16
CLICK_TOKENS, MAX_TOKENS = 7, 16


def _inputs(prompts: int, image_tokens: int, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = (
        ((prompts, HEADS, tokens, CHANNELS), 0.1),
        ((prompts, image_tokens, CHANNELS), 1.0),
        ((image_tokens, CHANNELS), 1.0),
        ((HEADS * HEAD_CHANNELS, CHANNELS), 0.06),
        ((HEADS * HEAD_CHANNELS,), 1.0),
    )
    return [draw(shape, device, dtype, seed, scale) for seed, (shape, scale) in enumerate(shapes)]


def _rows(inputs: list[Tensor], rows: list[int], dtype: torch.dtype) -> list[Tensor]:
    queries, keys, *rest = inputs
    return [tensor.to(dtype) for tensor in (queries[rows], keys[rows], *rest)]


def operands(inputs: list[Tensor]) -> tuple[Tensor, ImageTokens, ValueProjection]:
    """Return the operands of the operation."""
    queries, tokens, pe, value_weight, value_bias = inputs
    return queries, ImageTokens(tokens, pe), ValueProjection(value_weight, value_bias)


def _attend(inputs: list[Tensor], kernels: str = "reference") -> Tensor:
    return token_to_image_attention(*operands(inputs), kernels=kernels)


def work(prompts: int, tokens: int, element_size: int) -> Work:
    """Count image tokens read once, two products over them, one exponential per score."""
    rows = HEADS * tokens
    return Work(
        bytes=prompts * element_size * (4096 * CHANNELS + rows * CHANNELS + tokens * HEADS * HEAD_CHANNELS),
        flops=prompts * (4 * 4096 * rows * CHANNELS + 2 * rows * CHANNELS * HEAD_CHANNELS),
        scalar_ops=prompts * 4096 * rows,
    )


def _case(prompts: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs, rows = _inputs(prompts, 4096, CLICK_TOKENS, device, dtype), few_rows(prompts)

        def form(kernels: str) -> Form:
            return lambda: _attend(inputs, kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: _attend(_rows(inputs, rows, torch.float64)),
            rows=rows,
            work=work(prompts, CLICK_TOKENS, inputs[0].element_size()),
        )

    return make


CASES = [
    *(Case(f"token_to_image_attention, {prompts} clicks", _case(prompts)) for prompts in (1, 8)),
    *(Case(f"token_to_image_attention, {p} clicks", _case(p), devices=("cuda",)) for p in (64, 1024)),
]


def _launches(tokens: int, dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.token_to_image_attention.triton.kernel import plan

    shapes = ((64, HEADS, tokens, 256), (64, 4096, 256), (4096, 256), (128, 256), (128,))
    inputs = [meta(*shape, dtype=dtype) for shape in shapes]
    attend, combine = plan(*operands(inputs), meta(64, tokens, 128, dtype=dtype), tile).launches
    yield f"attend, {tokens} tokens, 64x64", attend
    yield f"combine, {tokens} tokens, 64x64", combine


TESTS = "test_two_way_attention.py"
LAUNCHES = {TokenShape.UP_TO_8: partial(_launches, CLICK_TOKENS), TokenShape.UP_TO_16: partial(_launches, MAX_TOKENS)}


def _tuning(tokens: int, device: torch.device, dtype: torch.dtype) -> TuneProblem:
    from fastsam_kernels.token_to_image_attention.triton.kernel import plan

    prompts, image_tokens = (128, 4096) if device.type != "cpu" else (1, 64)
    inputs, rows = _inputs(prompts, image_tokens, tokens, device, dtype), few_rows(prompts)
    out = torch.empty(prompts, tokens, HEADS * HEAD_CHANNELS, device=device, dtype=dtype)
    exact = dtype == torch.float32
    return TuneProblem(
        launch=lambda tile: plan(*operands(inputs), out, tile),
        out=out,
        truth=lambda: _attend(_rows(inputs, rows, torch.float64)),
        plain=lambda: _attend(_rows(inputs, rows, dtype)),
        rows=rows,
        candidates=candidates(
            (4, 8),
            (1,) if exact else (1, 2, 3),
            BLOCK_N=(16,) if exact else (32, 64),
            HEADS=(1, 2) if exact else (4, 8),
        ),
    )


TUNING = {TokenShape.UP_TO_8: partial(_tuning, CLICK_TOKENS), TokenShape.UP_TO_16: partial(_tuning, MAX_TOKENS)}
