"""``nms``: every form against the definition, one box at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsam_kernels import UnsupportedKernelError, nms, ranked_nms


def brute_force(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """In numpy's fp32, compared with the threshold in fp64, as torchvision does."""

    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        zero = np.float32(0)
        width = max(min(a[2], b[2]) - max(a[0], b[0]), zero)
        height = max(min(a[3], b[3]) - max(a[1], b[1]), zero)
        both = width * height
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
        return float(both / union) if union > 0 else 0.0

    keep: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(overlap(boxes[other], boxes[index]) <= threshold for other in keep):
            keep.append(index)
    return keep


def draw(count: int, seed: int, largest: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Integer boxes and few distinct scores: ties, empty boxes and exact thresholds all happen."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, largest, (count, 2, 2)), axis=1)
    return corners.reshape(-1, 4).astype(np.float32), rng.integers(0, 5, count) / 4


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]))
def test_against_the_definition(count: int, seed: int, threshold: float) -> None:
    boxes, scores = draw(count, seed)
    expected = brute_force(boxes, scores, threshold)
    for kernels in ("reference", "torch"):
        keep = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, kernels=kernels)
        assert keep.dtype == torch.int64
        assert keep.tolist() == expected, kernels


@pytest.mark.parametrize(
    ("kernels", "count", "largest"),
    [
        ("torch", 1, 8),
        ("torch", 300, 40),
        ("torch", 700, 60),
        ("triton", 1, 8),
        ("triton", 33, 8),
        pytest.param("triton", 150, 30, marks=pytest.mark.slow),
    ],
)
def test_several_blocks(device: torch.device, kernels: str, count: int, largest: int) -> None:
    for threshold in (0.3, 0.7):
        boxes, scores = draw(count, count, largest)
        keep = nms(torch.from_numpy(boxes).to(device), torch.from_numpy(scores).to(device), threshold, kernels=kernels)
        assert keep.tolist() == brute_force(boxes, scores, threshold)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_long_chain(device: torch.device, kernels: str) -> None:
    """Each box overlaps its neighbours only: every decision hangs on the one before, across words and blocks."""
    count = 600 if kernels == "torch" else 70
    left = torch.arange(float(count), device=device)
    boxes = torch.stack([left, torch.zeros_like(left), left + 4, torch.ones_like(left)], dim=1)
    keep = nms(boxes, -left, 0.5, kernels=kernels)  # IoU is 3/5 with the next and 2/6 with the one after
    assert keep.tolist() == list(range(0, count, 2))


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_the_threshold_is_compared_in_fp64(device: torch.device, kernels: str) -> None:
    """fp32(3 / 10) is above 0.3: torchvision on a CPU drops the second box."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]], device=device)
    assert nms(boxes, torch.tensor([1.0, 0.5], device=device), 0.3, kernels=kernels).tolist() == [0]
    # fp32(7 / 10) is below 0.7.
    boxes[1, 2] = 7
    assert nms(boxes, torch.tensor([1.0, 0.5], device=device), 0.7, kernels=kernels).tolist() == [0, 1]


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_boxes_that_do_not_count(device: torch.device, kernels: str) -> None:
    """NaN in place of a box suppresses none and is suppressed by none; the ranking has all of them."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [torch.nan] * 4, [0, 0, 10, 9], [torch.nan] * 4], device=device)
    scores = torch.tensor([0.5, 0.9, 0.4, 0.1], device=device)
    order, keep = ranked_nms(boxes, scores, 0.5, kernels=kernels)
    assert order.tolist() == [1, 0, 2, 3]
    assert keep.tolist() == [True, True, False, True]
    assert nms(boxes, scores, 0.5, kernels=kernels).tolist() == [1, 0, 3]


def test_products_are_rounded_before_they_are_added(device: torch.device) -> None:
    """Boxes with fractions, where a fused multiply-add decides otherwise now and then."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((60, 2, 2)).astype(np.float32) * 30, axis=1)
    boxes, scores = corners.reshape(-1, 4), np.linspace(1, 0, 60)
    first, second = boxes[0], boxes[1:]
    size = (np.minimum(first[2:], second[:, 2:]) - np.maximum(first[:2], second[:, :2])).clip(min=0)
    both = size.prod(axis=1)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for threshold in sorted(both / (areas[0] + areas[1:] - both))[-4:]:
        expected = brute_force(boxes, scores, float(threshold))
        for kernels in ("torch", "triton"):
            keep = nms(torch.from_numpy(boxes).to(device), torch.from_numpy(scores).to(device), float(threshold),
                       kernels=kernels)  # fmt: skip
            assert keep.tolist() == expected


def test_offsets_are_64_bit(device: torch.device) -> None:
    """The most boxes have 2^23 words: no offset needs more than 32 bits, and the limit keeps it so."""
    from fastsam_kernels.nms.triton.implementation import MAX_BOXES
    from fastsam_kernels.nms.triton.kernel import words_of

    assert words_of(MAX_BOXES) * MAX_BOXES < 2**31
    boxes = torch.zeros(MAX_BOXES + 1, 4, device=device)
    with pytest.raises(UnsupportedKernelError, match=r"nms cannot run here: it takes up to 16384 boxes, got 16385"):
        nms(boxes, boxes[:, 0], 0.5, kernels="triton")


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.nms.triton.custom_op import nms_triton

    boxes = torch.from_numpy(draw(5, 0)[0]).to(device)
    results = torch.library.opcheck(nms_triton, (boxes.T.contiguous().T, 0.5))
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_no_boxes(device: torch.device, kernels: str) -> None:
    boxes = torch.zeros(0, 4, device=device)
    assert nms(boxes, boxes[:, 0], 0.5, kernels=kernels).shape == (0,)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"nms takes boxes \[N, 4\] and scores \[N\], got \[3, 4\] and \[2\]"):
        nms(torch.zeros(3, 4), torch.zeros(2), 0.5)
    with pytest.raises(ValueError, match="kernels must be one of"):
        nms(torch.zeros(3, 4), torch.zeros(3), 0.5, kernels="cuda")
