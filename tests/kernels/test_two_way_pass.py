"""Both cross-attentions in one pass over the image tokens: what the two operations give, one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget
from kernels.cross_attention import (
    EPS,
    HEAD_DIM,
    HEADS,
    Inputs,
    one_after_the_other,
    to_image_operands,
    to_token,
    to_token_operands,
    two_way,
    two_way_inputs,
    two_way_operands,
)
from kernels.foundation import DTYPES, assert_bands_untouched, guarded, guarded_output, kernel_without, large
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError
from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.triton.launch import Launches
from fastsam_kernels.triton.tiles import TileConfig, arch_of, lookup

KEYS, BY_PROMPT = 0, (2, 3, 4, 7)


def plan(inputs: Inputs, out_keys: Tensor, out: Tensor) -> Launches:
    from fastsam_kernels.two_way_attention.triton.kernel import plan

    tile = lookup("two_way_attention", arch_of(out.device), inputs[0].dtype, TokenShape.of(out.shape[1]))
    return plan(*two_way_operands(inputs), out_keys, out, tile)


def rows(inputs: Inputs, chunk: slice) -> Inputs:
    positions = {KEYS, *BY_PROMPT}
    return tuple(tensor[chunk] if place in positions else tensor for place, tensor in enumerate(inputs))


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_forms_in_pytorch(kernels: str, images: int) -> None:
    inputs = two_way_inputs(3, 7, 5, torch.float32, images=images)
    index = torch.tensor([1, 0, 1]) % images if images else None
    expected = one_after_the_other(*inputs, kernels=kernels, index=index)
    for chunk, other in zip(two_way(*inputs, index=index, kernels=kernels), expected, strict=True):
        assert torch.equal(chunk, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "tokens", "grid"), [(2, 7, 16), (1, 16, 5)])
def test_triton_form(device: torch.device, prompts: int, tokens: int, grid: int, dtype: torch.dtype) -> None:
    inputs = two_way_inputs(prompts, tokens, grid, dtype, device)
    result = two_way(*inputs, kernels="triton")
    for place, (out, what) in enumerate(zip(result, ("image tokens", "tokens"), strict=True)):
        assert out.is_contiguous()
        assert_within_budget(out, lambda *i, p=place: one_after_the_other(*i)[p], inputs, f"{what}, {dtype}")


@pytest.fixture(params=["own", "sm_90"])
def tiles_of(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiles of the device, those of sm_80 where it is the interpreter, and there those of sm_90 too."""
    from fastsam_kernels.two_way_attention.triton import custom_op

    if request.param != "own":
        if device.type == "cuda":
            pytest.skip("a device runs its own tiles")
        monkeypatch.setattr(custom_op, "arch_of", lambda device: int(request.param.removeprefix("sm_")))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16])
def test_operands_of_all_heads_loaded_once(
    tiles_of: str, device: torch.device, head_dim: int, dtype: torch.dtype
) -> None:
    """With heads of 16 channels, as those of SAM are, W_v of 8 heads is multiplied by in two rounds."""
    inputs = two_way_inputs(1, 7, 9, dtype, device, head_dim=head_dim)
    result = two_way(*inputs, kernels="triton")
    for place, out in enumerate(result):
        assert_within_budget(out, lambda *i, p=place: one_after_the_other(*i)[p], inputs, f"{tiles_of}, {place}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "tokens", "grid", "head_dim"), [(2, 7, 9, 8), (1, 7, 17, 16), (1, 11, 7, 8)])
def test_bit_equal_to_two_kernels_of_the_same_tiles(
    tiles_of: str, device: torch.device, prompts: int, tokens: int, grid: int, head_dim: int, dtype: torch.dtype
) -> None:
    from fastsam_kernels.image_to_token_attention.triton import kernel as image_to_token_kernel
    from fastsam_kernels.token_to_image_attention.triton import kernel as token_to_image_kernel
    from fastsam_kernels.two_way_attention.triton import custom_op

    inputs = two_way_inputs(prompts, tokens, grid, dtype, device, head_dim=head_dim)
    *update, queries, value_weight, value_bias = inputs
    tile = lookup("two_way_attention", custom_op.arch_of(device), dtype, TokenShape.of(tokens))
    blocks = tile.blocks
    out_keys, out = torch.empty_like(update[0]), queries.new_empty(prompts, tokens, HEADS * head_dim)
    update_blocks = {"BLOCK_N": blocks["BLOCK_N"], "TILES": 2, "HEADS": blocks["HEADS"]}
    attend_blocks = {"BLOCK_N": blocks["ASKED_N"], "HEADS": blocks["ASKING_HEADS"]}
    update_tile = TileConfig(update_blocks, tile.num_warps, tile.num_stages)
    attend_tile = TileConfig(attend_blocks, tile.num_warps, blocks["ASKING_STAGES"])
    image_to_token_kernel.plan(*to_token_operands(tuple(update)), out_keys, update_tile).run()
    attend = to_image_operands((queries, out_keys, update[1], value_weight, value_bias))
    token_to_image_kernel.plan(*attend, out, attend_tile).run()
    found_keys, result = two_way(*inputs, kernels="triton")
    assert torch.equal(found_keys, out_keys)
    assert torch.equal(result, out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real sizes take a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "tokens"), [(1, 7), (33, 16), pytest.param(1024, 7, marks=large)])
def test_triton_form_at_real_size(device: torch.device, prompts: int, tokens: int, dtype: torch.dtype) -> None:
    inputs = two_way_inputs(prompts, tokens, 64, dtype, device, channels=256)
    result = two_way(*inputs, kernels="triton")
    last = slice(prompts - 1, prompts)
    for place, out in enumerate(result):
        assert torch.isfinite(out).all()
        assert_within_budget(
            out[last], lambda *i, p=place: one_after_the_other(*i)[p], rows(inputs, last), f"{prompts}, {dtype}"
        )
    for chunk, again in zip(result, two_way(*inputs, kernels="triton"), strict=True):
        assert torch.equal(chunk, again)


def test_prompts_of_several_images(device: torch.device) -> None:
    inputs = two_way_inputs(3, 7, 6, torch.float32, device, images=2)
    index = torch.tensor([1, 0, 1], device=device)
    expected = one_after_the_other(*inputs, index=index)
    result = two_way(*inputs, index=index, kernels="triton")
    for chunk, other in zip(result, expected, strict=True):
        assert_close_l2(chunk, other, 1e-5, "two images")


def test_strided_keys_and_nothing_written_beside_the_outputs(device: torch.device) -> None:
    inputs = two_way_inputs(2, 7, 5, torch.float16, device)
    expected = two_way(*inputs, kernels="triton")
    strided = (guarded(inputs[KEYS], (0, 2, 1)), *inputs[1:])
    outputs, buffers = zip(*(guarded_output(x.shape, torch.float16, device) for x in expected), strict=True)
    plan(strided, *outputs).run()
    for out, buffer, other in zip(outputs, buffers, expected, strict=True):
        assert_bands_untouched(buffer, out.numel())
        assert torch.equal(out, other)


def test_batches_are_bit_equal(device: torch.device) -> None:
    inputs = two_way_inputs(3, 7, 6, torch.float16, device)
    whole = two_way(*inputs, kernels="triton")
    last = slice(2, 3)
    for chunk, alone in zip(whole, two_way(*rows(inputs, last), kernels="triton"), strict=True):
        assert torch.equal(chunk[last], alone)


@large
def test_offsets_are_64_bit(device: torch.device) -> None:
    """The keys of three prompts 2^30 elements apart; the kernel without its casts reads what is not a key."""
    from fastsam_kernels.two_way_attention.triton import kernel as two_way_kernel

    inputs = list(two_way_inputs(3, 7, 2, torch.float16, device))
    expected = two_way(*inputs, kernels="triton")
    keys, stride = inputs[KEYS], 2**30
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(6 * stride, dtype=keys.dtype, device=keys.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    inputs[KEYS] = storage.as_strided(keys.shape, (stride, keys.stride(1), 1), 3 * stride).copy_(keys)
    result = two_way(*inputs, kernels="triton")
    assert all(torch.equal(chunk, other) for chunk, other in zip(result, expected, strict=True))

    outputs = [torch.zeros_like(tensor) for tensor in expected]
    update_and_ask, combine = plan(tuple(inputs), *outputs).launches
    mutated = kernel_without(two_way_kernel, two_way_kernel.two_way_kernel, ".to(tl.int64)")
    replace(update_and_ask, kernel=mutated).run()
    combine.run()
    for chunk, other in zip(outputs, expected, strict=True):
        assert torch.equal(chunk[:2], other[:2])
        assert not torch.equal(chunk[2], other[2])


def test_opcheck_and_one_graph(device: torch.device) -> None:
    from fastsam_kernels.two_way_attention.triton.custom_op import two_way_triton

    inputs = two_way_inputs(2, 7, 3, torch.float16, device, images=1)
    index = torch.zeros(2, dtype=torch.int64, device=device)
    results = torch.library.opcheck(two_way_triton, (*inputs[:7], EPS, *inputs[7:], index))
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}

    def attend(*inputs: Tensor) -> Tensor:
        keys, out = two_way(*inputs, index=index, kernels="triton")
        return keys.sum() + out.sum()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), attend(*inputs))


def test_gradients_of_the_eager() -> None:
    inputs = tuple(tensor.requires_grad_(True) for tensor in two_way_inputs(1, 3, 2, torch.float64))
    assert torch.autograd.gradcheck(lambda *t: two_way(*t, kernels="torch"), inputs, fast_mode=True)


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_fewer_tokens_may_ask_the_image_than_it_asks(device: torch.device, kernels: str) -> None:
    inputs = two_way_inputs(2, 7, 4, torch.float32, device)
    keys, learnt = two_way(*inputs, kernels=kernels)
    some_keys, chunk = two_way(*inputs[:7], inputs[7][:, :, :5], *inputs[8:], kernels=kernels)
    assert torch.equal(some_keys, keys)
    assert chunk.shape == (2, 5, learnt.shape[2])
    assert_close_l2(chunk, learnt[:, :5], 1e-6, kernels)


def with_image_queries(inputs: Inputs) -> tuple[Inputs, Inputs, Tensor]:
    """The same attention with absorbed keys, and with image queries."""
    keys, key_pe, absorbed = inputs[:3]
    (prompts, heads, tokens, channels), dtype = absorbed.shape, absorbed.dtype
    draws = torch.Generator().manual_seed(5)
    weight, bias, token_keys = (
        torch.randn(shape, generator=draws, dtype=dtype).to(absorbed.device) / 4
        for shape in ((heads, HEAD_DIM, channels), (heads, HEAD_DIM), (prompts, heads, tokens, HEAD_DIM))
    )
    queries = torch.einsum("inc,hdc->inhd", keys + key_pe, weight) + bias
    padding = torch.zeros(prompts, heads, tokens, dtype=dtype, device=absorbed.device)
    padding[:, :, -1] = -torch.inf
    absorbed = torch.einsum("phtd,hdc->phtc", token_keys, weight)
    bias_scores = torch.einsum("phtd,hd->pht", token_keys, bias)
    rest = inputs[4:]
    with_absorbed = (keys, key_pe, absorbed, bias_scores + padding, *rest)
    return with_absorbed, (keys, key_pe, token_keys, padding, *rest), queries.flatten(2)


@pytest.mark.parametrize(("prompts", "images", "grid"), [(1, 0, 8), (1, 1, 4), (3, 0, 5), (3, 1, 5), (3, 2, 5)])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_image_queries_give_the_same(kernels: str, prompts: int, images: int, grid: int) -> None:
    inputs = two_way_inputs(prompts, 7, grid, torch.float64, images=images)
    index = torch.tensor([1, 0, 1])[:prompts] % images if images else None
    absorbed, with_queries, queries = with_image_queries(inputs)
    expected = two_way(*absorbed, index=index, kernels="reference")
    result = two_way(*with_queries, index=index, image_queries=queries, kernels=kernels)
    for chunk, other in zip(result, expected, strict=True):
        torch.testing.assert_close(chunk, other, rtol=1e-10, atol=1e-10)
    alone = to_token(*with_queries[:7], index=index, image_queries=queries, kernels=kernels)
    assert torch.equal(alone, result[0])


def test_gradients_with_image_queries() -> None:
    _, inputs, queries = with_image_queries(two_way_inputs(2, 3, 2, torch.float64, images=1))
    inputs = tuple(tensor.requires_grad_(tensor is not inputs[3]) for tensor in (*inputs, queries))
    index = torch.zeros(2, dtype=torch.int64)

    def attend(*tensors: Tensor) -> Inputs:
        return two_way(*tensors[:-1], index=index, image_queries=tensors[-1], kernels="torch")

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_image_queries_have_no_triton_form_and_must_fit(device: torch.device) -> None:
    _, inputs, queries = with_image_queries(two_way_inputs(2, 7, 3, torch.float32, device))
    with pytest.raises(UnsupportedKernelError, match=r"it computes scores from the image tokens, and image\.queries"):
        two_way(*inputs, image_queries=queries, kernels="triton")
    for wrong in (queries[:1], queries[:, 1:], queries[..., 1:]):
        with pytest.raises(ValueError, match=r"image.queries must be \[2, 9, 8 \* d\], got"):
            two_way(*inputs, image_queries=wrong)
    with pytest.raises(ValueError, match=r"absorbed.keys and absorbed.bias must be \[2, 8, 7, 7\] and \[2, 8, 7\]"):
        two_way(*inputs, image_queries=queries[..., 8:])
    with pytest.raises(ValueError, match=r"image\.queries must have the dtype of the image tokens"):
        two_way(*inputs, image_queries=queries.half())


def test_bad_input(device: torch.device) -> None:
    inputs = two_way_inputs(2, 7, 3, torch.float32)
    for wrong in (two_way_inputs(2, 8, 3, torch.float32)[7], inputs[7][:, :, :0], inputs[7][:, 0], inputs[7][:1]):
        message = rf"queries must be \[2, 8, 1 to 7, 64\], got {list(wrong.shape)}".replace("got [", r"got \[")
        with pytest.raises(ValueError, match=message):
            two_way(*inputs[:7], wrong, *inputs[8:])
    with pytest.raises(ValueError, match=r"value.bias must be \[64\], got \[63\]"):
        two_way(*inputs[:9], inputs[9][1:])
    with pytest.raises(
        ValueError, match=r"queries must have the dtype of the image tokens, torch.float32, got torch.float16"
    ):
        two_way(*inputs[:7], inputs[7].half(), *inputs[8:])
    with pytest.raises(UnsupportedKernelError, match="a prompt may have up to 16 tokens, got 17"):
        two_way(*two_way_inputs(1, 17, 2, torch.float32, device), kernels="triton")
