"""Automatic masks: the official recipe, written out plainly here, gives the same records."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coins
import numpy as np
import pytest
import torch
from models import random_image
from pycocotools import mask as coco

import sam
from fastsam_kernels import nms
from sam import Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.amg.memory_plan import MemoryPlan, parse_bytes

Generator = Callable[..., SamAutomaticMaskGenerator]
# What the embedded model thinks of its masks, at the small size of these tests, is lower still.
LENIENT = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.6}


@pytest.fixture(scope="module")
def small() -> Sam:
    """The embedded model for images of 256 px, with a quarter of the tokens."""
    return sam.load_model(device="cpu", image_size=256).requires_grad_(False)


@pytest.fixture(scope="module")
def generator(small: Sam) -> Generator:
    def make(points_per_side: int | None = 8, **arguments: Any) -> SamAutomaticMaskGenerator:
        return SamAutomaticMaskGenerator(small, points_per_side, **{**LENIENT, **arguments})

    return make


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Fifteen coins or so, 200x240."""
    return coins.photograph()[:200, :240]


def by_the_recipe(model: Sam, image: np.ndarray, side: int) -> list[dict[str, Any]]:
    """Every click by itself through the predictor, every mask at full size; no crops."""
    height, width = image.shape[:2]
    predictor = SamPredictor(model)
    predictor.set_image(image)
    result = []
    for row in range(side):
        for column in range(side):
            click = [(2 * column + 1) / (2 * side) * width, (2 * row + 1) / (2 * side) * height]
            for logits, iou, _ in zip(
                *predictor.predict(np.array([click]), np.array([1]), return_logits=True), strict=True
            ):
                stability = (logits > 1).sum() / max((logits > -1).sum(), 1)
                if iou > LENIENT["pred_iou_thresh"] and stability >= LENIENT["stability_score_thresh"]:
                    ys, xs = np.nonzero(logits > 0)
                    box = [xs.min(), ys.min(), xs.max(), ys.max()]
                    result.append({"mask": logits > 0, "iou": iou, "stability": stability, "box": box, "click": click})
    boxes = torch.tensor([record["box"] for record in result], dtype=torch.float32)
    keep = nms(boxes, torch.tensor([record["iou"] for record in result]), 0.7)
    return [result[index] for index in keep.tolist()]


def test_records(small: Sam, generator: Generator, photograph: np.ndarray) -> None:
    records = generator(points_per_batch=10).generate(photograph)
    expected = by_the_recipe(small, photograph, 8)
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
        assert record["crop_box"] == [0, 0, 240, 200]


def test_prompts_without_a_confident_mask_are_not_upscaled(
    small: Sam, generator: Generator, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaled: list[int] = []
    decode_masks = small.decode_masks

    def counted(decoded: Any, multimask_output: bool, rows: torch.Tensor) -> torch.Tensor:
        upscaled.append(len(rows))
        return decode_masks(decoded, multimask_output, rows)

    monkeypatch.setattr(small, "decode_masks", counted)
    threshold = LENIENT["pred_iou_thresh"]
    records = everything(generator, photograph)
    confident = {tuple(r["point_coords"][0]) for r in records if r["predicted_iou"] > threshold}
    upscaled.clear()
    assert generator().generate(photograph)
    assert sum(upscaled) == len(confident) < 64


def everything(generator: Generator, image: np.ndarray) -> list[dict[str, Any]]:
    """All masks of all clicks."""
    return generator(pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1.0).generate(image)


def test_thresholds_of_nothing_and_of_everything(generator: Generator, photograph: np.ndarray) -> None:
    assert len(everything(generator, photograph)) > 150
    assert generator(pred_iou_thresh=1.0).generate(photograph) == []
    assert generator(stability_score_thresh=1.0, stability_score_offset=5.0).generate(photograph) == []
    assert len(generator(box_nms_thresh=0.0).generate(photograph)) < len(generator().generate(photograph))


def test_output_modes_say_the_same(generator: Generator, photograph: np.ndarray) -> None:
    binary, uncompressed, compressed = (
        generator(output_mode=mode).generate(photograph) for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
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


def test_crops(generator: Generator, photograph: np.ndarray) -> None:
    with_crops = generator(6, crop_n_layers=1, crop_n_points_downscale_factor=2)
    assert [len(grid) for grid in with_crops.point_grids] == [36, 9]
    records = with_crops.generate(photograph)
    crops = {tuple(record["crop_box"]) for record in records}
    assert (0, 0, 240, 200) in crops
    assert len(crops) > 1
    for record in records:
        x, y, width, height = record["crop_box"]
        (click,) = record["point_coords"]
        assert x <= click[0] <= x + width
        assert y <= click[1] <= y + height
        ys, xs = np.nonzero(record["segmentation"])
        assert record["segmentation"].shape == (200, 240)
        assert xs.min() >= x
        assert xs.max() < x + width
        assert ys.min() >= y
        assert ys.max() < y + height


def test_small_regions_are_cleaned(generator: Generator, photograph: np.ndarray) -> None:
    from scipy import ndimage

    def regions(records: list[dict[str, Any]]) -> list[int]:
        """Sizes of all regions but the largest, of masks and of what is around them."""
        sizes: list[int] = []
        for record in records:
            for part in (record["segmentation"], ~record["segmentation"]):
                labels, _ = ndimage.label(part, structure=np.ones((3, 3)))
                sizes += sorted(np.bincount(labels.ravel())[1:])[:-1]
        return sizes

    assert min(regions(generator().generate(photograph))) < 20
    assert min(regions(generator(min_mask_region_area=20).generate(photograph)), default=20) >= 20


def test_many_images_of_mixed_sizes(generator: Generator, photograph: np.ndarray) -> None:
    images = [photograph, photograph[:90], photograph[:, :70]]
    calls: list[tuple[int, int]] = []
    several = generator(6, progress=lambda *call: calls.append(call), output_mode="coco_rle")
    assert several.generate_batch(images) == [several.generate(image) for image in images]
    assert calls[2] == (108, 108)
    assert calls[-1] == (36, 36)
    assert several.generate_batch([]) == []
    with pytest.raises(ValueError, match=r"image 1: a floating-point image must lie in 0\.\.1"):
        several.generate_batch([photograph, photograph / 1.0])


def test_a_bar_on_request(generator: Generator, photograph: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    generator(2).generate(photograph)
    assert capsys.readouterr().err == ""
    generator(2, progress=True).generate(photograph)
    assert "clicks" in capsys.readouterr().err


def test_in_steps_from_an_embedding(small: Sam, generator: Generator, photograph: np.ndarray) -> None:
    automatic = generator(6, points_per_batch=10, output_mode="coco_rle")
    for subject in (photograph, small.encode(photograph)):
        steps = automatic.steps(subject)
        assert [next(steps) for _ in range(4)] == [10, 10, 10, 6]
        with pytest.raises(StopIteration) as stop:
            next(steps)
        assert stop.value.value == automatic.generate(photograph)
    with pytest.raises(ValueError, match="crop_n_layers=1 needs the image"):
        generator(6, crop_n_layers=1).steps(small.encode(photograph))


def test_nothing_to_find(generator: Generator, photograph: np.ndarray) -> None:
    for crop_n_layers in (0, 1):
        nothing = generator(4, pred_iou_thresh=1.5, crop_n_layers=crop_n_layers, min_mask_region_area=10)
        assert nothing.generate(photograph) == []
    assert generator(None, point_grids=[np.zeros((0, 2))]).generate(photograph) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 300), (300, 1)])
def test_images_smaller_than_the_grid(generator: Generator, size: tuple[int, int]) -> None:
    everything = {"pred_iou_thresh": 0, "stability_score_thresh": 0}
    black, noise = np.zeros((*size, 3), np.uint8), random_image(*size)
    for image, arguments in ((black, everything), (noise, {}), (noise, {**everything, "crop_n_layers": 1})):
        for record in generator(3, **arguments).generate(image):
            assert record["segmentation"].shape == size
            assert record["area"] == record["segmentation"].sum()


def test_point_grids_and_errors(small: Sam, generator: Generator, photograph: np.ndarray) -> None:
    grid = np.array([[44 / 240, 54 / 200]])
    records = generator(None, point_grids=[grid]).generate(photograph)
    assert records
    assert records[0]["point_coords"] == [pytest.approx([44, 54])]
    in_rle = {"output_mode": "coco_rle"}
    as_lists = generator(None, point_grids=[grid.tolist()], **in_rle).generate(photograph)
    assert as_lists == generator(None, point_grids=[grid], **in_rle).generate(photograph)
    with pytest.raises(ValueError, match="exactly one of points_per_side and point_grids"):
        generator(32, point_grids=[grid])
    with pytest.raises(ValueError, match="exactly one of points_per_side and point_grids"):
        generator(None)
    with pytest.raises(ValueError, match=r"output_mode must be one of binary_mask, .*, got 'png'"):
        generator(output_mode="png")
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        generator(4).generate(photograph / 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points_per_batch": -1}, "points_per_batch must be at least 1, got -1"),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1, got 0"),
        ({"points_per_side": 0}, "points_per_side must be at least 1, got 0"),
        ({"crop_n_layers": -1}, "crop_n_layers must be 0 to 30, got -1"),
        ({"crop_n_layers": 50}, "crop_n_layers must be 0 to 30, got 50"),
        ({"crop_n_layers": 10**9}, "crop_n_layers must be 0 to 30, got 1000000000"),
        ({"points_per_batch": np.nan}, "points_per_batch must be at least 1, got nan"),
        ({"pred_iou_thresh": np.nan}, "pred_iou_thresh must be a number, got nan"),
        ({"stability_score_thresh": np.nan}, "stability_score_thresh must be a number, got nan"),
        ({"stability_score_offset": np.nan}, "stability_score_offset must be finite, got nan"),
        ({"stability_score_offset": np.inf}, "stability_score_offset must be finite, got inf"),
        ({"box_nms_thresh": np.inf}, "box_nms_thresh must be finite, got inf"),
        ({"box_nms_thresh": np.nan}, "box_nms_thresh must be finite, got nan"),
        ({"crop_nms_thresh": -np.inf}, "crop_nms_thresh must be finite, got -inf"),
        ({"crop_overlap_ratio": 5}, "crop_overlap_ratio must be 0 to 1, got 5"),
        ({"crop_overlap_ratio": -1}, "crop_overlap_ratio must be 0 to 1, got -1"),
        ({"crop_overlap_ratio": np.nan}, "crop_overlap_ratio must be 0 to 1, got nan"),
        ({"min_mask_region_area": -5}, "min_mask_region_area must be at least 0, got -5"),
        ({"min_mask_region_area": np.nan}, "min_mask_region_area must be at least 0, got nan"),
        ({"crop_n_points_downscale_factor": np.nan}, "crop_n_points_downscale_factor must be more than 0, got nan"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor must be more than 0, got 0"),
        ({"crop_n_layers": 2, "crop_n_points_downscale_factor": 3}, "a grid must have at least 1 point a side, got 0"),
        ({"points_per_side": None, "point_grids": [[0.5, 0.5]]}, r"each of point_grids must be \[N, 2\], got \[2\]"),
        ({"points_per_side": None, "point_grids": [[[0.5, np.nan]]]}, "point_grids must be finite, got nan"),
        (
            {"points_per_side": None, "point_grids": [[[0.5, 0.5]]], "crop_n_layers": 1},
            "crop_n_layers=1 needs 2 point_grids, got 1",
        ),
    ],
)
def test_numbers_out_of_range(generator: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator(**arguments)


def test_layers_of_crops_without_a_pixel(generator: Generator) -> None:
    """An image has room for as many layers as halve its longer side to a pixel, and one in any case."""
    for (height, width), layers in (((1, 1), 1), ((1, 2), 1), ((3, 4), 2), ((1, 300), 8), ((255, 9), 7), ((2, 256), 8)):
        message = (
            f"^crop_n_layers must be at most {layers} for an image of {width}x{height}, got {layers + 1}: the crops of "
            "a further layer are smaller than a pixel$"
        )
        with pytest.raises(ValueError, match=message):
            generator(1, crop_n_layers=layers + 1).generate(np.zeros((height, width, 3), np.uint8))
    assert generator(1, crop_n_layers=2, pred_iou_thresh=1.5).generate(np.zeros((3, 4, 3), np.uint8)) == []


def test_a_thin_image_is_named_before_any_is_encoded(
    small: Sam, generator: Generator, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "image_features", lambda pixels: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=r"image 1: an image of 1x600 .* has a side of 0 px"):
        generator(2).generate_batch([photograph, random_image(1, 600)])
    with pytest.raises(ValueError, match="an image of 1x600"):
        generator(2).steps(random_image(1, 600))


def test_crops_that_vanish_when_resized_are_left_out(generator: Generator) -> None:
    """At the edge of this image the second layer has crops of 1 x 600."""
    image = random_image(5, 2400)
    records = generator(2, crop_n_layers=2, pred_iou_thresh=0, stability_score_thresh=0).generate(image)
    assert all(record["segmentation"].shape == (5, 2400) for record in records)


def test_little_memory_changes_nothing(generator: Generator, photograph: np.ndarray) -> None:
    """Few clicks and masks at a time, and logits that cannot wait for the suppression: the same records."""
    free = generator(output_mode="coco_rle").generate(photograph)
    calls: list[tuple[int, int]] = []
    little = generator(output_mode="coco_rle", max_memory="75 MB", progress=lambda *call: calls.append(call))
    records = little.generate(photograph)
    assert calls == [(done, 64) for done in range(1, 65)]  # one by one
    assert len(free) == len(records) > 3
    for one, other in zip(free, records, strict=True):
        assert one["point_coords"] == other["point_coords"]
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert one["area"] == pytest.approx(other["area"], abs=2)


def test_masks_may_be_counted_late(
    generator: Generator, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the masks that go stay in place until the suppression."""
    automatic = generator(4, crop_n_layers=1, output_mode="coco_rle")
    expected = automatic.generate(photograph)
    plan = MemoryPlan.plan

    def late(*arguments: Any) -> MemoryPlan:
        return replace(plan(*arguments), count_early=False)

    monkeypatch.setattr(MemoryPlan, "plan", late)
    assert automatic.generate(photograph) == expected


def test_too_little_memory_is_said(small: Sam, generator: Generator, photograph: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"max_memory of 10 MB is too little for masks of 200x240 .* at least \d+ MB"):
        generator(4, max_memory=10_000_000).generate(photograph)
    for size, message in (("2 gallons", "got '2 gallons'"), (0, "must be more than 0 bytes, got 0")):
        with pytest.raises(ValueError, match=message):
            generator(4, max_memory=size)


def test_plans_follow_the_memory(nano: Sam) -> None:
    def plan(max_memory: str | None, size: tuple[int, int] = (1024, 1024)) -> MemoryPlan:
        return MemoryPlan.plan(nano, size, 64, max_memory and parse_bytes(max_memory))

    assert plan(None).points_at_once == plan("2GB").points_at_once == 64
    assert plan("200MB").points_at_once < 64
    assert plan("200MB").held_bytes < plan("1.5GiB").held_bytes
    assert plan("200MB", (3000, 3000)).masks_at_once < plan("200MB").masks_at_once
    assert plan(None, (60000, 60000)).masks_at_once == 1
    assert parse_bytes("1.5 KiB") == 1536


def test_resizing_on_the_device(generator: Generator, photograph: np.ndarray) -> None:
    """A level of 8 bits moves no mask by much."""
    exact, fast = (generator(resize_on_device=choice).generate(photograph) for choice in (False, True))
    assert len(exact) > 5
    matched = [
        max(coins.iou(record["segmentation"], other["segmentation"]) for other in fast) > 0.9 for record in exact
    ]
    assert np.mean(matched) > 0.9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_memory_is_kept_within() -> None:
    """In a process of its own, with the encoder and the libraries that load: the most that was resident."""
    script = """
import sys, numpy as np, torch, sam
from benchmarks.generate import resident_growth
torch.set_num_threads(2)
model = sam.load_model(device="cpu").requires_grad_(False)
image = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
generator = sam.SamAutomaticMaskGenerator(
    model, 16, pred_iou_thresh=0.2, stability_score_thresh=0.1, output_mode="coco_rle", max_memory=sys.argv[1]
)
print(resident_growth(lambda: generator.generate(image)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    for size in (200, 400):
        command = [sys.executable, "-c", script, f"{size}MB"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert int(done.stdout) <= 1.2e6 * size
        print(f"\n{size} MB: {int(done.stdout) / 1e6:.0f} MB")
