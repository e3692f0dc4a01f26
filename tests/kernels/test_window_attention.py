"""``window_attention``: every form against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget, relative_l2
from kernels.foundation import DTYPES, guarded
from torch import Tensor

from fastsam_kernels import rel_pos_attention, window_attention
from fastsam_kernels.window_attention import eager
from fastsam_kernels.window_attention.reference import reference

Inputs = tuple[Tensor, Tensor, int, int, bool]


def make_inputs(
    batch: int,
    grid: tuple[int, int],
    window_size: int,
    heads: int,
    head_dim: int,
    pool_queries: bool,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (1.5 * torch.randn(shape, generator=generator, device=device)).to(dtype)

    channels = 3 * heads * head_dim
    return draw(batch, *grid, channels), draw(channels), heads, window_size, pool_queries


def attend(inputs: Inputs, kernels: str) -> Tensor:
    qkv, bias, heads, window_size, pool_queries = inputs
    return window_attention(
        qkv, num_heads=heads, window_size=window_size, qkv_bias=bias, pool_queries=pool_queries, kernels=kernels
    )


def check(inputs: Inputs, kernels: str, what: str) -> None:
    out = attend(inputs, kernels)
    assert out.dtype == inputs[0].dtype
    assert out.is_contiguous()
    assert_within_budget(out, reference, inputs, what)


@pytest.mark.parametrize("shape", [(2, (6, 7), 3, 2, 24), (1, (8, 10), 14, 1, 56), (2, (5, 4), 0, 2, 24)], ids=str)
def test_reference_is_the_formula_without_positions(shape: Any) -> None:
    """The same windows and padding as those of SAM's encoder, with tables of zero."""
    qkv, bias, heads, window_size, _ = inputs = make_inputs(*shape, False, torch.float64)
    tables = [torch.zeros(2 * (window_size or side) - 1, shape[4]).double() for side in shape[1]]
    formula = rel_pos_attention(
        qkv, *tables, num_heads=heads, window_size=window_size, qkv_bias=bias, kernels="reference"
    )
    assert_close_l2(reference(*inputs), formula, 1e-12, "the formula")


# Grids that windows fill, that they reach over at the right, at the bottom, at both and all around, by one token and
# by many; with queries of each token and pooled ones.
SHAPES = [
    (2, (8, 8), 4, 2, 96, False),
    (1, (8, 8), 4, 1, 56, True),
    (1, (8, 11), 4, 1, 72, False),
    (2, (9, 8), 8, 1, 56, False),
    (2, (7, 5), 3, 2, 32, False),
    (1, (10, 14), 8, 1, 72, True),
    (1, (16, 18), 14, 1, 96, True),
    (1, (8, 10), 16, 1, 72, False),
    (1, (6, 6), 14, 1, 56, True),
    (2, (5, 3), 0, 2, 72, False),
    (1, (6, 4), 0, 1, 96, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, (64, 64), 14, 2, 96, False), (1, (64, 32), 8, 2, 56, True)], ids=str)
def test_eager(device: torch.device, dtype: torch.dtype, shape: Any) -> None:
    check(make_inputs(*shape, dtype, device), "torch", f"torch form, {dtype}, {shape}")


@pytest.mark.parametrize(("elements", "windows"), [(1, 65_535), (3000, 65_535), (2**30, 3)])
def test_eager_in_any_blocks(elements: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_BLOCKS", {}), ("_BLOCK_GPU", elements), ("_MOST_WINDOWS", windows)):
        monkeypatch.setattr(eager, name, value)
    for shape in ((3, (12, 10), 4, 2, 32, True), (2, (9, 6), 0, 1, 32, False)):
        check(make_inputs(*shape, torch.float32), "torch", f"blocks of {elements} elements, {shape}")


@pytest.mark.parametrize("kernels", ["torch"])
def test_large_scores_stay_finite(device: torch.device, kernels: str) -> None:
    for window_size in (4, 0):
        qkv, *rest = make_inputs(1, (6, 6), window_size, 1, 56, True, torch.float32, device)
        check((60 * qkv, *rest), kernels, f"scores in the thousands, {kernels}, window {window_size}")


@pytest.mark.parametrize("kernels", ["torch"])
def test_padding_that_outweighs_the_tokens(device: torch.device, kernels: str) -> None:
    """Keys of the bias that win: an error in their number would show undiluted."""
    for dtype in DTYPES:
        qkv, bias, heads, window_size, pooled = make_inputs(1, (8, 8), 14, 1, 32, False, dtype, device)
        qkv[..., :32] = bias[32:64] / 4
        inputs = qkv, bias, heads, window_size, pooled
        check(inputs, kernels, f"padding, {kernels}, {dtype}")
        assert_close_l2(attend(inputs, kernels), bias[64:].expand(1, 8, 8, 32), 0.5, "the padding's share is large")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 0, 3), (2, 0, 1, 3), (0, 3, 1, 2)])
@pytest.mark.parametrize("kernels", ["torch"])
@pytest.mark.parametrize("window_size", [4, 0])
def test_qkv_of_any_strides_between_guard_bands(
    device: torch.device, kernels: str, order: tuple[int, ...], window_size: int
) -> None:
    inputs = make_inputs(2, (6, 4), window_size, 2, 32, True, torch.float16, device)
    view = guarded(inputs[0], order)
    assert torch.equal(view, inputs[0])
    plain, strided = attend(inputs, kernels), attend((view, *inputs[1:]), kernels)
    assert_close_l2(strided, plain, 2e-3, f"strides {view.stride()}")


@pytest.mark.parametrize("kernels", ["torch"])
def test_compiles_as_one_graph(device: torch.device, kernels: str) -> None:
    inputs = make_inputs(1, (6, 4), 4, 2, 32, True, torch.float16, device)

    def form(qkv: Tensor) -> Tensor:
        return attend((2 * qkv, *inputs[1:]), kernels) + 1

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    assert_close_l2(compiled(inputs[0]), form(inputs[0]), 1e-3, kernels)


@pytest.mark.parametrize("window_size", [4, 0])
def test_gradients_of_the_eager(window_size: int) -> None:
    inputs = make_inputs(1, (6, 4), window_size, 2, 8, True, torch.float64)
    leaves = tuple(tensor.requires_grad_(True) for tensor in inputs[:2])

    def form(*tensors: Tensor) -> Tensor:
        return attend((*tensors, *inputs[2:]), "torch")  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(form, leaves, fast_mode=True)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_no_bias_is_a_bias_of_zero(device: torch.device, kernels: str) -> None:
    qkv, bias, heads, window_size, _ = make_inputs(1, (4, 5), 4, 1, 32, False, torch.float32, device)
    sizes = {"num_heads": heads, "window_size": window_size, "kernels": kernels}
    without = window_attention(qkv, qkv_bias=None, **sizes)
    assert torch.equal(without, window_attention(qkv, qkv_bias=0 * bias, **sizes))
    assert relative_l2(without, window_attention(qkv, qkv_bias=bias, **sizes)) > 1e-2


def test_bad_shapes_and_dtypes() -> None:
    qkv, bias, heads, _, _ = make_inputs(1, (4, 6), 4, 2, 32, False, torch.float32)
    bad = [
        ((qkv[0], bias, heads, 4, False), r"qkv must be \[B, H, W, 3 \* 2 heads \* d\], got \[4, 6, 192\]"),
        ((qkv, bias, 7, 4, False), r"qkv must be \[B, H, W, 3 \* 7 heads \* d\], got \[1, 4, 6, 192\]"),
        ((qkv, bias, heads, -1, False), r"window_size must be at least 0, got -1"),
        ((qkv, bias, heads, 3, True), r"even grids and windows, got 4 x 6 tokens, windows of 3"),
        ((qkv[:, :3], bias, heads, 0, True), r"even grids and windows, got 3 x 6 tokens, windows of 0"),
        ((qkv, bias[1:], heads, 4, False), r"qkv_bias must be \[192\], got \[191\]"),
        ((qkv, bias.half(), heads, 4, False), r"qkv_bias must have the dtype of qkv, torch.float32, got torch.float16"),
    ]
    for inputs, message in bad:
        with pytest.raises(ValueError, match=message):
            attend(inputs, "torch")
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got 'cuda'"):
        attend((qkv, bias, heads, 4, False), "cuda")
