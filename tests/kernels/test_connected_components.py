"""``connected_components``: every form against OpenCV, whose labels are renamed by each component's first pixel."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsam_kernels import connected_components


def by_opencv(mask: np.ndarray) -> np.ndarray:
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    named = np.zeros_like(labels)
    for label in np.unique(labels[mask]):
        named[labels == label] = 1 + np.flatnonzero(labels.ravel() == label)[0]
    return named


def random_masks(count: int, height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((count, height, width)) < rng.choice([0.0, 0.2, 0.4, 0.6, 0.9, 1.0], (count, 1, 1))


def check(masks: np.ndarray, kernels: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = connected_components(torch.from_numpy(masks).to(device), kernels=kernels)
    assert labels.dtype == torch.int32
    assert labels.shape == masks.shape
    for found, mask in zip(labels.cpu().numpy(), masks, strict=True):
        np.testing.assert_array_equal(found, by_opencv(mask))


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_cpu_form_equals_opencv(count: int, height: int, width: int, seed: int) -> None:
    check(random_masks(count, height, width, seed), "torch")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_reference_equals_opencv(count: int, height: int, width: int, seed: int) -> None:
    check(random_masks(count, height, width, seed), "reference")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_triton_form_equals_opencv(count: int, height: int, width: int, seed: int) -> None:
    check(random_masks(count, height, width, seed), "triton")


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 2), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_triton_form_equals_opencv_often(count: int, height: int, width: int, seed: int) -> None:
    check(random_masks(count, height, width, seed), "triton")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_spiral_and_a_comb(kernels: str) -> None:
    """Long chains over several programs, and teeth that only meet in the last row."""
    spiral = np.zeros((33, 33), bool)
    top, left, bottom, right = 0, 0, 32, 32
    while top < bottom and left < right:
        spiral[top, left : right + 1] = spiral[top : bottom + 1, right] = True
        spiral[bottom, left + 2 : right + 1] = spiral[top + 2 : bottom + 1, left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    comb = np.zeros((33, 33), bool)
    comb[:, ::2], comb[32] = True, True
    check(np.stack([spiral, comb]), kernels)


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_nothing(kernels: str) -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 4)):
        labels = connected_components(torch.zeros(shape, dtype=torch.bool), kernels=kernels)
        assert labels.shape == shape
        assert not labels.any()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_masks_of_any_strides(device: torch.device, kernels: str) -> None:
    wide = torch.from_numpy(random_masks(2, 9, 14, 1)).to(device)
    for view in (wide[:, 2:8, 3:11], wide.transpose(1, 2), wide.permute(1, 2, 0)):
        expected = connected_components(view.contiguous(), kernels=kernels)
        assert torch.equal(connected_components(view, kernels=kernels), expected)


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.connected_components.kernel import connected_components_triton

    masks = torch.from_numpy(random_masks(2, 9, 7, 0)).to(device)
    for view in (masks, masks.transpose(1, 2)):
        results = torch.library.opcheck(connected_components_triton, (view,))
        assert set(results.values()) == {"SUCCESS"}


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match=r"masks must be \[N, H, W\] of torch.bool, got \[3, 4\] of torch.bool"):
        connected_components(torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks must be .*, got \[1, 3, 4\] of torch.float32"):
        connected_components(torch.zeros(1, 3, 4))
