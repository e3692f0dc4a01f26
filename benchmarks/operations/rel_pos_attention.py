"""Attention of the image encoders of SAM: 64 x 64 tokens, windows of 14 and the whole grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam_kernels import rel_pos_attention
from fastsam_kernels.rel_pos_attention.reference import reference
from fastsam_kernels.rel_pos_attention.tables import gather_rel_pos
from fastsam_kernels.rel_pos_attention.triton.shapes import AttentionShape
from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import TileConfig

from ..case import Case, Problem, TuneProblem, candidates, draw, meta
from ..measure import Form, Work

WINDOW = 14


class Size(NamedTuple):
    """Heads and their channels in a variant of the encoder, and the side of its grid."""

    heads: int
    head_dim: int
    grid: int = 64


SIZES = {"vit_b": Size(12, 64), "vit_l": Size(16, 64), "vit_h": Size(16, 80), "nano": Size(3, 64, 32)}


class Inputs(NamedTuple):
    qkv: Tensor
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    qkv_bias: Tensor
    num_heads: int
    window_size: int


def _inputs(size: Size, batch: int, window_size: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    channels, table = 3 * size.heads * size.head_dim, 2 * (window_size or size.grid) - 1
    return Inputs(
        draw((batch, size.grid, size.grid, channels), device, dtype, 1),
        draw((table, size.head_dim), device, dtype, 2, 0.2),
        draw((table, size.head_dim), device, dtype, 3, 0.2),
        draw((channels,), device, dtype, 4),
        size.heads,
        window_size,
    )


def _truth(inputs: Inputs, rows: list[int]) -> Tensor:
    """Compute the formula in fp64, one image at a time, of these rows."""
    tables = [table.double() for table in (inputs.rel_pos_h, inputs.rel_pos_w, inputs.qkv_bias)]
    images = (inputs.qkv[row : row + 1].double() for row in rows)
    return torch.cat([reference(image, *tables, inputs.num_heads, inputs.window_size) for image in images])


def work(size: Size, batch: int, window_size: int, element_size: int) -> Work:
    """Count q, k and v read and the result written once; both products over all keys, and the two with the tables."""
    tokens, side = batch * size.grid**2, window_size or size.grid
    channels = size.heads * size.head_dim
    return Work(
        bytes=tokens * 4 * channels * element_size,
        flops=tokens * channels * (4 * side * side + 4 * side),
        scalar_ops=tokens * size.heads * side * side * 2,  # the bias and the exponential
    )


# Baselines that a fused kernel has to beat on a GPU ---------------------------------------------------------


def _windows(inputs: Inputs) -> Tensor:
    """Pad and cut into windows: [3, B * windows, heads, side, side, d]."""
    batch, height, width, channels = inputs.qkv.shape
    side = inputs.window_size or height
    rows, columns = -(-height // side), -(-width // side)
    padded = inputs.qkv_bias.expand(batch, rows * side, columns * side, channels).clone()
    padded[:, :height, :width] = inputs.qkv
    cut = padded.view(batch, rows, side, columns, side, 3, inputs.num_heads, -1)
    return cut.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3)


def _together(attended: Tensor, inputs: Inputs) -> Tensor:
    """Join windows [B * windows, heads, side * side, d] to [B, H, W, C]."""
    batch, height, width, _ = inputs.qkv.shape
    side = inputs.window_size or height
    rows, columns = -(-height // side), -(-width // side)
    grid = attended.view(batch, rows, columns, inputs.num_heads, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return grid.reshape(batch, rows * side, columns * side, -1)[:, :height, :width].contiguous()


def _bias_rows(q: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute rel_h and rel_w [windows, heads, side, side, side] of q [windows, heads, side, side, d]."""
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", q, gather_rel_pos(inputs.rel_pos_h))
    return rel_h, torch.einsum("bnhwc,wkc->bnhwk", q, gather_rel_pos(inputs.rel_pos_w))


def _sdpa_with_bias(inputs: Inputs) -> Tensor:
    """Attend by PyTorch's attention with the whole bias in memory."""
    q, k, v = _windows(inputs)
    rel_h, rel_w = _bias_rows(q, inputs)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2).flatten(2, 3)
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return _together(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), inputs)


def _sdpa_with_one_hot_columns(inputs: Inputs) -> Tensor:
    """Attend with the bias as more channels: its rows beside q, the key's row and column beside k."""
    q, k, v = _windows(inputs)
    rel_h, rel_w = _bias_rows(q, inputs)
    side, head_dim = q.shape[2], q.shape[-1]
    eye = torch.eye(side, device=q.device, dtype=q.dtype)
    one_hot = torch.cat([eye[:, None].expand(-1, side, -1), eye[None].expand(side, -1, -1)], -1)
    q = torch.cat([q * head_dim**-0.5, rel_h, rel_w], -1).flatten(2, 3)
    k = torch.cat([k, one_hot.expand(*k.shape[:-1], -1)], -1).flatten(2, 3)
    v = F.pad(v.flatten(2, 3), (0, 2 * side))  # fused attention wants heads of one width
    attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return _together(attended[..., :head_dim], inputs)


def _flex_attention(inputs: Inputs) -> Form:
    from torch.nn.attention.flex_attention import flex_attention

    side = inputs.qkv.shape[1]
    compiled = torch.compile(flex_attention)

    def form() -> Tensor:
        q, k, v = _windows(inputs)
        rel_h, rel_w = (x.flatten(2, 3) for x in _bias_rows(q, inputs))
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))

        def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + rel_h[batch, head, query, key // side] + rel_w[batch, head, query, key % side]

        return _together(compiled(q, k, v, score_mod=bias), inputs)

    return form


def baselines(inputs: Inputs) -> dict[str, Form]:
    """Return the baselines by name; ``--no-compile`` leaves out those whose name says that they are compiled."""
    forms: dict[str, Form] = {"SDPA, bias in memory": lambda: _sdpa_with_bias(inputs)}
    if inputs.window_size:
        forms["SDPA, one-hot columns"] = lambda: _sdpa_with_one_hot_columns(inputs)
    else:
        forms["FlexAttention, compiled"] = _flex_attention(inputs)
    return forms


def _case(size: Size, batch: int, window_size: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs = _inputs(size, batch, window_size, device, dtype)

        def form(kernels: str) -> Form:
            return lambda: rel_pos_attention(
                *inputs[:3],
                num_heads=size.heads,
                window_size=window_size,
                qkv_bias=inputs.qkv_bias,
                kernels=kernels,
            )

        forms = {"reference": form("reference"), "torch": form("torch")}
        if device.type == "cuda":
            forms |= {"triton": form("triton"), **baselines(inputs)}
        rows = sorted({0, batch - 1})
        return Problem(
            forms=forms,
            truth=lambda: _truth(inputs, rows),
            rows=rows,
            work=work(size, batch, window_size, inputs.qkv.element_size()),
            compile=False,
        )

    return make


CASES = [
    Case(
        f"rel_pos_attention, {name} {'windowed' if window_size else 'global'}, batch {batch}",
        _case(SIZES[name], batch, window_size),
        devices=("cpu", "cuda") if (name, batch) == ("vit_b", 1) else ("cuda",),
        late=name == "vit_h",
    )
    for name in ("vit_b", "vit_l", "vit_h")
    for window_size in (WINDOW, 0)
    for batch in (1, 8)
]


def _launches(
    names: tuple[str, ...], window_size: int
) -> Callable[[torch.dtype, TileConfig], Iterator[tuple[str, Launch]]]:
    def launches(dtype: torch.dtype, tile: TileConfig) -> Iterator[tuple[str, Launch]]:
        from fastsam_kernels.rel_pos_attention.triton.kernel import plan

        for name in names:
            heads, head_dim, grid = SIZES[name]
            channels, table = heads * head_dim, 2 * (window_size or grid) - 1
            qkv = meta(8, grid, grid, 3 * channels, dtype=dtype)
            rel_pos = meta(table, head_dim, dtype=dtype)
            out = meta(8, grid, grid, channels, dtype=dtype)
            bias = meta(3 * channels, dtype=dtype)
            launch = plan(qkv, rel_pos, rel_pos, bias, out, heads, window_size, tile)
            yield f"{name} {'windowed' if window_size else 'global'}", launch

    return launches


LAUNCHES = {
    AttentionShape.WINDOWED_64: _launches(("vit_b", "vit_l", "nano"), WINDOW),
    AttentionShape.WINDOWED_80: _launches(("vit_h",), WINDOW),
    AttentionShape.GLOBAL_64: _launches(("vit_b", "vit_l", "nano"), 0),
    AttentionShape.GLOBAL_80: _launches(("vit_h",), 0),
}


def _tuning(name: str, window_size: int) -> Callable[[torch.device, torch.dtype], TuneProblem]:
    def tuning(device: torch.device, dtype: torch.dtype) -> TuneProblem:
        from fastsam_kernels.rel_pos_attention.triton.kernel import plan

        size, batch, window = SIZES[name], 8, window_size
        if device.type == "cpu":  # the interpreter only shows that it works
            size, batch, window = Size(1, size.head_dim, 8), 1, min(window_size, 5)
        inputs = _inputs(size, batch, window, device, dtype)
        out = inputs.qkv.new_empty((*inputs.qkv.shape[:3], size.heads * size.head_dim))
        rows = sorted({0, batch - 1})
        exact = dtype == torch.float32
        rows_of_tables = (16,) if exact else (32,) if window_size else (32, 64)  # a window's have 27
        return TuneProblem(
            launch=lambda tile: plan(*inputs[:4], out, size.heads, window, tile),
            out=out,
            truth=lambda: _truth(inputs, rows),
            plain=lambda: reference(inputs.qkv[rows], *inputs[1:]),
            rows=rows,
            candidates=candidates(
                (4, 8),
                (1, 2, 3),
                BLOCK_Q=(16, 32) if exact else (64, 128),
                BLOCK_K=(16, 32) if exact else (32, 64),
                BLOCK_T=rows_of_tables,
            ),
        )

    return tuning


TUNING = {
    AttentionShape.WINDOWED_64: _tuning("vit_l", WINDOW),
    AttentionShape.WINDOWED_80: _tuning("vit_h", WINDOW),
    AttentionShape.GLOBAL_64: _tuning("vit_l", 0),
    AttentionShape.GLOBAL_80: _tuning("vit_h", 0),
}
