"""The two cross-attentions of the mask decoder: formula, torch forms and Triton forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cross_attention import (
    EPS,
    HEAD_DIM,
    HEADS,
    Inputs,
    to_image,
    to_image_inputs,
    to_image_operands,
    to_token,
    to_token_inputs,
    to_token_operands,
)
from kernels.foundation import DTYPES, assert_bands_untouched, guarded, guarded_output, kernel_without, large
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError
from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.triton.tiles import arch_of, lookup


class Operation:
    """One of the two attentions, as what all tests need of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        asks_image = name == "token_to_image_attention"
        self.inputs: Callable[..., Inputs] = to_image_inputs if asks_image else to_token_inputs
        self.public: Callable[..., Tensor] = to_image if asks_image else to_token
        self.by_prompt = (0,) if asks_image else (2, 3, 4)  # places of what belongs to prompts, beside the keys
        self.keys = 1 if asks_image else 0

    def formula(self, *inputs: Tensor, index: Tensor | None = None) -> Tensor:
        return self.public(*inputs, index=index, kernels="reference")

    def plan(self, inputs: Inputs, out: Tensor) -> Any:
        tokens = inputs[self.by_prompt[0]].shape[2]
        tile = lookup(self.name, arch_of(out.device), inputs[0].dtype, TokenShape.of(tokens))
        if self.name == "token_to_image_attention":
            from fastsam_kernels.token_to_image_attention.triton.kernel import plan

            return plan(*to_image_operands(inputs), out, tile)
        from fastsam_kernels.image_to_token_attention.triton.kernel import plan as plan_to_token

        return plan_to_token(*to_token_operands(inputs), out, tile)

    def rows(self, inputs: Inputs, rows: slice) -> Inputs:
        positions = {self.keys, *self.by_prompt}
        return tuple(tensor[rows] if place in positions else tensor for place, tensor in enumerate(inputs))


@pytest.fixture(params=["token_to_image_attention", "image_to_token_attention"])
def operation(request: pytest.FixtureRequest) -> Operation:
    return Operation(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "tokens", "grid"), [(1, 7, 16), (2, 9, 8), (7, 16, 8), (9, 5, 5), (64, 7, 8)])
def test_eager(operation: Operation, prompts: int, tokens: int, grid: int, dtype: torch.dtype) -> None:
    inputs = operation.inputs(prompts, tokens, grid, dtype)
    out = operation.public(*inputs, kernels="torch")
    assert out.dtype == dtype
    assert_within_budget(out, operation.formula, inputs, f"torch form, {prompts} prompts, {tokens} tokens, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("prompts", "tokens", "grid", "channels"), [(1, 7, 16, 64), (2, 9, 8, 64), (1, 16, 5, 128), (2, 5, 8, 256)]
)
def test_triton_form(
    operation: Operation,
    device: torch.device,
    prompts: int,
    tokens: int,
    grid: int,
    channels: int,
    dtype: torch.dtype,
) -> None:
    inputs = operation.inputs(prompts, tokens, grid, dtype, device, channels)
    out = operation.public(*inputs, kernels="triton")
    assert out.is_contiguous()
    assert_within_budget(out, operation.formula, inputs, f"Triton form, {prompts} prompts, {tokens} tokens, {dtype}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real sizes take a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "tokens"), [(1, 7), (33, 16), (64, 7), pytest.param(1024, 7, marks=large)])
def test_triton_form_at_real_size(
    operation: Operation, device: torch.device, prompts: int, tokens: int, dtype: torch.dtype
) -> None:
    inputs = operation.inputs(prompts, tokens, 64, dtype, device, channels=256)
    out = operation.public(*inputs, kernels="triton")
    last = slice(prompts - 1, prompts)
    assert torch.isfinite(out).all()
    assert_within_budget(out[last], operation.formula, operation.rows(inputs, last), f"{prompts} prompts, {dtype}")


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 16), st.integers(1, 7), st.sampled_from([0, 1]))
def test_triton_form_at_any_shape(prompts: int, tokens: int, grid: int, which: int) -> None:
    operation = Operation(("token_to_image_attention", "image_to_token_attention")[which])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = operation.inputs(prompts, tokens, grid, torch.float16, device)
    out = operation.public(*inputs, kernels="triton")
    assert_within_budget(out, operation.formula, inputs, f"{prompts} prompts, {tokens} tokens, {grid}x{grid}")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_prompts_of_several_images(operation: Operation, device: torch.device, kernels: str, images: int) -> None:
    inputs = operation.inputs(5, 7, 6, torch.float32, device, images=images)
    index = (torch.tensor([2, 0, 0, 1, 2]) % images).to(device)
    out = operation.public(*inputs, index=index, kernels=kernels)
    expected = operation.formula(*inputs, index=index)
    assert_close_l2(out, expected, 1e-5, f"{images} images")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padded_tokens_change_nothing(device: torch.device, kernels: str) -> None:
    keys, key_pe, token_keys, token_bias, token_values, *norm = to_token_inputs(2, 6, 8, torch.float32, device)
    expected = to_token(keys, key_pe, token_keys, token_bias, token_values, *norm, kernels=kernels)
    more = to_token_inputs(2, 9, 8, torch.float32, device)
    padded = [more[2].clone(), torch.full_like(more[3], -torch.inf), more[4].clone()]
    for target, source in zip(padded, (token_keys, token_bias, token_values), strict=True):
        target[:, :, :6] = source
    out = to_token(keys, key_pe, *padded, *norm, kernels=kernels)
    assert_close_l2(out, expected, 1e-6, "three tokens of padding")


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2)])
def test_keys_of_any_strides_between_guard_bands(
    operation: Operation, device: torch.device, order: tuple[int, ...]
) -> None:
    inputs = operation.inputs(2, 7, 5, torch.float16, device)
    plain = operation.public(*inputs, kernels="triton")
    strided = list(inputs)
    strided[operation.keys] = guarded(inputs[operation.keys], order)
    assert torch.equal(operation.public(*strided, kernels="triton"), plain)
    assert_close_l2(operation.public(*strided, kernels="torch"), plain, 2e-3, f"order {order}")


def test_nothing_is_written_beside_the_output(operation: Operation, device: torch.device) -> None:
    inputs = operation.inputs(2, 7, 5, torch.float16, device)
    expected = operation.public(*inputs, kernels="triton")
    out, buffer = guarded_output(expected.shape, torch.float16, device)
    operation.plan(inputs, out).run()
    assert_bands_untouched(buffer, out.numel())
    assert torch.equal(out, expected)


def test_repeats_and_batches_are_bit_equal(operation: Operation, device: torch.device) -> None:
    """A prompt's result depends on nothing else in the batch, nor on when it is computed."""
    inputs = operation.inputs(3, 7, 9, torch.float16, device)
    whole = operation.public(*inputs, kernels="triton")
    assert torch.equal(whole, operation.public(*inputs, kernels="triton"))
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], operation.public(*operation.rows(inputs, one), kernels="triton"))


def test_few_prompts_are_shared_by_more_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of a request decides, no batch within it changes a bit, and any number of shares is right."""
    from fastsam_kernels.token_to_image_attention.triton import kernel as token_to_image_kernel

    of_sam = {prompts: token_to_image_kernel.shares_of(prompts, 4096) for prompts in (1, 4, 5, 16, 17, 1024)}
    few, medium, many = (32, 128), (16, 256), (8, 512)
    assert of_sam == {1: few, 4: few, 5: medium, 16: medium, 17: many, 1024: many}
    assert token_to_image_kernel.shares_of(1, 129) == (3, 64)  # none would be left with nothing
    monkeypatch.setattr(token_to_image_kernel, "_SPLITS", ((1, 5), (2, 3)))
    monkeypatch.setattr(token_to_image_kernel, "_SPLITS_OF_MANY", 2)
    operation = Operation("token_to_image_attention")
    inputs = operation.inputs(4, 3, 17, torch.bfloat16, device)
    by_count = {}
    for prompts, splits in ((1, 5), (2, 3), (3, 2), (4, 2)):
        first_prompts = operation.rows(inputs, slice(0, prompts))
        out = torch.empty(prompts, 3, HEADS * HEAD_DIM, dtype=torch.bfloat16, device=device)
        launches = operation.plan(first_prompts, out)
        assert [launch.constexprs["SPLITS"] for launch in launches.launches] == [splits, splits]
        launches.run()
        assert_within_budget(out, operation.formula, first_prompts, f"{splits} shares")
        by_count[prompts] = out
    assert torch.equal(by_count[3], by_count[4][:3])


def test_large_scores_do_not_overflow(operation: Operation, device: torch.device) -> None:
    inputs = list(operation.inputs(1, 7, 6, torch.float32, device))
    inputs[operation.by_prompt[0]] *= 100
    for kernels in ("torch", "triton"):
        assert_within_budget(operation.public(*inputs, kernels=kernels), operation.formula, inputs, kernels)


@large
def test_offsets_are_64_bit(operation: Operation, device: torch.device) -> None:
    """The keys of three prompts 2^30 elements apart; the kernel without its casts reads what is not a key."""
    from fastsam_kernels.image_to_token_attention.triton import kernel as image_to_token_kernel
    from fastsam_kernels.token_to_image_attention.triton import kernel as token_to_image_kernel

    inputs = list(operation.inputs(3, 7, 2, torch.float16, device))
    expected = operation.public(*inputs, kernels="triton")
    keys, stride = inputs[operation.keys], 2**30
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(6 * stride, dtype=keys.dtype, device=keys.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    far = storage.as_strided(keys.shape, (stride, keys.stride(1), 1), 3 * stride)
    inputs[operation.keys] = far.copy_(keys)
    assert torch.equal(operation.public(*inputs, kernels="triton"), expected)

    out = torch.zeros_like(expected)
    planned = operation.plan(tuple(inputs), out)
    if operation.name == "token_to_image_attention":
        mutated = kernel_without(token_to_image_kernel, token_to_image_kernel.token_to_image_kernel, ".to(tl.int64)")
        attend, combine = planned.launches
        replace(attend, kernel=mutated).run()
        combine.run()
    else:
        mutated = kernel_without(image_to_token_kernel, image_to_token_kernel.image_to_token_kernel, ".to(tl.int64)")
        replace(planned, kernel=mutated).run()
    assert torch.equal(out[:2], expected[:2])
    assert not torch.equal(out[2], expected[2])


@pytest.mark.parametrize("indexed", [False, True])
def test_opcheck(operation: Operation, device: torch.device, indexed: bool) -> None:
    from fastsam_kernels.image_to_token_attention.triton.custom_op import image_to_token_triton
    from fastsam_kernels.token_to_image_attention.triton.custom_op import token_to_image_triton

    inputs = operation.inputs(2, 7, 4, torch.float16, device, images=1 if indexed else 0)
    index = torch.zeros(2, dtype=torch.int64, device=device) if indexed else None
    if operation.name == "token_to_image_attention":
        results = torch.library.opcheck(token_to_image_triton, (*inputs, index))
    else:
        results = torch.library.opcheck(image_to_token_triton, (*inputs, EPS, index))
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_compiles_as_one_graph(operation: Operation, device: torch.device, kernels: str) -> None:
    inputs = operation.inputs(2, 7, 4, torch.float32, device)

    def attend(*inputs: Tensor) -> Tensor:
        return operation.public(*inputs, kernels=kernels) + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert_close_l2(compiled(*inputs), attend(*inputs), 1e-5, kernels)


def test_gradients_of_the_eager(operation: Operation) -> None:
    inputs = tuple(tensor.requires_grad_(True) for tensor in operation.inputs(1, 3, 2, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *tensors: operation.public(*tensors, kernels="torch"), inputs, fast_mode=True
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, r"the tensors must be fp32, fp16 or bf16, got torch.float64"),
        ({"tokens": 17}, r"a prompt may have up to 16 tokens, got 17"),
        ({"channels": 96}, r"the channels must be a power of two of at least 64, got 96"),
        ({"prompts": 0}, r"there are no prompts"),
        ({"grad": True}, r"it has no backward; 'torch' and 'reference' differentiate"),
    ],
)
def test_what_the_triton_forms_do_not_do(
    operation: Operation, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    sizes = {"prompts": 1, "tokens": 7, "grid": 2, "dtype": torch.float32, "channels": 64, **changes}
    grad = sizes.pop("grad", False)
    inputs = operation.inputs(**sizes)
    inputs[0].requires_grad_(grad)
    with pytest.raises(
        UnsupportedKernelError, match=f"'triton' implementation of {operation.name} cannot run here: {message}"
    ):
        operation.public(*inputs, kernels="triton")
    if not grad:
        assert torch.equal(operation.public(*inputs), operation.public(*inputs, kernels="torch"))


def test_bad_shapes_and_dtypes(operation: Operation) -> None:
    inputs = operation.inputs(2, 7, 3, torch.float32)
    queries, keys = operation.by_prompt[0], operation.keys

    def changed(place: int, tensor: Tensor) -> Inputs:
        return (*inputs[:place], tensor, *inputs[place + 1 :])

    bad = [
        (changed(queries, inputs[queries][0]), r"the absorbed tokens must be \[P, H, T, C\], got \[8, 7, 64\]"),
        (changed(keys, inputs[keys][:1]), r"image.tokens must be \[2, N, 64\], got \[1, 9, 64\]"),
        (changed(keys + 1, inputs[keys + 1][1:]), r"image.pe must be \[9, 64\], got \[8, 64\]"),
        (changed(len(inputs) - 1, inputs[-1][1:]), r"must be \[64\], got \[63\]"),
        (changed(len(inputs) - 1, inputs[-1].half()), r"must have the dtype of the image tokens, torch.float32, got"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            operation.public(*arguments)
    with pytest.raises(ValueError, match=r"image.image_index must be \[2\] of int64, got \[3\] torch.int64"):
        operation.public(*inputs, index=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got 'cuda'"):
        operation.public(*inputs, kernels="cuda")
