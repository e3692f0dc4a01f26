"""``window_attention``: every form against the formula in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget, relative_l2
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.foundation import (
    DTYPES,
    assert_bands_untouched,
    far_apart,
    guarded,
    guarded_output,
    kernel_without,
    large,
)
from torch import Tensor

from benchmarks.operations.window_attention import SIZES
from fastsam_kernels import UnsupportedKernelError, window_attention
from fastsam_kernels.triton.tiles import arch_of, lookup
from fastsam_kernels.window_attention import eager
from fastsam_kernels.window_attention.reference import reference
from fastsam_kernels.window_attention.triton.shapes import WindowShape
from sam.modeling.hiera import MultiScaleBlock, do_pool

# The interpreter says so of whole windows in a grid with cut ones, and of windows outside: minus infinity is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),
]
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


def empty_result(inputs: Inputs) -> Tensor:
    qkv, _, _, _, pooled = inputs
    batch, height, width, channels = qkv.shape
    step = 2 if pooled else 1
    return qkv.new_empty((batch, height // step, width // step, channels // 3))


def check(inputs: Inputs, kernels: str, what: str) -> None:
    out = attend(inputs, kernels)
    assert out.dtype == inputs[0].dtype
    assert out.is_contiguous()
    assert_within_budget(out, reference, inputs, what)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("window_size", [4, 14, 0])
@torch.no_grad()
def test_reference_is_the_official_attention(window_size: int, pooled: bool) -> None:
    """The formula that everything is held against, itself held against the block of the official encoder."""
    block = MultiScaleBlock(16, 48, 2, q_stride=(2, 2) if pooled else None, window_size=window_size).double()
    block.attn.proj = block.norm1 = block.norm2 = torch.nn.Identity()
    block.mlp.forward = torch.zeros_like  # type: ignore[method-assign]
    x = torch.randn(2, 6, 10, 16).double()
    out = reference(block.attn.qkv(x), block.attn.qkv.bias, 2, window_size, pooled)
    assert_close_l2(out, block(x) - do_pool(block.proj(x), block.pool), 1e-12, "the formula")


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_form(device: torch.device, dtype: torch.dtype, shape: Any) -> None:
    check(make_inputs(*shape, dtype, device), "triton", f"Triton form, {dtype}, {shape}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu_memory(12)  # the scores of an image in fp64
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, pytest.param(9, marks=large)])
@pytest.mark.parametrize("variant", SIZES)
def test_real_sizes(device: torch.device, variant: str, batch: int, dtype: torch.dtype) -> None:
    """Every kind of block; the first and the last image against the formula."""
    for kind, size in SIZES[variant].items():
        heads, head_dim, grid, window_size, pooled = size
        inputs = make_inputs(batch, (grid, grid), window_size, heads, head_dim, pooled, dtype, device)
        for kernels in ("torch", "triton"):
            out = attend(inputs, kernels)
            for image in {0, batch - 1}:
                one = slice(image, image + 1)
                what = f"{kernels}, {kind}, image {image} of {batch}, {dtype}"
                assert_within_budget(out[one], reference, (inputs[0][one], *inputs[1:]), what)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.booleans(), st.sampled_from([8, 56, 72, 96, 128]))
def test_any_shape(height: int, width: int, window_size: int, pooled: bool, head_dim: int) -> None:
    """Sides in steps of two where queries are pooled."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unit = 2 if pooled else 1
    grid = (unit * height, unit * width)
    inputs = make_inputs(1, grid, unit * window_size, 1, head_dim, pooled, torch.float16, device)
    for kernels in ("torch", "triton"):
        check(inputs, kernels, f"{kernels}, {grid}, windows of {unit * window_size}, pooled {pooled}, d {head_dim}")


def test_other_tiles(device: torch.device) -> None:
    """The result does not hang on the tile."""
    from fastsam_kernels.triton.tiles import TileConfig
    from fastsam_kernels.window_attention.triton.kernel import plan

    for shape in ((1, (6, 8), 6, 1, 72, True), (1, (9, 5), 0, 1, 96, False), (1, (4, 12), 4, 1, 56, False)):
        inputs = make_inputs(*shape, torch.float16, device)
        for block_q, block_k in ((16, 16), (32, 64), (128, 32)):
            out = empty_result(inputs)
            blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
            plan(*inputs[:2], out, *inputs[2:], TileConfig(blocks, num_warps=4, num_stages=1)).run()
            assert_within_budget(out, reference, inputs, f"{blocks}, {shape}")


@pytest.mark.parametrize(("elements", "windows"), [(1, 65_535), (3000, 65_535), (2**30, 3)])
def test_eager_in_any_blocks(elements: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_BLOCKS", {}), ("_BLOCK_GPU", elements), ("_MAX_WINDOWS", windows)):
        monkeypatch.setattr(eager, name, value)
    for shape in ((3, (12, 10), 4, 2, 32, True), (2, (9, 6), 0, 1, 32, False)):
        check(make_inputs(*shape, torch.float32), "torch", f"blocks of {elements} elements, {shape}")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_large_scores_stay_finite(device: torch.device, kernels: str) -> None:
    for window_size in (4, 0):
        qkv, *rest = make_inputs(1, (6, 6), window_size, 1, 56, True, torch.float32, device)
        check((60 * qkv, *rest), kernels, f"scores in the thousands, {kernels}, window {window_size}")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padding_that_outweighs_the_tokens(device: torch.device, kernels: str) -> None:
    """Keys of the bias that win: an error in their number would show undiluted."""
    for dtype in DTYPES:
        qkv, bias, heads, window_size, pooled = make_inputs(1, (8, 8), 14, 1, 32, False, dtype, device)
        qkv[..., :32] = bias[32:64] / 4
        inputs = qkv, bias, heads, window_size, pooled
        check(inputs, kernels, f"padding, {kernels}, {dtype}")
        assert_close_l2(attend(inputs, kernels), bias[64:].expand(1, 8, 8, 32), 0.5, "the padding's share is large")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 0, 3), (2, 0, 1, 3), (0, 3, 1, 2)])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("window_size", [4, 0])
def test_qkv_of_any_strides_between_guard_bands(
    device: torch.device, kernels: str, order: tuple[int, ...], window_size: int
) -> None:
    inputs = make_inputs(2, (6, 4), window_size, 2, 32, True, torch.float16, device)
    view = guarded(inputs[0], order)
    assert torch.equal(view, inputs[0])
    plain, strided = attend(inputs, kernels), attend((view, *inputs[1:]), kernels)
    if kernels == "triton":
        assert torch.equal(strided, plain)
    else:
        assert_close_l2(strided, plain, 2e-3, f"strides {view.stride()}")


def test_nothing_is_written_beside_the_output(device: torch.device) -> None:
    from fastsam_kernels.window_attention.triton.kernel import plan

    for shape in ((2, (6, 10), 4, 2, 56, False), (1, (6, 6), 4, 1, 72, True), (1, (5, 7), 0, 1, 96, False)):
        inputs = make_inputs(*shape, torch.float16, device)
        out, buffer = guarded_output(empty_result(inputs).shape, torch.float16, device)
        tile = lookup("window_attention", arch_of(device), torch.float16, WindowShape.of(shape[4], shape[2], shape[5]))
        plan(*inputs[:2], out, *inputs[2:], tile).run()
        assert_bands_untouched(buffer, out.numel())
        assert torch.equal(out, attend(inputs, "triton"))


@pytest.mark.parametrize("window_size", [4, 0])
def test_repeats_and_batches_are_bit_equal(device: torch.device, window_size: int) -> None:
    """An image's result depends on nothing else in the batch, nor on when it is computed."""
    inputs = make_inputs(3, (6, 4), window_size, 2, 32, False, torch.float16, device)
    whole = attend(inputs, "triton")
    assert torch.equal(whole, attend(inputs, "triton"))
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], attend((inputs[0][one], *inputs[1:]), "triton"))


@large
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_are_64_bit(device: torch.device, axis: int) -> None:
    from fastsam_kernels.window_attention.triton import kernel
    from fastsam_kernels.window_attention.triton.kernel import plan

    inputs = make_inputs(3, (3, 3), 3, 1, 32, False, torch.float16, device)
    expected = attend(inputs, "triton")
    far = (far_apart(inputs[0], axis), *inputs[1:])
    assert torch.equal(attend(far, "triton"), expected)
    # The same kernel without its casts reads something else: this test can fail.
    out = torch.zeros_like(expected)
    tile = lookup("window_attention", arch_of(device), torch.float16, WindowShape.of(32, 3, False))
    launch = plan(*far[:2], out, *far[2:], tile)
    mutated = kernel_without(kernel, kernel.window_attention_kernel, ".to(tl.int64)")
    replace(launch, kernel=mutated).run()
    assert not torch.equal(out, expected)


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.window_attention.triton.custom_op import window_attention_triton

    for window_size, pooled in ((3, False), (0, True)):
        inputs = make_inputs(2, (4, 6), window_size, 1, 32, pooled, torch.float16, device)
        for qkv in (inputs[0], inputs[0].transpose(0, 1).contiguous().transpose(0, 1)):
            results = torch.library.opcheck(window_attention_triton, (qkv, *inputs[1:]))
            assert len(results) == 4
            assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
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


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_no_bias_is_a_bias_of_zero(device: torch.device, kernels: str) -> None:
    qkv, bias, heads, window_size, _ = make_inputs(1, (4, 5), 4, 1, 32, False, torch.float32, device)
    sizes = {"num_heads": heads, "window_size": window_size, "kernels": kernels}
    without = window_attention(qkv, qkv_bias=None, **sizes)
    assert torch.equal(without, window_attention(qkv, qkv_bias=0 * bias, **sizes))
    assert relative_l2(without, window_attention(qkv, qkv_bias=bias, **sizes)) > 1e-2


@pytest.mark.parametrize(
    ("dtype", "head_dim", "grad", "message"),
    [
        (torch.float64, 32, False, r"qkv must be fp32, fp16 or bf16, got torch.float64"),
        (torch.float32, 20, False, r"the head dimension must be a multiple of 8 up to 128, got 20"),
        (torch.float32, 136, False, r"the head dimension must be a multiple of 8 up to 128, got 136"),
        (torch.float32, 32, True, r"it has no backward; 'torch' and 'reference' differentiate"),
    ],
)
def test_what_the_triton_form_does_not_do(
    dtype: torch.dtype, head_dim: int, grad: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    inputs = make_inputs(1, (2, 3), 0, 1, head_dim, False, dtype)
    inputs[0].requires_grad_(grad)
    with pytest.raises(
        UnsupportedKernelError, match=f"'triton' implementation of window_attention cannot run here: {message}"
    ):
        attend(inputs, "triton")
    assert attend(inputs, "auto").shape == (1, 2, 3, head_dim)


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
