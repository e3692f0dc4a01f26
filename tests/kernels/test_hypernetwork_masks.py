"""``hypernetwork_masks``: every form against the formula in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.foundation import DTYPES, assert_bands_untouched, guarded, guarded_output, kernel_without, large
from kernels.mask_inputs import EPS, Inputs, finer_features, make_inputs
from models import TINY, random_model
from torch import Tensor

from fastsam_kernels import UnsupportedKernelError, UpscalingWeights, hypernetwork_masks, pack_upscaling
from fastsam_kernels.hypernetwork_masks.reference import reference
from fastsam_kernels.triton.tiles import TileConfig, arch_of, lookup


def formula(keys: Tensor, weights: UpscalingWeights, hyper: Tensor, grid: tuple[int, int]) -> Tensor:
    return reference(keys, weights, hyper, grid, EPS, keys.dtype)


def check(inputs: Inputs, kernels: str, out_dtype: torch.dtype | None, what: str) -> None:
    """The last prompts, that is, of many: the formula keeps all its steps in fp64."""
    keys, weights, hyper, grid = inputs
    out = hypernetwork_masks(keys, weights, hyper, grid=grid, out_dtype=out_dtype, kernels=kernels)
    assert out.dtype == (out_dtype or keys.dtype)
    assert torch.isfinite(out).all()
    last = slice(-8, None)
    assert_within_budget(out[last], formula, (keys[last], weights, hyper[last], grid), what)


def test_reference_is_the_decoder_s_modules() -> None:
    """The formula that everything is held against, itself held against the layers of the official decoder."""
    decoder = random_model(TINY).double().mask_decoder
    keys, mask_tokens = torch.randn(2, 64, 64).double(), torch.randn(2, 4, 64).double()
    hyper = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, (8, 8)))
    expected = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    first, norm, _, second, _ = decoder.output_upscaling
    weights = pack_upscaling(first.weight, first.bias, norm.weight, norm.bias, second.weight, second.bias)
    assert_close_l2(reference(keys, weights, hyper, (8, 8), EPS, keys.dtype), expected, 1e-12, "the formula")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prompts", "grid", "masks"), [(1, (16, 16), 3), (2, (20, 27), 1), (5, (16, 16), 4), (3, (64, 64), 3)]
)
def test_eager(device: torch.device, dtype: torch.dtype, prompts: int, grid: tuple[int, int], masks: int) -> None:
    check(make_inputs(prompts, grid, masks, dtype, device), "torch", None, f"torch form, {dtype}")


TRITON_CASES = [
    (1, (16, 16), 1, torch.float32, torch.float32),
    (2, (4, 9), 3, torch.float32, torch.float32),
    (1, (20, 27), 4, torch.float32, torch.float32),
    (2, (16, 16), 4, torch.float16, torch.float16),
    (5, (8, 8), 3, torch.float16, torch.float32),
    (1, (20, 27), 3, torch.float16, torch.float32),
    (2, (4, 9), 4, torch.bfloat16, torch.float32),
    (1, (16, 16), 1, torch.bfloat16, torch.bfloat16),
    pytest.param(1, (64, 64), 1, torch.float16, torch.float16, marks=pytest.mark.slow),
]
GPU_CASES = [
    pytest.param(prompts, grid, masks, dtype, out_dtype, marks=large if prompts == 1024 else ())
    for prompts, grid, masks in ((1, (64, 64), 3), (64, (64, 64), 3), (3, (20, 27), 4), (1024, (64, 64), 1))
    for dtype, out_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    )
]


@pytest.mark.parametrize(
    ("prompts", "grid", "masks", "dtype", "out_dtype"), TRITON_CASES + (GPU_CASES if torch.cuda.is_available() else [])
)
def test_triton_form(
    device: torch.device, prompts: int, grid: tuple[int, int], masks: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    inputs = make_inputs(prompts, grid, masks, dtype, device)
    check(inputs, "triton", out_dtype, f"Triton form, {dtype}, grid {grid}")


@pytest.mark.parametrize(("block_n", "block_c"), [(256, 256), (16, 128)])
def test_other_tiles(device: torch.device, block_n: int, block_c: int) -> None:
    """The result does not hang on the tile; the large one makes a full grid bearable in the interpreter in fp32."""
    from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

    grid = (64, 64) if block_n == 256 else (5, 5)
    if device.type != "cpu":
        block_n, block_c = 32, min(block_c, 64)  # what fits any of them
    inputs = make_inputs(1, grid, 3, torch.float32, device)
    keys, weights, hyper, grid = inputs
    out = torch.empty(1, 3, 4 * grid[0], 4 * grid[1], device=device)
    tile = TileConfig({"BLOCK_N": block_n, "BLOCK_C": block_c}, num_warps=4, num_stages=1)
    plan(keys, weights, hyper, out, grid, EPS, tile).run()
    assert_within_budget(out, formula, inputs, f"tiles of {block_n} tokens, {block_c} channels")


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([64, 128]))
def test_triton_form_at_any_shape(prompts: int, height: int, width: int, masks: int, channels: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(prompts, (height, width), masks, torch.float16, device, channels)
    check(inputs, "triton", torch.float32, f"{prompts} prompts, {height}x{width}, {masks} masks, {channels} channels")


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_keys_of_any_strides_between_guard_bands(device: torch.device, kernels: str, order: tuple[int, ...]) -> None:
    keys, weights, hyper, grid = make_inputs(2, (5, 7), 3, torch.float16, device)
    plain = hypernetwork_masks(keys, weights, hyper, grid=grid, kernels=kernels)
    view = guarded(keys, order)
    assert torch.equal(view, keys)
    strided = hypernetwork_masks(view, weights, hyper, grid=grid, kernels=kernels)
    if kernels == "triton":
        assert torch.equal(strided, plain)
    else:
        assert_close_l2(strided, plain, 2e-3, f"strides {view.stride()}")


def test_nothing_is_written_beside_the_output(device: torch.device) -> None:
    from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

    keys, weights, hyper, grid = make_inputs(2, (5, 7), 3, torch.float16, device)
    out, buffer = guarded_output((2, 3, 20, 28), torch.float32, device)
    tile = lookup("hypernetwork_masks", arch_of(device), torch.float16)
    plan(keys, weights, hyper, out, grid, EPS, tile).run()
    assert_bands_untouched(buffer, out.numel())
    expected = hypernetwork_masks(keys, weights, hyper, grid=grid, out_dtype=torch.float32, kernels="triton")
    assert torch.equal(out, expected)


def test_repeats_and_batches_are_bit_equal(device: torch.device) -> None:
    """A prompt's masks depend on nothing else in the batch, nor on when they are computed."""
    keys, weights, hyper, grid = make_inputs(3, (6, 6), 3, torch.float16, device)
    whole = hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="triton")
    assert torch.equal(whole, hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="triton"))
    for row in range(3):
        one = slice(row, row + 1)
        alone = hypernetwork_masks(keys[one], weights, hyper[one], grid=grid, kernels="triton")
        assert torch.equal(whole[one], alone)
    fewer = hypernetwork_masks(keys, weights, hyper[:, 1:2], grid=grid, kernels="triton")
    assert torch.equal(whole[:, 1:2], fewer)


def far_apart(keys: Tensor) -> Tensor:
    """The keys of three prompts 2^30 elements apart, in memory that is reserved but never touched between them.

    The view starts in the middle: an offset that wraps at 2^32 stays inside, and reads what is not a key.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30
    storage = torch.empty(6 * stride, dtype=keys.dtype, device=keys.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    view = storage.as_strided(keys.shape, (stride, keys.stride(1), 1), 3 * stride)
    view.copy_(keys)
    return view


@large
def test_offsets_are_64_bit(device: torch.device) -> None:
    from fastsam_kernels.hypernetwork_masks.triton import kernel
    from fastsam_kernels.hypernetwork_masks.triton.kernel import plan

    keys, weights, hyper, grid = make_inputs(3, (2, 2), 1, torch.float16, device)
    expected = hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="triton")
    far = far_apart(keys)
    assert torch.equal(hypernetwork_masks(far, weights, hyper, grid=grid, kernels="triton"), expected)
    # The same kernel without its casts reads the wrong prompt: this test can fail.
    out = torch.zeros_like(expected)
    launch = plan(far, weights, hyper, out, grid, EPS, lookup("hypernetwork_masks", arch_of(device), torch.float16))
    mutated = kernel_without(kernel, kernel.hypernetwork_masks_kernel, ".to(tl.int64)")
    replace(launch, kernel=mutated).run()
    assert torch.equal(out[:2], expected[:2])
    assert not torch.equal(out[2], expected[2])


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.hypernetwork_masks.triton.custom_op import hypernetwork_masks_triton

    keys, weights, hyper, grid = make_inputs(2, (3, 5), 2, torch.float16, device)
    for some_keys in (keys, keys.transpose(1, 2).contiguous().transpose(1, 2)):
        for high_res in ((None, None), finer_features(2, grid, 256, torch.float16, device)):
            arguments = (some_keys, *weights, hyper, *grid, EPS, torch.float32, *high_res, None)
            results = torch.library.opcheck(hypernetwork_masks_triton, arguments)
            assert len(results) == 4
            assert set(results.values()) == {"SUCCESS"}


def test_compiles_as_one_graph(device: torch.device) -> None:
    keys, weights, hyper, grid = make_inputs(2, (3, 5), 2, torch.float16, device)
    for kernels in ("torch", "triton"):

        def masks(keys: Tensor, hyper: Tensor, kernels: str = kernels) -> Tensor:
            return hypernetwork_masks(2 * keys, weights, hyper, grid=grid, kernels=kernels) + 1

        compiled = torch.compile(masks, backend="aot_eager", fullgraph=True)
        assert_close_l2(compiled(keys, hyper), masks(keys, hyper), 1e-3, kernels)


def test_fast_gelu(device: torch.device) -> None:
    """The polynomial that 16-bit kernels use: within 2e-5 of the erf form everywhere."""
    import triton
    import triton.language as tl

    from fastsam_kernels.triton.math import gelu

    @triton.jit
    def apply(x_ptr, y_ptr, BLOCK: tl.constexpr):  # noqa: N803
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, gelu(tl.load(x_ptr + i), False))

    apply.fn.__globals__.update(gelu=gelu, tl=tl)
    x = torch.cat([torch.linspace(-12, 12, 2**14 - 4), torch.tensor([0.0, 4.4, -4.4, 1e4])]).to(device)
    y = torch.empty_like(x)
    apply[(16,)](x, y, BLOCK=1024)
    exact = 0.5 * x.double() * (1 + torch.erf(x.double() / math.sqrt(2)))
    assert (y.double() - exact)[:-1].abs().max() < 2e-5
    assert y[-1] == 1e4


def test_gradients_of_the_eager() -> None:
    inputs = make_inputs(1, (2, 2), 2, torch.float64, channels=64)
    keys, weights, hyper, grid = inputs
    keys.requires_grad_(True)
    hyper.requires_grad_(True)

    def masks(keys: Tensor, hyper: Tensor) -> Tensor:
        return hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="torch").sum(dim=(-1, -2))

    assert torch.autograd.gradcheck(masks, (keys, hyper), fast_mode=True)


def unsupported(**changes: Any) -> Any:
    keys, weights, hyper, grid = make_inputs(
        1, (2, 3), 1, changes.get("dtype", torch.float32), channels=changes.get("channels", 64)
    )
    keys.requires_grad_(changes.get("grad", False))
    return hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, r"keys must be fp32, fp16 or bf16, got torch.float64"),
        ({"channels": 96}, r"the channels must be a power of two of at least 64, got 96"),
        ({"channels": 32}, r"the channels must be a power of two of at least 64, got 32"),
        ({"grad": True}, r"it has no backward; 'torch' and 'reference' differentiate"),
    ],
)
def test_what_the_triton_form_does_not_do(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    with pytest.raises(
        UnsupportedKernelError, match=f"'triton' implementation of hypernetwork_masks cannot run here: {message}"
    ):
        unsupported(**changes)


def test_auto_takes_the_eager_where_triton_cannot_run() -> None:
    """No error, and the same values as asking for it."""
    keys, weights, hyper, grid = make_inputs(1, (2, 3), 1, torch.float64)
    auto = hypernetwork_masks(keys, weights, hyper, grid=grid)
    assert torch.equal(auto, hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="torch"))
    keys.requires_grad_(True)
    assert hypernetwork_masks(keys, weights, hyper, grid=grid).requires_grad


def test_bad_shapes_and_dtypes() -> None:
    keys, weights, hyper, grid = make_inputs(2, (3, 5), 2, torch.float32)
    bad = [
        ((keys[:, 1:], weights, hyper), r"keys must be \[P, 3 \* 5, C\], got \[2, 14, 256\]"),
        ((keys, weights, hyper[:1]), r"hyper must be \[2, masks, 256 / 8\], got \[1, 2, 32\]"),
        ((keys, weights, hyper[:, :0]), r"hyper must be \[2, masks, 256 / 8\], got \[2, 0, 32\]"),
        ((keys, weights, hyper[..., 1:]), r"hyper must be .*got \[2, 2, 31\]"),
        (
            (keys, weights._replace(bias1=weights.bias1[:64]), hyper),
            r"bias1 must be \[256\] for keys of 256 channels, got \[64\]",
        ),
        ((keys, weights, hyper.half()), r"must have the dtype of keys, torch.float32, got torch.float16"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            hypernetwork_masks(*arguments, grid=grid)
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got 'cuda'"):
        hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="cuda")


def test_a_decoder_of_many_masks_takes_the_eager() -> None:
    inputs = make_inputs(2, (3, 5), 6, torch.float32)
    keys, weights, hyper, grid = inputs
    assert_within_budget(hypernetwork_masks(keys, weights, hyper, grid=grid), formula, inputs, "six masks")
    with pytest.raises(UnsupportedKernelError, match="it makes at most 4 masks per prompt, got 6"):
        hypernetwork_masks(keys, weights, hyper, grid=grid, kernels="triton")


def test_no_prompts() -> None:
    keys, weights, hyper, grid = make_inputs(0, (3, 5), 2, torch.float32)
    assert hypernetwork_masks(keys, weights, hyper, grid=grid).shape == (0, 2, 12, 20)
