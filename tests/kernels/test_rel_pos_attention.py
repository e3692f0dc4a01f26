"""``rel_pos_attention``: every form against the formula in fp64."""

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
from models import TINY, random_model
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError, rel_pos_attention
from fastsam_kernels.rel_pos_attention import eager
from fastsam_kernels.rel_pos_attention.reference import reference
from fastsam_kernels.rel_pos_attention.triton.shapes import AttentionShape
from fastsam_kernels.triton.tiles import arch_of, lookup

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int, int]


def make_inputs(
    batch: int,
    grid: tuple[int, int],
    window_size: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    size_h, size_w = (window_size, window_size) if window_size else grid
    channels = 3 * heads * head_dim
    tables = draw(2 * size_h - 1, head_dim, scale=0.2), draw(2 * size_w - 1, head_dim, scale=0.2)
    return draw(batch, *grid, channels), *tables, draw(channels), heads, window_size


def attend(inputs: Inputs, kernels: str) -> Tensor:
    qkv, rel_pos_h, rel_pos_w, bias, heads, window_size = inputs
    return rel_pos_attention(
        qkv, rel_pos_h, rel_pos_w, num_heads=heads, window_size=window_size, qkv_bias=bias, kernels=kernels
    )


def check(inputs: Inputs, kernels: str, what: str) -> None:
    out = attend(inputs, kernels)
    assert out.dtype == inputs[0].dtype
    assert out.is_contiguous()
    assert_within_budget(out, reference, inputs, what)


@pytest.mark.parametrize("window_size", [0, 3])
def test_reference_is_the_official_attention(window_size: int) -> None:
    """The formula that everything is held against, itself held against the modules of the official encoder."""
    block = random_model(TINY).double().image_encoder.blocks[1 if window_size == 0 else 0]
    attention = block.attn
    x = torch.randn(2, 8, 8, 64).double()
    attention.proj = torch.nn.Identity()
    block.norm1 = block.norm2 = torch.nn.Identity()
    block.mlp = torch.nn.Module()
    block.mlp.forward = torch.zeros_like  # type: ignore[method-assign]
    tables = attention.rel_pos_h, attention.rel_pos_w
    out = reference(attention.qkv(x), *tables, attention.qkv.bias, attention.num_heads, window_size)
    assert_close_l2(out, block(x) - x, 1e-12, "the formula")


# Grids that windows fill, and that they reach over at the right, at the bottom, at both, and all around.
SHAPES = [
    (1, (6, 6), 3, 2, 32),
    (2, (6, 7), 3, 1, 64),
    (1, (7, 6), 3, 1, 80),
    (2, (7, 5), 3, 2, 32),
    (1, (8, 10), 14, 1, 64),
    (1, (20, 27), 14, 1, 80),
    (1, (20, 27), 0, 1, 32),
    (2, (5, 3), 0, 2, 80),
    (1, (16, 16), 0, 1, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, (64, 64), 14, 2, 64), (2, (32, 32), 0, 3, 64)], ids=str)
def test_eager(device: torch.device, dtype: torch.dtype, shape: Any) -> None:
    check(make_inputs(*shape, dtype, device), "torch", f"torch form, {dtype}, {shape}")


@pytest.mark.parametrize(("scores", "queries"), [(1, 1), (500, 12), (3000, 1024)])
def test_eager_in_any_blocks(scores: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_SCORES_PER_THREAD", scores), ("_SCORES_GPU", scores), ("_QUERY_CHUNK", queries)):
        monkeypatch.setattr(eager, name, value)
    for shape in ((2, (7, 5), 3, 3, 32), (1, (9, 6), 0, 5, 32)):
        check(make_inputs(*shape, torch.float32), "torch", f"blocks of {scores} scores, {shape}")


def test_large_scores_stay_finite(device: torch.device) -> None:
    """The sum of the padded keys' weights is taken of numbers that would overflow by themselves."""
    for window_size in (3, 0):
        qkv, *rest = make_inputs(1, (4, 5), window_size, 1, 32, torch.float32, device)
        for kernels in ("torch", "triton"):
            check((60 * qkv, *rest), kernels, f"scores in the thousands, {kernels}, window {window_size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_form(device: torch.device, dtype: torch.dtype, shape: Any) -> None:
    check(make_inputs(*shape, dtype, device), "triton", f"Triton form, {dtype}, {shape}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu_memory(12)  # the scores of an image in fp64, several times
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 8, pytest.param(33, marks=large)])
@pytest.mark.parametrize("window_size", [14, 0])
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (16, 64), (16, 80)])
def test_real_sizes(
    device: torch.device, heads: int, head_dim: int, window_size: int, batch: int, dtype: torch.dtype
) -> None:
    """The first and the last image against the formula: it keeps all scores of an image in memory."""
    inputs = make_inputs(batch, (64, 64), window_size, heads, head_dim, dtype, device)
    for kernels in ("torch", "triton"):
        out = attend(inputs, kernels)
        for image in {0, batch - 1}:
            one = slice(image, image + 1)
            what = f"{kernels}, image {image} of {batch}, {dtype}"
            assert_within_budget(out[one], reference, (inputs[0][one], *inputs[1:]), what)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.sampled_from([32, 64, 80]))
def test_any_shape(batch: int, height: int, width: int, window_size: int, head_dim: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(batch, (height, width), window_size, 1, head_dim, torch.float16, device)
    for kernels in ("torch", "triton"):
        check(inputs, kernels, f"{kernels}, {batch} x {height} x {width}, windows of {window_size}, d {head_dim}")


def test_other_tiles(device: torch.device) -> None:
    """The result does not hang on the tile."""
    from fastsam_kernels.rel_pos_attention.triton.kernel import plan
    from fastsam_kernels.triton.tiles import TileConfig

    for shape in ((1, (6, 7), 5, 1, 64), (1, (9, 5), 0, 1, 80)):
        inputs = make_inputs(*shape, torch.float16, device)
        for block_q, block_k, block_t in ((16, 16, 16), (32, 64, 64)):
            out = inputs[0].new_empty((*inputs[0].shape[:3], shape[4]))
            blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_T": block_t}
            plan(*inputs[:4], out, *inputs[4:], TileConfig(blocks, num_warps=4, num_stages=1)).run()
            assert_within_budget(out, reference, inputs, f"{blocks}, {shape}")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 0, 3), (2, 0, 1, 3), (0, 3, 1, 2)])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("window_size", [3, 0])
def test_qkv_of_any_strides_between_guard_bands(
    device: torch.device, kernels: str, order: tuple[int, ...], window_size: int
) -> None:
    inputs = make_inputs(2, (5, 4), window_size, 2, 32, torch.float16, device)
    view = guarded(inputs[0], order)
    assert torch.equal(view, inputs[0])
    plain, strided = attend(inputs, kernels), attend((view, *inputs[1:]), kernels)
    if kernels == "triton":
        assert torch.equal(strided, plain)
    else:
        assert_close_l2(strided, plain, 2e-3, f"strides {view.stride()}")


def test_nothing_is_written_beside_the_output(device: torch.device) -> None:
    from fastsam_kernels.rel_pos_attention.triton.kernel import plan

    for shape in ((2, (5, 7), 3, 2, 32), (1, (5, 7), 0, 1, 80)):
        inputs = make_inputs(*shape, torch.float16, device)
        out, buffer = guarded_output((*inputs[0].shape[:3], shape[3] * shape[4]), torch.float16, device)
        tile = lookup("rel_pos_attention", arch_of(device), torch.float16, AttentionShape.of(shape[4], shape[2]))
        launch = plan(*inputs[:4], out, *inputs[4:], tile)
        scratch = launch.arguments["scratch_ptr"]
        inner, around = guarded_output(scratch.shape, scratch.dtype, device)
        replace(launch, arguments={**launch.arguments, "scratch_ptr": inner}).run()
        assert_bands_untouched(buffer, out.numel())
        assert_bands_untouched(around, inner.numel())
        assert torch.equal(out, attend(inputs, "triton"))


@pytest.mark.parametrize("window_size", [3, 0])
def test_repeats_and_batches_are_bit_equal(device: torch.device, window_size: int) -> None:
    """An image's result depends on nothing else in the batch, nor on when it is computed."""
    inputs = make_inputs(3, (5, 4), window_size, 2, 32, torch.float16, device)
    whole = attend(inputs, "triton")
    assert torch.equal(whole, attend(inputs, "triton"))
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], attend((inputs[0][one], *inputs[1:]), "triton"))


@large
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_are_64_bit(device: torch.device, axis: int) -> None:
    from fastsam_kernels.rel_pos_attention.triton import kernel
    from fastsam_kernels.rel_pos_attention.triton.kernel import plan

    inputs = make_inputs(3, (3, 3), 3, 1, 32, torch.float16, device)
    expected = attend(inputs, "triton")
    far = (far_apart(inputs[0], axis), *inputs[1:])
    assert torch.equal(attend(far, "triton"), expected)
    # The same kernel without its casts reads something else: this test can fail.
    out = torch.zeros_like(expected)
    tile = lookup("rel_pos_attention", arch_of(device), torch.float16, AttentionShape.of(32, 3))
    launch = plan(*far[:4], out, *far[4:], tile)
    mutated = kernel_without(kernel, kernel.rel_pos_attention_kernel, ".to(tl.int64)")
    replace(launch, kernel=mutated).run()
    assert not torch.equal(out, expected)


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.rel_pos_attention.triton.custom_op import rel_pos_attention_triton

    for window_size in (3, 0):
        inputs = make_inputs(2, (4, 5), window_size, 1, 32, torch.float16, device)
        for qkv in (inputs[0], inputs[0].transpose(0, 1).contiguous().transpose(0, 1)):
            results = torch.library.opcheck(rel_pos_attention_triton, (qkv, *inputs[1:]))
            assert len(results) == 4
            assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_compiles_as_one_graph(device: torch.device, kernels: str) -> None:
    inputs = make_inputs(1, (4, 5), 3, 2, 32, torch.float16, device)

    def form(qkv: Tensor) -> Tensor:
        return attend((2 * qkv, *inputs[1:]), kernels) + 1

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    assert_close_l2(compiled(inputs[0]), form(inputs[0]), 1e-3, kernels)


@pytest.mark.parametrize("window_size", [3, 0])
def test_gradients_of_the_eager(window_size: int) -> None:
    inputs = make_inputs(1, (4, 5), window_size, 2, 32, torch.float64)
    leaves = tuple(tensor.requires_grad_(True) for tensor in inputs[:4])

    def form(*tensors: Tensor) -> Tensor:
        return attend((*tensors, 2, window_size), "torch")  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(form, leaves, fast_mode=True)


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_no_bias_is_a_bias_of_zero(device: torch.device, kernels: str) -> None:
    qkv, rel_pos_h, rel_pos_w, bias, heads, window_size = make_inputs(1, (4, 5), 3, 1, 32, torch.float32, device)
    sizes = {"num_heads": heads, "window_size": window_size, "kernels": kernels}
    without = rel_pos_attention(qkv, rel_pos_h, rel_pos_w, qkv_bias=None, **sizes)
    assert torch.equal(without, rel_pos_attention(qkv, rel_pos_h, rel_pos_w, qkv_bias=0 * bias, **sizes))
    assert relative_l2(without, rel_pos_attention(qkv, rel_pos_h, rel_pos_w, qkv_bias=bias, **sizes)) > 1e-2


@pytest.mark.parametrize(
    ("dtype", "head_dim", "grad", "message"),
    [
        (torch.float64, 32, False, r"qkv must be fp32, fp16 or bf16, got torch.float64"),
        (torch.float32, 48, False, r"the head dimension must be one of 32, 64, 80, got 48"),
        (torch.float32, 32, True, r"it has no backward; 'torch' and 'reference' differentiate"),
    ],
)
def test_what_the_triton_form_does_not_do(
    dtype: torch.dtype, head_dim: int, grad: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    inputs = make_inputs(1, (2, 3), 0, 1, head_dim, dtype)
    inputs[0].requires_grad_(grad)
    with pytest.raises(
        UnsupportedKernelError, match=f"'triton' implementation of rel_pos_attention cannot run here: {message}"
    ):
        attend(inputs, "triton")
    assert attend(inputs, "auto").shape == (1, 2, 3, head_dim)


def test_bad_shapes_and_dtypes() -> None:
    qkv, rel_pos_h, rel_pos_w, bias, heads, window_size = make_inputs(1, (4, 5), 3, 2, 32, torch.float32)
    bad = [
        (
            (qkv[0], rel_pos_h, rel_pos_w, bias, heads, 3),
            r"qkv must be \[B, H, W, 3 \* 2 heads \* d\], got \[4, 5, 192\]",
        ),
        ((qkv, rel_pos_h, rel_pos_w, bias, 7, 3), r"qkv must be \[B, H, W, 3 \* 7 heads \* d\], got \[1, 4, 5, 192\]"),
        ((qkv, rel_pos_h, rel_pos_w, bias, heads, -1), r"window_size must be at least 0, got -1"),
        ((qkv, rel_pos_h[1:], rel_pos_w, bias, heads, 3), r"rel_pos_h must be \[2 \* 3 - 1, 32\], got \[4, 32\]"),
        ((qkv, rel_pos_h, rel_pos_w, bias, heads, 0), r"rel_pos_h must be \[2 \* 4 - 1, 32\], got \[5, 32\]"),
        ((qkv, rel_pos_h, rel_pos_w, bias[1:], heads, 3), r"qkv_bias must be \[192\], got \[191\]"),
        (
            (qkv, rel_pos_h, rel_pos_w.half(), bias, heads, 3),
            r"rel_pos_w must have the dtype of qkv, torch.float32, got",
        ),
    ]
    for inputs, message in bad:
        with pytest.raises(ValueError, match=message):
            attend(inputs, "torch")
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got 'cuda'"):
        attend((qkv, rel_pos_h, rel_pos_w, bias, heads, window_size), "cuda")
