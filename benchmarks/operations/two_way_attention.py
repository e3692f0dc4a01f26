"""Image to token, then token to image, as one pass over the image tokens; sizes of SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastsam_kernels import (
    AbsorbedTokens,
    ImageTokens,
    LayerNormWeights,
    ValueProjection,
    image_to_token_attention,
    token_to_image_attention,
    two_way_attention,
)
from fastsam_kernels.cross_attention.shapes import TokenShape, padded_tokens
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig

from ..case import Case, Problem, Result, TuneProblem, candidates, draw, few_rows, meta
from ..measure import Form, Work
from . import image_to_token_attention as to_token
from .token_to_image_attention import CHANNELS, CLICK_TOKENS, HEAD_CHANNELS, HEADS, MAX_TOKENS


def _inputs(prompts: int, image_tokens: int, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = (
        ((prompts, HEADS, tokens, CHANNELS), 0.1),
        ((HEADS * HEAD_CHANNELS, CHANNELS), 0.06),
        ((HEADS * HEAD_CHANNELS,), 1.0),
    )
    attend = [draw(shape, device, dtype, 10 + seed, scale) for seed, (shape, scale) in enumerate(shapes)]
    return [*to_token.inputs(prompts, image_tokens, tokens, device, dtype), *attend]


def _rows(inputs: list[Tensor], rows: list[int], dtype: torch.dtype) -> list[Tensor]:
    *update, queries, value_weight, value_bias = inputs
    return [
        *to_token.rows_of(update, rows, dtype),
        *(tensor.to(dtype) for tensor in (queries[rows], value_weight, value_bias)),
    ]


def operands(inputs: list[Tensor]) -> tuple[ImageTokens, AbsorbedTokens, LayerNormWeights, Tensor, ValueProjection]:
    """Return the operands of the operation."""
    *update, queries, value_weight, value_bias = inputs
    return (*to_token.operands(update), queries, ValueProjection(value_weight, value_bias))


def _attend(inputs: list[Tensor], kernels: str = "reference") -> Result:
    return two_way_attention(*operands(inputs), kernels=kernels)


def _two_operations(inputs: list[Tensor], kernels: str) -> Result:
    image, absorbed, norm, queries, value = operands(inputs)
    tokens = image_to_token_attention(image, absorbed, norm, kernels=kernels)
    return tokens, token_to_image_attention(queries, ImageTokens(tokens, image.pe), value, kernels=kernels)


def work(prompts: int, tokens: int, element_size: int) -> Work:
    """Count image tokens read and written once, four products over them, two exponentials per pair of tokens."""
    rows = HEADS * tokens
    operands = 3 * rows * CHANNELS + tokens * HEADS * HEAD_CHANNELS
    return Work(
        bytes=prompts * element_size * (2 * 4096 * CHANNELS + operands),
        flops=prompts * (8 * 4096 * rows * CHANNELS + 2 * rows * CHANNELS * HEAD_CHANNELS),
        scalar_ops=prompts * 2 * 4096 * rows,
    )


def _case(prompts: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs, rows = _inputs(prompts, 4096, CLICK_TOKENS, device, dtype), few_rows(prompts)

        def form(kernels: str) -> Form:
            return lambda: _attend(inputs, kernels)

        forms = {name: form(name) for name in ("reference", "torch")}
        if device.type == "cuda":
            forms["triton"] = form("triton")
            forms["triton, two kernels"] = lambda: _two_operations(inputs, "triton")
        return Problem(
            forms=forms,
            truth=lambda: _attend(_rows(inputs, rows, torch.float64)),
            rows=rows,
            work=work(prompts, CLICK_TOKENS, inputs[0].element_size()),
        )

    return make


CASES = [
    *(Case(f"two_way_attention, {prompts} clicks", _case(prompts)) for prompts in (1, 8)),
    *(Case(f"two_way_attention, {p} clicks", _case(p), devices=("cuda",)) for p in (64, 1024)),
]


def _launches(tokens: int, dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
    from fastsam_kernels.two_way_attention.triton.kernel import plan

    absorbed = (64, HEADS, tokens, 256)
    update = ((64, 4096, 256), (4096, 256), absorbed, absorbed[:3], absorbed, (256,), (256,))
    inputs = [meta(*shape, dtype=dtype) for shape in (*update, absorbed, (128, 256), (128,))]
    outputs = [meta(*shape, dtype=dtype) for shape in ((64, 4096, 256), (64, tokens, 128))]
    update_and_ask, _ = plan(*operands(inputs), *outputs, tile).launches
    yield f"{tokens} tokens, 64x64", update_and_ask


TESTS = "test_two_way_pass.py"
LAUNCHES = {TokenShape.UP_TO_8: partial(_launches, CLICK_TOKENS), TokenShape.UP_TO_16: partial(_launches, MAX_TOKENS)}


def _tuning(tokens: int, device: torch.device, dtype: torch.dtype) -> TuneProblem:
    from fastsam_kernels.two_way_attention.triton.kernel import plan

    prompts, image_tokens = (128, 4096) if device.type != "cpu" else (1, 64)
    inputs, rows = _inputs(prompts, image_tokens, tokens, device, dtype), few_rows(prompts)
    out_keys = torch.empty(prompts, image_tokens, CHANNELS, device=device, dtype=dtype)
    out = torch.empty(prompts, tokens, HEADS * HEAD_CHANNELS, device=device, dtype=dtype)
    exact = dtype == torch.float32
    fewest = 16 // padded_tokens(tokens)  # a dot sums over 16 products at the least: the tokens of these heads
    asking = {"ASKED_N": (16,) if exact else (32,), "ASKING_HEADS": (fewest,) if exact else (4, 8)}
    return TuneProblem(
        launch=lambda tile: plan(*operands(inputs), out_keys, out, tile),
        out=(out_keys, out),
        truth=lambda: _attend(_rows(inputs, rows, torch.float64)),
        plain=lambda: _attend(_rows(inputs, rows, dtype)),
        rows=rows,
        candidates=candidates(
            (4, 8),
            (1,) if exact else (1, 2),
            BLOCK_N=(16,) if exact else (32, 64),
            HEADS=(fewest,) if exact else (2, 4, 8),
            **asking,
            ASKING_STAGES=(1,) if exact else (2, 3),
        ),
    )


TUNING = {TokenShape.UP_TO_8: partial(_tuning, CLICK_TOKENS), TokenShape.UP_TO_16: partial(_tuning, MAX_TOKENS)}
