"""Attention of image tokens to prompt tokens at the sizes of SAM: 8 heads, 64 x 64 image tokens of 256 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastsam_kernels import AbsorbedTokens, ImageTokens, LayerNormWeights, image_to_token_attention
from fastsam_kernels.cross_attention.shapes import TokenShape, padded_tokens
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig

from ..case import Case, Problem, TuneProblem, candidates, draw, few_rows, meta
from ..measure import Form, Work
from .token_to_image_attention import CHANNELS, CLICK_TOKENS, HEADS, MAX_TOKENS

EPS = 1e-5


def inputs(prompts: int, image_tokens: int, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = (
        ((prompts, image_tokens, CHANNELS), 1.0),
        ((image_tokens, CHANNELS), 1.0),
        ((prompts, HEADS, tokens, CHANNELS), 0.1),
        ((prompts, HEADS, tokens), 1.0),
        ((prompts, HEADS, tokens, CHANNELS), 0.5),
        ((CHANNELS,), 1.0),
        ((CHANNELS,), 0.3),
    )
    return [draw(shape, device, dtype, seed, scale) for seed, (shape, scale) in enumerate(shapes)]


def rows_of(of_all: list[Tensor], rows: list[int], dtype: torch.dtype) -> list[Tensor]:
    keys, key_pe, *tokens, norm_weight, norm_bias = of_all
    inputs = (keys[rows], key_pe, *(tensor[rows] for tensor in tokens), norm_weight, norm_bias)
    return [tensor.to(dtype) for tensor in inputs]


def operands(of_all: list[Tensor]) -> tuple[ImageTokens, AbsorbedTokens, LayerNormWeights]:
    """Return the operands of the operation."""
    tokens, pe, *absorbed, norm_weight, norm_bias = of_all
    return ImageTokens(tokens, pe), AbsorbedTokens(*absorbed), LayerNormWeights(norm_weight, norm_bias, EPS)


def _attend(of_all: list[Tensor], kernels: str = "reference") -> Tensor:
    return image_to_token_attention(*operands(of_all), kernels=kernels)


def work(prompts: int, tokens: int, element_size: int) -> Work:
    """Count image tokens read and written once, two products over them, one exponential per score."""
    rows = HEADS * tokens
    return Work(
        bytes=prompts * element_size * (2 * 4096 * CHANNELS + 2 * rows * CHANNELS),
        flops=prompts * 4 * 4096 * rows * CHANNELS,
        scalar_ops=prompts * 4096 * rows,
    )


def _case(prompts: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        made, rows = inputs(prompts, 4096, CLICK_TOKENS, device, dtype), few_rows(prompts)

        def form(kernels: str) -> Form:
            return lambda: _attend(made, kernels)

        names = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
        return Problem(
            forms={name: form(name) for name in names},
            truth=lambda: _attend(rows_of(made, rows, torch.float64)),
            rows=rows,
            work=work(prompts, CLICK_TOKENS, made[0].element_size()),
        )

    return make


CASES = [
    *(Case(f"image_to_token_attention, {prompts} clicks", _case(prompts)) for prompts in (1, 8)),
    *(Case(f"image_to_token_attention, {p} clicks", _case(p), devices=("cuda",)) for p in (64, 1024)),
]


def _launches(tokens: int, dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.image_to_token_attention.triton.kernel import plan

    absorbed = (64, HEADS, tokens, 256)
    shapes = ((64, 4096, 256), (4096, 256), absorbed, absorbed[:3], absorbed, (256,), (256,))
    tensors = [meta(*shape, dtype=dtype) for shape in shapes]
    yield f"{tokens} tokens, 64x64", plan(*operands(tensors), meta(64, 4096, 256, dtype=dtype), tile)


TESTS = "test_two_way_attention.py"
LAUNCHES = {TokenShape.UP_TO_8: partial(_launches, CLICK_TOKENS), TokenShape.UP_TO_16: partial(_launches, MAX_TOKENS)}


def _tuning(tokens: int, device: torch.device, dtype: torch.dtype) -> TuneProblem:
    from fastsam_kernels.image_to_token_attention.triton.kernel import plan

    prompts, image_tokens = (128, 4096) if device.type != "cpu" else (1, 64)
    made, rows = inputs(prompts, image_tokens, tokens, device, dtype), few_rows(prompts)
    out = torch.empty(prompts, image_tokens, CHANNELS, device=device, dtype=dtype)
    exact = dtype == torch.float32
    fewest = 16 // padded_tokens(tokens)  # a dot sums over 16 products at the least: the tokens of these heads
    return TuneProblem(
        launch=lambda tile: plan(*operands(made), out, tile),
        out=out,
        truth=lambda: _attend(rows_of(made, rows, torch.float64)),
        plain=lambda: _attend(rows_of(made, rows, dtype)),
        rows=rows,
        candidates=candidates(
            (4, 8),
            (1,) if exact else (1, 2),
            BLOCK_N=(16,) if exact else (32, 64),
            TILES=(8,),
            HEADS=(fewest,) if exact else tuple(sorted({fewest, 2, 4, 8})),
        ),
    )


TUNING = {TokenShape.UP_TO_8: partial(_tuning, CLICK_TOKENS), TokenShape.UP_TO_16: partial(_tuning, MAX_TOKENS)}
