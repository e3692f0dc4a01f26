"""``preprocess_image``: every form against the formula in fp64, and against Pillow to a level of 8 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.foundation import DTYPES, assert_bands_untouched, guarded_output, kernel_without, large
from models import random_image
from PIL import Image
from torch import Tensor

from benchmarks.measure import peak_memory
from fastsam_kernels import UnsupportedKernelError, preprocess_image
from fastsam_kernels.numerics import Budget
from fastsam_kernels.preprocess_image import eager
from fastsam_kernels.triton.tiles import arch_of, lookup

MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
SIZES = [
    ((90, 60), (32, 21), 32),  # smaller
    ((20, 31), (21, 32), 32),  # larger
    ((1, 50), (1, 24), 24),
    ((7, 7), (16, 16), 20),  # padded on both sides
    ((37, 16), (37, 16), 40),  # the same
]


def check(image: Tensor, size: tuple[int, int], side: int, kernels: str, dtype: torch.dtype) -> None:
    mean, std = MEAN.to(image.device), STD.to(image.device)
    result = preprocess_image(image, size, side, mean, std, dtype=dtype, kernels=kernels)
    assert result.dtype == dtype
    truth, plain = (
        preprocess_image(
            image, size, side, mean.to(precision), std.to(precision), dtype=precision, kernels="reference"
        ).double()
        for precision in (torch.float64, torch.float32)
    )
    error, baseline = (float((values.double() - truth).abs().max()) for values in (result, plain.to(dtype)))
    of_levels = torch.finfo(torch.float32).eps * 255 / float(std.min())  # rounding of what the mean is taken from
    assert error <= Budget(baseline, dtype, float(truth.abs().max())).limit + of_levels
    assert (result[:, size[0] :] == 0).all()
    assert (result[:, :, size[1] :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(("given", "size", "side"), SIZES)
def test_forms(
    device: torch.device, given: tuple[int, int], size: tuple[int, int], side: int, kernels: str, dtype: torch.dtype
) -> None:
    check(torch.from_numpy(random_image(*given)).to(device), size, side, kernels, dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(16, 64))
def test_eager_at_any_geometry(height: int, width: int, side: int) -> None:
    """Sizes as SAM resizes: the longer side becomes ``side``."""
    scale = side / max(height, width)
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    check(torch.from_numpy(random_image(height, width)), size, side, "torch", torch.float32)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("size", [(400, 600), (100, 150), (256, 171)])
def test_a_level_from_pillow(kernels: str, size: tuple[int, int]) -> None:
    image = random_image(200, 300)
    height, width = (min(side, 256) for side in size)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    result = preprocess_image(torch.from_numpy(image), (height, width), 256, MEAN, STD, kernels=kernels)
    levels = result[:, :height, :width] * STD[:, None, None] + MEAN[:, None, None]
    difference = (levels.permute(1, 2, 0).numpy() - np.array(resized).astype(np.float32)).__abs__()
    assert difference.max() <= 1.01
    assert difference.mean() < 0.4


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_any_strides_and_repeats(device: torch.device, kernels: str) -> None:
    image = torch.from_numpy(random_image(30, 40)).to(device)
    mean, std = MEAN.to(device).view(3, 1, 1), STD.to(device).view(3, 1, 1)
    expected = preprocess_image(image, (12, 16), 16, mean, std, kernels=kernels)
    for order in ((2, 0, 1), (1, 2, 0)):
        turned = image.permute(order).contiguous().permute(*np.argsort(order).tolist())
        assert turned.stride() != image.stride()
        assert torch.equal(preprocess_image(turned, (12, 16), 16, mean, std, kernels=kernels), expected)


@pytest.mark.parametrize("given", [(61, 90), (90, 33), (200, 30), (7, 300)])
@pytest.mark.parametrize("size", [(32, 32), (32, 21), (5, 32), (64, 64)])
def test_strips_change_no_bit(given: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large image on a CPU: each strip is a few rows of it, and none has to be of the same height."""
    image, statistics = torch.from_numpy(random_image(*given)), (64, MEAN, STD)
    whole = preprocess_image(image, size, *statistics, kernels="torch")
    for pixels in (1, 500, 1700):
        monkeypatch.setattr(eager, "_STRIP", pixels)
        assert torch.equal(preprocess_image(image, size, *statistics, kernels="torch"), whole)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is that of Linux")
@pytest.mark.parametrize(("given", "limit"), [((4000, 6000), 300e6), ((60000, 100), 135e6), ((100, 60000), 135e6)])
def test_a_large_image_takes_little_memory(given: tuple[int, int], limit: float) -> None:
    """In fp64 they take 576, 144 and 144 MB, and rows of the second at the width of the result 1.5 GB.

    In strips they were read as 137 to 178, 71 to 110 and 65 to 90 MB: with what the C library holds back.
    """
    image = torch.zeros(*given, 3, dtype=torch.uint8)

    def form() -> Tensor:
        return preprocess_image(image, (1024, 1024), 1024, MEAN, STD, kernels="torch")

    form()
    assert peak_memory(form, torch.device("cpu")) < limit


def test_nothing_is_written_beside_the_output(device: torch.device) -> None:
    from fastsam_kernels.preprocess_image.triton.kernel import plan

    image = torch.from_numpy(random_image(30, 40)).to(device)
    out, buffer = guarded_output((3, 20, 20), torch.float32, device)
    tile = lookup("preprocess_image", arch_of(device), torch.float32)
    plan(image, (12, 16), MEAN.to(device), STD.to(device), out, tile).run()
    assert_bands_untouched(buffer, out.numel())
    assert (out != -777).all()


@large
def test_offsets_are_64_bit(device: torch.device) -> None:
    """Rows 2^30 bytes apart, in memory that is reserved but never touched; an offset that wraps stays inside."""
    from fastsam_kernels.preprocess_image.triton import kernel

    image = torch.from_numpy(random_image(3, 8)).to(device)
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(6 * 2**30, dtype=torch.uint8, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    far = storage.as_strided(image.shape, (2**30, 3, 1), 3 * 2**30)
    far.copy_(image)
    mean, std = MEAN.to(device), STD.to(device)
    expected = preprocess_image(image, (3, 8), 8, mean, std, kernels="triton")
    assert torch.equal(preprocess_image(far, (3, 8), 8, mean, std, kernels="triton"), expected)
    out = torch.zeros_like(expected)
    launch = kernel.plan(far, (3, 8), mean, std, out, lookup("preprocess_image", arch_of(device), torch.float32))
    replace(launch, kernel=kernel_without(kernel, kernel.preprocess_image_kernel, ".to(tl.int64)")).run()
    assert torch.equal(out[:, :2], expected[:, :2])
    assert not torch.equal(out[:, 2], expected[:, 2])


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.preprocess_image.triton.custom_op import preprocess_image_triton

    image = torch.from_numpy(random_image(9, 8)).to(device)
    for subject in (image, image.transpose(0, 1)):
        arguments = (subject, 5, 6, 8, MEAN.to(device), STD.to(device), torch.float16)
        results = torch.library.opcheck(preprocess_image_triton, arguments)
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}


def test_bad_and_unsupported_inputs(device: torch.device) -> None:
    image = torch.zeros(4, 5, 3, dtype=torch.uint8, device=device)
    mean, std = MEAN.to(device), STD.to(device)
    with pytest.raises(ValueError, match=r"must be \[H, W, 3\] of uint8, got \[4, 5\] of torch.uint8"):
        preprocess_image(image[..., 0], (4, 4), 8, mean, std)
    with pytest.raises(ValueError, match=r"of uint8, got \[4, 5, 3\] of torch.float32"):
        preprocess_image(image.float(), (4, 4), 8, mean, std)
    with pytest.raises(ValueError, match="size must be between 1x1 and 8x8, got 4x9"):
        preprocess_image(image, (4, 9), 8, mean, std)
    with pytest.raises(UnsupportedKernelError, match=r"must be fp32, fp16 or bf16, got torch.float64"):
        preprocess_image(image, (4, 5), 8, mean, std, dtype=torch.float64, kernels="triton")
