"""``mask_statistics`` and ``packed_masks``: every form against the official two resizes, pixel by pixel.

A pixel may differ only where its logit is within 1e-5 of the largest logit from a threshold.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.foundation import DTYPES, guarded, kernel_without, large
from torch import Tensor

from fastsam_kernels import (
    Resizing,
    UnsupportedKernelError,
    mask_statistics,
    pack_masks,
    packed_masks,
    unpack_masks,
)
from fastsam_kernels.mask_postprocess.reference import resized as full_size
from fastsam_kernels.mask_postprocess.resize_map import axis
from fastsam_kernels.triton.tiles import arch_of, lookup


def resizing_of(height: int, width: int, image_size: int) -> Resizing:
    scale = image_size / max(height, width)
    resized = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    return Resizing(image_size, resized, (height, width))


def smooth_logits(masks: int, side: int, seed: int = 0) -> Tensor:
    """Patches inside and outside, a few logits wide borders, some noise: what a decoder gives."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(masks, 1, max(2, side // 12), max(2, side // 12), generator=generator)
    logits = 12 * F.interpolate(coarse, (side, side), mode="bicubic")[:, 0]
    return logits + 0.3 * torch.randn(masks, side, side, generator=generator)


def near(count: Tensor, logits: Tensor, cut: float, tolerance: float) -> bool:
    least, most = ((logits > cut + slack).sum(dim=(1, 2)) for slack in (tolerance, -tolerance))
    return bool(((least <= count) & (count <= most)).all())


def check(low_res: Tensor, resizing: Resizing, kernels: str, threshold: float = 0.0, offset: float = 1.0) -> None:
    logits = full_size(low_res, resizing).double()
    height, width = resizing.output_size
    tolerance = 1e-5 * float(low_res.abs().max())
    packed = packed_masks(low_res, resizing, threshold=threshold, kernels=kernels)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(low_res), width, -(-height // 32))
    masks = unpack_masks(packed, height)
    differs = masks != (logits > threshold)
    assert not (differs & ((logits - threshold).abs() > tolerance)).any(), f"{int(differs.sum())} pixels"
    assert torch.equal(pack_masks(masks), packed), "bits behind the last row"

    result = mask_statistics(low_res, resizing, threshold=threshold, offset=offset, kernels=kernels)
    assert near(result.inside, logits, threshold + offset, tolerance)
    assert near(result.outside, logits, threshold - offset, tolerance)
    assert torch.equal(result.area, masks.sum(dim=(1, 2))), "the area is that of the bits"
    for mask, box in zip(masks, result.boxes.tolist(), strict=True):
        ys, xs = mask.cpu().numpy().nonzero()
        assert box == ([xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0, 0, 0, 0])
    score = result.inside.int() / result.outside.int()
    torch.testing.assert_close(result.stability, score, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 200), st.booleans(), st.integers(0, 1000), st.sampled_from([64, 128, 1024]))
def test_eager_at_any_geometry(long: int, short: int, portrait: bool, seed: int, image_size: int) -> None:
    size = (max(long, short), min(long, short))
    resizing = resizing_of(*(size if portrait else size[::-1]), image_size)
    check(smooth_logits(3, image_size // 4, seed), resizing, "torch")


@pytest.mark.parametrize("size", [(1500, 2250), (1, 1024), (37, 20)])
def test_eager_at_real_sizes(size: tuple[int, int]) -> None:
    check(smooth_logits(2, 256), resizing_of(*size, 1024), "torch")


@pytest.mark.parametrize("size", [(150, 230), (61, 33), (20, 70)])
def test_eager_of_masks_that_no_bounds_decide(size: tuple[int, int]) -> None:
    """Noise is evaluated as a whole, between masks that are evaluated tile by tile, and some of no tile at all."""
    low_res = smooth_logits(7, 32)
    low_res[1::3] = 3 * torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
    low_res[2] = -20 + 40 * (torch.arange(32) > 20)
    low_res[3] = -20.0
    for threshold, offset in ((0.0, 1.0), (0.4, 8.0), (-0.7, -0.5)):
        check(low_res, resizing_of(*size, 128), "torch", threshold, offset)


@pytest.mark.slow
def test_eager_at_many_sizes() -> None:
    """Portrait, landscape, tiny, 4K, and resized sizes that do not follow the ratio."""
    rng = np.random.default_rng(0)
    for number in range(250):
        sizes = [(2160, 3840), tuple(rng.integers(1, 50, 2)), tuple(rng.integers(50, 3000, 2))]
        height, width = (int(side) for side in sizes[(number > 2) + (number > 60)])
        resizing = resizing_of(height, width, 1024)
        if number % 3 == 0:
            resizing = resizing._replace(input_size=tuple(int(side) for side in rng.integers(1, 1025, 2)))
        check(smooth_logits(1, 256, number), resizing, "torch", rng.choice([0.0, 0.7]), rng.choice([1.0, 0.3, 4.0]))


@pytest.mark.parametrize(("threshold", "offset"), [(0.0, 0.0), (1.5, 1.0), (-2.0, 0.5), (0.0, -1.0), (100.0, 1.0)])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_thresholds(device: torch.device, kernels: str, threshold: float, offset: float) -> None:
    check(smooth_logits(2, 16).to(device), resizing_of(50, 64, 64), kernels, threshold, offset)


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_nothing_and_everything(device: torch.device, kernels: str) -> None:
    """Masks of no pixel, of all and of one, in an image whose sides no tile divides."""
    low_res = torch.full((4, 16, 16), -5.0, device=device)
    low_res[1] = 5.0
    low_res[2, 7, 9] = 6.0
    low_res[3] = 0.0  # at the threshold is outside
    resizing = resizing_of(37, 50, 64)
    check(low_res, resizing, kernels)
    result = mask_statistics(low_res, resizing, kernels=kernels)
    assert result.boxes.tolist()[:2] == [[0, 0, 0, 0], [0, 0, 49, 36]]
    assert result.area.tolist()[0::3] == [0, 0]
    assert result.area[1] == 37 * 50
    assert result.stability[0].isnan()
    assert result.stability[1:].tolist()[0] == 1.0


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_nan_is_outside(device: torch.device, kernels: str) -> None:
    """One logit of a mask that is far above the threshold everywhere else, so that its tile looks decided."""
    low_res, resizing = torch.full((1, 16, 16), 5.0, device=device), resizing_of(64, 64, 64)
    low_res[0, 7, 9] = torch.nan
    outside = torch.zeros(64, 64, dtype=torch.bool, device=device)
    outside[26:34, 34:42] = True  # the pixels between it and its neighbours
    mask = unpack_masks(packed_masks(low_res, resizing, kernels=kernels), 64)[0]
    assert not (mask & outside).any()
    assert mask[:, :32].all() if kernels == "torch" else torch.equal(mask, ~outside)  # which loses the tile
    assert mask_statistics(low_res, resizing, kernels=kernels).area.item() == mask.sum()


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_no_masks(device: torch.device, kernels: str) -> None:
    low_res, resizing = torch.zeros(0, 16, 16, device=device), resizing_of(37, 50, 64)
    assert packed_masks(low_res, resizing, kernels=kernels).shape == (0, 50, 2)
    result = mask_statistics(low_res, resizing, kernels=kernels)
    assert result.boxes.shape == (0, 4)
    assert result.stability.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(50, 75), (1, 60), (100, 61)])
def test_triton_form(device: torch.device, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check(smooth_logits(2, 16).to(device, dtype), resizing_of(*size, 64), "triton")


def test_triton_form_where_every_tile_is_evaluated(device: torch.device) -> None:
    """A few pixels from many logits: no bound is taken."""
    check(smooth_logits(1, 64).to(device), resizing_of(12, 20, 256), "triton")


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 100))
def test_triton_form_at_any_geometry(height: int, width: int, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(smooth_logits(1, 16, seed).to(device), resizing_of(height, width, 64), "triton")


@pytest.mark.slow
def test_triton_form_at_many_geometries(device: torch.device) -> None:
    """Portrait, landscape, tiny, and resized sizes that do not follow the ratio."""
    rng = np.random.default_rng(0)
    for number in range(200):
        height, width = (int(side) for side in rng.integers(1, (12, 90, 200)[number % 3], 2))
        resizing = resizing_of(height, width, 64)
        if number % 4 == 0:
            resizing = resizing._replace(input_size=tuple(int(side) for side in rng.integers(1, 65, 2)))
        check(smooth_logits(1, 16, number).to(device), resizing, "triton", offset=rng.choice([1.0, 0.3, 4.0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="minutes in the interpreter")
@pytest.mark.parametrize("size", [(1024, 1024), (1500, 2250), (2160, 3840), (1, 1024), (37, 20)])
def test_triton_form_at_real_sizes(device: torch.device, size: tuple[int, int]) -> None:
    check(smooth_logits(3, 256).to(device), resizing_of(*size, 1024), "triton")


def test_one_linear_map() -> None:
    """Taps are convex and reproduce both resizes to rounding, also where the input's edge is cut."""
    low_res = smooth_logits(1, 256)
    for resizing in (resizing_of(1500, 2250, 1024), resizing_of(333, 500, 1024), resizing_of(3001, 17, 1024)):
        matrices = []
        for side in (0, 1):
            first, weights = axis(256, 1024, resizing.input_size[side], resizing.output_size[side])
            assert weights.shape[1] <= 3
            assert weights.min() >= 0
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=3e-7)
            matrix = np.zeros((len(first), 256))
            np.add.at(matrix, (np.arange(len(first))[:, None], first[:, None] + np.arange(weights.shape[1])), weights)
            matrices.append(torch.from_numpy(matrix))
        ours = matrices[0] @ low_res[0].double() @ matrices[1].T
        error = (ours - full_size(low_res, resizing)[0]).abs().max() / low_res.abs().max()
        assert error < 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_logits_of_any_strides_between_guard_bands(device: torch.device, kernels: str, order: tuple[int, ...]) -> None:
    low_res, resizing = smooth_logits(2, 16).to(device), resizing_of(40, 33, 64)
    view = guarded(low_res, order)
    assert torch.equal(packed_masks(view, resizing, kernels=kernels), packed_masks(low_res, resizing, kernels=kernels))
    for one, other in zip(
        mask_statistics(view, resizing, kernels=kernels), mask_statistics(low_res, resizing, kernels=kernels),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_repeats_and_batches_are_bit_equal(device: torch.device, kernels: str) -> None:
    low_res, resizing = smooth_logits(3, 16).to(device), resizing_of(64, 40, 64)
    bits = packed_masks(low_res, resizing, kernels=kernels)
    assert torch.equal(bits, packed_masks(low_res, resizing, kernels=kernels))
    whole = mask_statistics(low_res, resizing, kernels=kernels)
    for row in range(3):
        one = low_res[row : row + 1]
        assert torch.equal(bits[row : row + 1], packed_masks(one, resizing, kernels=kernels))
        alone = mask_statistics(one, resizing, kernels=kernels)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def test_nothing_is_written_beside_the_output(device: torch.device) -> None:
    from fastsam_kernels.mask_postprocess.triton.kernel import no_pixels, plan

    low_res, resizing = smooth_logits(2, 16).to(device), resizing_of(40, 33, 64)
    tile = lookup("mask_postprocess", arch_of(device), torch.float32)
    for statistics, inner in ((True, no_pixels(2, device)), (False, torch.zeros(2, 33, 2, dtype=torch.int32))):
        buffer = torch.full((inner.numel() + 2 * 512,), -777, dtype=torch.int32, device=device)
        out = buffer[512:-512].view_as(inner)
        out.copy_(inner)
        plan(low_res, resizing, 0.0, 1.0, out, tile, statistics).run()
        assert (buffer[:512] == -777).all()
        assert (buffer[-512:] == -777).all()
        assert not torch.equal(out.cpu(), inner.cpu())


@large
def test_offsets_are_64_bit(device: torch.device) -> None:
    from fastsam_kernels.mask_postprocess.triton import kernel

    low_res, resizing = smooth_logits(3, 4).half().to(device), resizing_of(16, 16, 16)
    expected = packed_masks(low_res, resizing, kernels="triton")
    torch.utils.deterministic.fill_uninitialized_memory = False
    # Masks 2^30 logits apart, in memory that is reserved but never touched; an offset that wraps stays inside.
    storage = torch.empty(6 * 2**30, dtype=torch.float16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    far = storage.as_strided(low_res.shape, (2**30, 4, 1), 3 * 2**30)
    far.copy_(low_res)
    assert torch.equal(packed_masks(far, resizing, kernels="triton"), expected)
    out = torch.zeros_like(expected)
    tile = lookup("mask_postprocess", arch_of(device), torch.float16)
    launch = kernel.plan(far, resizing, 0.0, 0.0, out, tile, statistics=False)
    mutated = kernel_without(kernel, kernel.mask_postprocess_kernel, ".to(tl.int64)")
    replace(launch, kernel=mutated).run()
    assert torch.equal(out[:2], expected[:2])
    assert not torch.equal(out[2], expected[2])


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.mask_postprocess.triton.custom_op import mask_statistics_triton, packed_masks_triton

    low_res = smooth_logits(2, 8).to(device)
    for logits in (low_res, low_res.transpose(1, 2)):
        for operation, arguments in (
            (mask_statistics_triton, (logits, 32, 32, 20, 25, 12, 0.0, 1.0)),
            (packed_masks_triton, (logits, 32, 32, 20, 25, 12, 0.0)),
        ):
            results = torch.library.opcheck(operation, arguments)
            assert len(results) == 4
            assert set(results.values()) == {"SUCCESS"}


def test_bad_and_unsupported_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    resizing = resizing_of(20, 30, 64)
    with pytest.raises(ValueError, match=r"low_res must be logits \[N, h, w\], got \[1, 1, 16, 16\]"):
        mask_statistics(torch.zeros(1, 1, 16, 16), resizing)
    with pytest.raises(ValueError, match=r"low_res must be logits .* of torch.int64"):
        packed_masks(torch.zeros(1, 16, 16, dtype=torch.int64), resizing)
    with pytest.raises(ValueError, match=r"input_size must lie in the image_size square .*\(65, 64\)"):
        packed_masks(torch.zeros(1, 16, 16), Resizing(64, (65, 64), (20, 20)))
    monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    with pytest.raises(UnsupportedKernelError, match=r"low_res must be fp32, fp16 or bf16, got torch.float64"):
        packed_masks(torch.zeros(1, 16, 16).double(), resizing, kernels="triton")
