"""Polygons of masks, held against filling them again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polygons import fill
from scipy import ndimage

from sam.masks.polygons import multipolygon


@settings(max_examples=300, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_filling_gives_the_mask_back(mask: np.ndarray) -> None:
    polygons = multipolygon(mask)["coordinates"]
    np.testing.assert_array_equal(fill(polygons, mask.shape), mask)
    labels, count = ndimage.label(mask)  # pixels with a common edge
    assert len(polygons) == count
    for polygon in polygons:
        whole = fill([polygon], mask.shape)
        assert len(np.unique(labels[whole])) == 1  # an outline and its own holes
        assert whole.sum() == (labels == labels[whole][0]).sum()
        assert all(ring[0] == ring[-1] for ring in polygon)


@pytest.mark.parametrize(
    ("rows", "polygons"),
    [
        (["..."], []),
        ([".#."], [[[[1, 0], [2, 0], [2, 1], [1, 1], [1, 0]]]]),
        (
            ["###", "#.#", "###"],
            [[[[0, 0], [3, 0], [3, 3], [0, 3], [0, 0]], [[2, 1], [1, 1], [1, 2], [2, 2], [2, 1]]]],
        ),
    ],
)
def test_examples(rows: list[str], polygons: list[list[list[list[int]]]]) -> None:
    mask = np.array([[character == "#" for character in row] for row in rows])
    assert multipolygon(mask) == {"type": "MultiPolygon", "coordinates": polygons}


def test_large_and_noisy() -> None:
    """A hole in an island in a hole, and time that grows with the corners only."""
    noise = np.random.default_rng(0).random((200, 300)) < 0.6
    np.testing.assert_array_equal(fill(multipolygon(noise)["coordinates"], noise.shape), noise)
    nested = np.zeros((9, 9), bool)
    for depth in range(5):
        nested[depth : 9 - depth, depth : 9 - depth] = depth % 2 == 0
    assert [len(polygon) for polygon in multipolygon(nested)["coordinates"]] == [2, 2, 1]


def steps_of(mask: np.ndarray) -> tuple[int, int]:
    """The corners of a mask, and how many lines of ``sam.masks.polygons`` and calls to C were executed to find them."""
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal steps
        steps += event in ("line", "c_call")
        return count

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(count)
    sys.setprofile(count)
    try:
        polygons = multipolygon(mask)["coordinates"]
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return sum(len(ring) - 1 for polygon in polygons for ring in polygon), steps


def test_work_is_that_of_the_corners() -> None:
    """A checkerboard of 6,272 rings takes few more steps than a comb, which is one ring of about as many corners."""
    checkers = np.indices((112, 112)).sum(axis=0) % 2 == 1
    comb = np.zeros((192, 192), bool)
    comb[::3], comb[1::3, ::2], comb[:, 0] = True, True, True
    (corners, steps), (as_many, of_checkers) = steps_of(comb), steps_of(checkers)
    assert as_many == pytest.approx(corners, rel=0.1)
    assert of_checkers < 2 * steps
