"""Run-length encoding and the helpers of automatic masks, against pycocotools and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from fastsam_kernels import pack_masks
from sam.masks import rle, rle_encode
from sam.utils import amg

masks_strategy = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)).flatmap(
    lambda shape: arrays(bool, shape)
)


@settings(deadline=None)
@given(masks_strategy)
def test_encoding_equals_pycocotools(masks: np.ndarray) -> None:
    for mask, encoded in zip(masks, rle_encode.encode(torch.from_numpy(masks)), strict=True):
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle.compress(encoded["counts"]) == theirs["counts"].decode()
        assert rle.encode(mask) == encoded
        assert sum(encoded["counts"]) == mask.size
        assert rle.area(encoded) == mask.sum() == coco.area(theirs)
        for one in (encoded, theirs):
            assert rle.bounding_box(one) == coco.toBbox(theirs).tolist()
        np.testing.assert_array_equal(rle.decode(encoded), mask)
        np.testing.assert_array_equal(rle.decode({"size": encoded["size"], "counts": theirs["counts"]}), mask)
        np.testing.assert_array_equal(amg.rle_to_mask(encoded), mask)
        assert amg.coco_encode_rle(encoded) == {"size": list(mask.shape), "counts": theirs["counts"].decode()}


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30))
def test_strings_of_any_counts_round_trip(counts: list[int]) -> None:
    np.testing.assert_array_equal(rle.decompress(rle.compress(counts)), counts)


@pytest.mark.parametrize(
    ("counts", "box"),
    [
        ([12], [0, 0, 0, 0]),
        ([0, 12], [0, 0, 4, 3]),
        ([0, 1, 11], [0, 0, 1, 1]),
        ([11, 1], [3, 2, 1, 1]),
        ([2, 2, 8], [0, 0, 2, 3]),
        ([1, 1, 2, 2, 6], [0, 1, 2, 2]),
        ([1, 0, 3, 1, 7], [1, 1, 1, 1]),
    ],
)
def test_bounding_box(counts: list[int], box: list[int]) -> None:
    """In a mask of 3x4; an empty run counts for nothing."""
    assert rle.bounding_box({"size": [3, 4], "counts": counts}) == box


def test_words_that_come_in_one_copy() -> None:
    """A device is not asked how many words have an edge; those that do not fit come in a second copy."""
    changes = torch.zeros(500, dtype=torch.int32)
    changes[[3, 77, 300, 499]] = torch.tensor([1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    expected = rle_encode._nonzero_words(changes)
    assert expected.tolist() == [3 << 32 | 1, 77 << 32 | 2**32 - 1, 300 << 32 | 2**31 - 1, 499 << 32 | 2**31]
    for capacity in (0, 3, 4, 500):
        assert rle_encode._copy_nonzero_words(changes, capacity).equal(expected)


def test_a_large_noisy_mask() -> None:
    mask = torch.rand(1, 1500, 1100) < 0.5
    (encoded,) = amg.mask_to_rle_pytorch(mask)
    theirs = coco.encode(np.asfortranarray(mask[0].numpy().astype(np.uint8)))
    assert rle.compress(encoded["counts"]) == theirs["counts"].decode()


@pytest.mark.parametrize("counts", [[3, 4], [7, -1], [], [2**70], "zz", "0P"])
def test_bad_runs(counts: object) -> None:
    with pytest.raises(ValueError, match=r"must add up to 6|not a compressed RLE"):
        rle.decode({"size": [2, 3], "counts": counts})


@pytest.mark.parametrize("size", [(2, 3), (2**31, 2**31), (5 * 2**31, 2**31)])
def test_runs_that_add_up_beyond_64_bits(size: tuple[int, int]) -> None:
    """Wrapped around they could fit, and would be written past the end of the mask."""
    height, width = size
    rest = (height * width) % 2**62
    counts = [2**62] * 4 + [rest or 2**62]
    assert sum(counts) % 2**64 == height * width % 2**64
    for hostile in (counts, rle.compress(counts)):
        with pytest.raises(ValueError, match=f"an RLE of {height}x{width} must add up to {height * width}$"):
            rle.decode({"size": [height, width], "counts": hostile})


@settings(deadline=None)
@given(masks_strategy)
def test_boxes_of_masks(masks: np.ndarray) -> None:
    boxes = amg.batched_mask_to_box(torch.from_numpy(masks)).tolist()
    for mask, box in zip(masks, boxes, strict=True):
        ys, xs = np.nonzero(mask)
        assert box == ([xs.min(), ys.min(), xs.max(), ys.max()] if len(xs) else [0, 0, 0, 0])


def test_shapes_of_boxes() -> None:
    assert amg.batched_mask_to_box(torch.ones(5, 6, dtype=torch.bool)).tolist() == [0, 0, 5, 4]
    assert amg.batched_mask_to_box(torch.ones(2, 3, 5, 6, dtype=torch.bool)).shape == (2, 3, 4)
    assert amg.batched_mask_to_box(torch.ones(0, 5, 6, dtype=torch.bool)).shape == (0, 4)
    for make in (torch.tensor, np.array, list, tuple):
        box = make([3, 4, 10, 20])
        result = amg.box_xyxy_to_xywh(box)
        assert type(result) is type(box)
        assert list(result) == [3, 4, 7, 16]
        assert list(box) == [3, 4, 10, 20]
    several = [[[3, 4, 10, 20]], [[1, 2, 1, 3]]]
    for make in (torch.tensor, np.array):
        assert amg.box_xyxy_to_xywh(make(several)).tolist() == [[[3, 4, 7, 16]], [[1, 2, 0, 1]]]


def test_stability_score() -> None:
    logits = torch.tensor([[[-2.0, -0.5, 0.5, 2.0]], [[-2.0, -2.0, -2.0, 5.0]]])
    torch.testing.assert_close(amg.calculate_stability_score(logits, 0.0, 1.0), torch.tensor([1 / 3, 1.0]))


def test_point_grids_and_crops() -> None:
    assert amg.build_point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert [len(grid) for grid in amg.build_all_layer_point_grids(32, 2, 2)] == [1024, 256, 64]
    boxes, layers = amg.generate_crop_boxes((100, 200), 1, 512 / 1500)
    assert boxes == [[0, 0, 200, 100], [0, 0, 117, 67], [0, 33, 117, 100], [83, 0, 200, 67], [83, 33, 200, 100]]
    assert layers == [0, 1, 1, 1, 1]


def test_uncropping() -> None:
    crop = [10, 20, 40, 60]
    boxes = torch.tensor([[0, 5, 10, 15], [1, 2, 30, 40]])
    assert amg.uncrop_boxes_xyxy(boxes, crop).tolist() == [[10, 25, 20, 35], [11, 22, 40, 60]]
    assert amg.uncrop_points(torch.tensor([[1, 2]]), crop).tolist() == [[11, 22]]
    masks = amg.uncrop_masks(torch.ones(1, 40, 30), crop, 100, 50)
    assert masks.shape == (1, 100, 50)
    assert masks[0, 20:60, 10:40].sum() == masks.sum() == 1200
    near = amg.is_box_near_crop_edge(
        torch.tensor([[30, 30, 60, 60], [0, 30, 60, 60]]), [50, 0, 150, 100], [0, 0, 150, 100]
    )
    assert near.tolist() == [False, True]


@pytest.mark.parametrize("mode", ["holes", "islands"])
def test_small_regions(mode: str) -> None:
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[4, 4] = False  # a hole of one pixel
    mask[10, 10] = True  # an island of one pixel
    cleaned, changed = amg.remove_small_regions(mask, 2, mode)
    assert changed
    assert cleaned[4, 4] == (mode == "holes")
    assert cleaned[10, 10] == (mode == "holes")
    same, changed = amg.remove_small_regions(cleaned, 1, mode)
    assert not changed
    np.testing.assert_array_equal(same, cleaned)


def test_the_largest_island_stays() -> None:
    mask = np.zeros((5, 9), bool)
    mask[0, :2], mask[3, :3], mask[0, 8] = True, True, True
    cleaned, changed = amg.remove_small_regions(mask, 100, "islands")
    assert changed
    assert cleaned.sum() == 3
    assert cleaned[3, :3].all()
    with pytest.raises(ValueError, match="mode must be 'holes' or 'islands', got 'specks'"):
        amg.remove_small_regions(mask, 1, "specks")


def test_mask_data() -> None:
    data = amg.MaskData(a=torch.arange(4), b=[1, 2, 3, 4], c=np.arange(4))
    data.filter(torch.tensor([True, False, True, False]))
    assert (data["a"].tolist(), data["b"], data["c"].tolist()) == ([0, 2], [1, 3], [0, 2])
    data.filter(torch.tensor([1, 0]))
    assert (data["a"].tolist(), data["b"], data["c"].tolist()) == ([2, 0], [3, 1], [2, 0])
    data.cat(amg.MaskData(a=torch.tensor([7]), b=[7], c=np.array([7]), d=[9]))
    assert (data["a"].tolist(), data["b"], data["c"].tolist(), data["d"]) == ([2, 0, 7], [3, 1, 7], [2, 0, 7], [9])
    data.to_numpy()
    assert isinstance(data["a"], np.ndarray)
    del data["d"]
    assert [key for key, _ in data.items()] == ["a", "b", "c"]
    with pytest.raises(TypeError, match="'x' is a int"):
        data["x"] = 5


def test_batches() -> None:
    assert list(amg.batch_iterator(2, [1, 2, 3], "abc")) == [[[1, 2], "ab"], [[3], "c"]]
    with pytest.raises(ValueError, match=r"inputs of one length, got \[3, 2\]"):
        list(amg.batch_iterator(2, [1, 2, 3], [1, 2]))


@settings(deadline=None)
@given(
    st.integers(0, 2), st.integers(1, 70), st.integers(1, 9), st.tuples(*[st.integers(0, 3)] * 4), st.integers(0, 999)
)
def test_packed_masks_of_crops_equal_pycocotools(
    count: int, height: int, width: int, border: tuple[int, ...], seed: int
) -> None:
    """Words that do and do not end with a column, crops that do and do not touch the image's edges."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, height, width)) < rng.choice([0.0, 0.05, 0.5, 0.95, 1.0])
    left, top, right, bottom = border
    full = np.pad(masks, ((0, 0), (top, bottom), (left, right)))
    size = (full.shape[1], full.shape[2])
    encoded = rle_encode.encode_packed(pack_masks(torch.from_numpy(masks)), (height, width), (left, top), size)
    strings = rle.compress_all([mask["counts"] for mask in encoded])
    assert len(encoded) == len(strings) == count
    for mask, runs, string in zip(full, encoded, strings, strict=True):
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert theirs == {"size": runs["size"], "counts": string.encode()}
