"""Automatic masks: the official recipe, written out plainly here, gives the same records."""

from __future__ import annotations

from typing import Any

import coins
import numpy as np
import pytest
import torch
from models import random_image
from pycocotools import mask as coco

from fastsam_kernels import nms
from sam import Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.memory import MaskMemory, parse_bytes

# The embedded model's own idea of its masks is low: these thresholds suit it.
SUITED = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.8}


def by_the_recipe(model: Sam, image: np.ndarray, side: int) -> list[dict[str, Any]]:
    """Every click by itself through the predictor, every mask at full size; no crops."""
    height, width = image.shape[:2]
    predictor = SamPredictor(model)
    predictor.set_image(image)
    found = []
    for row in range(side):
        for column in range(side):
            click = [(2 * column + 1) / (2 * side) * width, (2 * row + 1) / (2 * side) * height]
            for logits, iou, _ in zip(
                *predictor.predict(np.array([click]), np.array([1]), return_logits=True), strict=True
            ):
                stability = (logits > 1).sum() / max((logits > -1).sum(), 1)
                if iou > SUITED["pred_iou_thresh"] and stability >= SUITED["stability_score_thresh"]:
                    ys, xs = np.nonzero(logits > 0)
                    box = [xs.min(), ys.min(), xs.max(), ys.max()]
                    found.append({"mask": logits > 0, "iou": iou, "stability": stability, "box": box, "click": click})
    boxes = torch.tensor([record["box"] for record in found], dtype=torch.float32)
    keep = nms(boxes, torch.tensor([record["iou"] for record in found]), 0.7)
    return [found[index] for index in keep.tolist()]


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return coins.photograph()


def test_records(nano: Sam, photograph: np.ndarray) -> None:
    records = SamAutomaticMaskGenerator(nano, points_per_side=8, points_per_batch=10, **SUITED).generate(photograph)
    expected = by_the_recipe(nano, photograph, 8)
    assert len(records) == len(expected) > 5
    for record, truth in zip(records, expected, strict=True):
        assert list(record) == [
            "segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box",
        ]  # fmt: skip
        assert record["point_coords"] == [pytest.approx(truth["click"])]
        assert record["predicted_iou"] == pytest.approx(truth["iou"], abs=1e-5)
        # A pixel whose logit is within rounding of the threshold may fall either way.
        assert (record["segmentation"] != truth["mask"]).sum() <= 2
        assert record["area"] == record["segmentation"].sum()
        x0, y0, x1, y1 = truth["box"]
        assert record["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1)
        assert record["stability_score"] == pytest.approx(truth["stability"], abs=1e-3)
        assert record["crop_box"] == [0, 0, 384, 303]


def test_output_modes_say_the_same(nano: Sam, photograph: np.ndarray) -> None:
    binary, uncompressed, compressed = (
        SamAutomaticMaskGenerator(nano, 6, output_mode=mode, **SUITED).generate(photograph)
        for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
    )
    assert binary
    for mask, runs, string in zip(binary, uncompressed, compressed, strict=True):
        assert mask["segmentation"].dtype == bool
        np.testing.assert_array_equal(coco.decode(string["segmentation"]).astype(bool), mask["segmentation"])
        height, width = runs["segmentation"]["size"]
        as_coco = coco.frPyObjects(runs["segmentation"], height, width)
        assert as_coco["counts"].decode() == string["segmentation"]["counts"]
        for key in ("area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box"):
            assert mask[key] == runs[key] == string[key]


def test_crops(nano: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(nano, 6, crop_n_layers=1, crop_n_points_downscale_factor=2, **SUITED)
    assert [len(grid) for grid in generator.point_grids] == [36, 9]
    records = generator.generate(photograph)
    crops = {tuple(record["crop_box"]) for record in records}
    assert (0, 0, 384, 303) in crops
    assert len(crops) > 1
    for record in records:
        x, y, width, height = record["crop_box"]
        (click,) = record["point_coords"]
        assert x <= click[0] <= x + width
        assert y <= click[1] <= y + height
        ys, xs = np.nonzero(record["segmentation"])
        assert record["segmentation"].shape == (303, 384)
        assert xs.min() >= x
        assert xs.max() < x + width
        assert ys.min() >= y
        assert ys.max() < y + height


def test_small_regions_are_cleaned(nano: Sam, photograph: np.ndarray) -> None:
    from scipy import ndimage

    records = SamAutomaticMaskGenerator(nano, 8, min_mask_region_area=100, **SUITED).generate(photograph)
    assert records
    for record in records:
        for part in (record["segmentation"], ~record["segmentation"]):
            labels, count = ndimage.label(part, structure=np.ones((3, 3)))
            sizes = np.bincount(labels.ravel())[1:]
            assert count == 1 or sizes.min() >= 100


def test_nothing_to_find(nano: Sam, photograph: np.ndarray) -> None:
    for crop_n_layers in (0, 1):
        generator = SamAutomaticMaskGenerator(
            nano, 4, pred_iou_thresh=1.5, crop_n_layers=crop_n_layers, min_mask_region_area=10
        )
        assert generator.generate(photograph) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 300), (300, 1)])
def test_images_smaller_than_the_grid(nano: Sam, size: tuple[int, int]) -> None:
    generator = SamAutomaticMaskGenerator(nano, 4, pred_iou_thresh=0, stability_score_thresh=0)
    for image in (random_image(*size), np.zeros((*size, 3), np.uint8)):
        for record in generator.generate(image):
            assert record["segmentation"].shape == size


def test_point_grids_and_errors(nano: Sam, photograph: np.ndarray) -> None:
    grid = np.array([[44 / 384, 54 / 303]])
    records = SamAutomaticMaskGenerator(nano, None, point_grids=[grid], **SUITED).generate(photograph)
    assert records
    assert records[0]["point_coords"] == [pytest.approx([44, 54])]
    with pytest.raises(ValueError, match="exactly one of points_per_side and point_grids"):
        SamAutomaticMaskGenerator(nano, 32, point_grids=[grid])
    with pytest.raises(ValueError, match="exactly one of points_per_side and point_grids"):
        SamAutomaticMaskGenerator(nano, None)
    with pytest.raises(ValueError, match=r"output_mode must be one of binary_mask, .*, got 'png'"):
        SamAutomaticMaskGenerator(nano, output_mode="png")
    with pytest.raises(ValueError, match="must be uint8"):
        SamAutomaticMaskGenerator(nano, 4).generate(photograph / 255)


def test_little_memory_changes_nothing(nano: Sam, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few clicks and masks at a time, and logits that cannot wait for the suppression: the same records."""
    free = SamAutomaticMaskGenerator(nano, 5, output_mode="coco_rle", **SUITED).generate(photograph)
    batches: list[int] = []
    generator = SamAutomaticMaskGenerator(nano, 5, output_mode="coco_rle", max_memory="115 MB", **SUITED)
    process_batch = generator._process_batch

    def watched(points: np.ndarray, *arguments: Any) -> Any:
        batches.append(len(points))
        return process_batch(points, *arguments)

    monkeypatch.setattr(generator, "_process_batch", watched)
    little = generator.generate(photograph)
    assert sum(batches) == 25
    assert max(batches) == 1
    assert len(free) == len(little) > 3
    for one, other in zip(free, little, strict=True):
        assert one["point_coords"] == other["point_coords"]
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert one["area"] == pytest.approx(other["area"], abs=2)


def test_too_little_memory_is_said(nano: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(nano, 4, max_memory=10_000_000)
    with pytest.raises(ValueError, match=r"max_memory of 10 MB is too little for masks of 303x384 .* at least \d+ MB"):
        generator.generate(photograph)
    for size, message in (("2 gallons", "got '2 gallons'"), (0, "must be more than 0 bytes, got 0")):
        with pytest.raises(ValueError, match=message):
            SamAutomaticMaskGenerator(nano, 4, max_memory=size)


def test_plans_follow_the_memory(nano: Sam) -> None:
    def plan(max_memory: str | None, size: tuple[int, int] = (1024, 1024)) -> MaskMemory:
        return MaskMemory.plan(nano, size, 64, max_memory and parse_bytes(max_memory))

    assert plan(None).points_at_once == plan("2GB").points_at_once == 64
    assert plan("200MB").points_at_once < 64
    assert plan("200MB").held_bytes < plan("1.5GiB").held_bytes
    assert plan("200MB", (3000, 3000)).masks_at_once < plan("200MB").masks_at_once
    assert plan(None, (60000, 60000)).masks_at_once == 1
    assert parse_bytes("1.5 KiB") == 1536
