"""Box suppression against the definition, one box at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsam_kernels import nms


def brute_force(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    def overlap(a: np.ndarray, b: np.ndarray) -> np.float32:
        zero = np.float32(0)
        width = max(min(a[2], b[2]) - max(a[0], b[0]), zero)
        height = max(min(a[3], b[3]) - max(a[1], b[1]), zero)
        both = width * height
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
        return both / union if union > 0 else zero

    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(overlap(boxes[other], boxes[index]) <= threshold for other in kept):
            kept.append(index)
    return kept


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_against_the_definition(count: int, seed: int, threshold: float) -> None:
    """Small integer boxes and few distinct scores: ties, empty boxes and exact thresholds all happen."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 8, (count, 2, 2)), axis=1)
    boxes, scores = corners.reshape(-1, 4).astype(np.float32), rng.integers(0, 5, count) / 4
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force(boxes, scores, threshold)


def test_many_boxes_in_a_long_chain() -> None:
    """Over several blocks, each box overlapping only its neighbours: every decision hangs on the one before."""
    count = 700
    left = torch.arange(count).float()
    boxes = torch.stack([left, torch.zeros(count), left + 4, torch.ones(count)], dim=1)
    kept = nms(boxes, torch.linspace(1, 0, count), 0.5)  # IoU with the next is 3/5, with the one after 2/6
    assert kept.tolist() == list(range(0, count, 2))


def test_blocks_agree_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 60, (900, 2, 2)), axis=1)
    boxes, scores = corners.reshape(-1, 4).astype(np.float32), rng.integers(0, 50, 900) / 50
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.6)
    assert kept.tolist() == brute_force(boxes, scores, 0.6)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"nms takes boxes \[N, 4\] and scores \[N\], got \[3, 4\] and \[2\]"):
        nms(torch.zeros(3, 4), torch.zeros(2), 0.5)
