"""From low-resolution logits to masks: what is enlarged by our own arithmetic is what PyTorch would enlarge it to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sam.images.geometry import ImageGeometry
from sam.masks.upscale import masks_from_logits, upscale_masks

GEOMETRIES = {
    "as large as the model's picture": ImageGeometry.longest_side(512, 512, 512),
    "padded below": ImageGeometry.longest_side(300, 512, 512),
    "enlarged from it, portrait": ImageGeometry.longest_side(901, 640, 512),
    "reduced from it": ImageGeometry.longest_side(37, 100, 512),
    "stretched, of other whole factors": ImageGeometry.stretched(1024, 512, 512),
    "stretched": ImageGeometry.stretched(300, 512, 512),
}


def two_resizes(logits: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """The official post-processing; where the image was stretched it is one resize."""
    if geometry.is_stretched:
        return F.interpolate(logits, geometry.original_size, mode="bilinear", align_corners=False)
    size, (height, width) = geometry.image_size, geometry.input_size
    padded = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
    return F.interpolate(padded[..., :height, :width], geometry.original_size, mode="bilinear", align_corners=False)


def draw(side: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 5 * torch.randn(2, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("side", [128, 256, 512, 100])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_logits_are_those_of_two_resizes(name: str, side: int) -> None:
    """A quarter, a half and all of the picture's size, and one that has to be enlarged by a broken factor."""
    for dtype, most in ((torch.float32, 4e-6), (torch.float64, 1e-14)):
        logits = draw(side, dtype)
        result, expected = upscale_masks(logits, GEOMETRIES[name]), two_resizes(logits, GEOMETRIES[name])
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected, atol=most * 20, rtol=most)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_masks_are_those_of_two_resizes(name: str) -> None:
    logits = draw(128)
    expected = two_resizes(logits.double(), GEOMETRIES[name])
    result = masks_from_logits(logits, GEOMETRIES[name], 0.5)
    wrong = result != (expected > 0.5)
    assert ((expected[wrong] - 0.5).abs() < 1e-4).all()
    assert wrong.float().mean() < 1e-5
    assert 0.3 < result.float().mean() < 0.6


def test_upscaling_passes_gradients() -> None:
    logits = draw(128).requires_grad_()
    upscale_masks(logits, GEOMETRIES["as large as the model's picture"]).sum().backward()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 16.0))
    assert masks_from_logits(draw(128)[:0], GEOMETRIES["padded below"], 0.0).shape == (0, 3, 300, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, -1.5])
def test_a_mask_is_what_lies_above_the_threshold(dtype: torch.dtype, threshold: float) -> None:
    logits = draw(128, dtype)
    logits[0, 0] = torch.tensor(threshold, dtype=dtype)  # a tie, where the dtype can say it
    logits[0, 1] = torch.nan
    geometry = GEOMETRIES["as large as the model's picture"]
    result = masks_from_logits(logits.requires_grad_(), geometry, threshold)
    with torch.no_grad():
        assert torch.equal(result, upscale_masks(logits, geometry) > threshold)
    assert result.dtype == torch.bool
    assert not result[0, 1].any()
