"""Automatic masks against those of Meta's package with the same weights, which a script of ``benchmarks`` wrote down.

``pytest tests/test_official_masks.py -s`` prints the figures. A pixel may differ where its logit is within 1e-5 of
the largest from the threshold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.official_masks import coco_counts, photographs
from sam import Sam, SamAutomaticMaskGenerator, SamPredictor
from sam.amg.defaults import SAM_THRESHOLDS
from sam.masks import rle

OFFICIAL = json.loads((Path(__file__).parent / "official_automatic_masks.json").read_text())
FEW_CLICKS = "lenient, all at once"


def cases() -> list[Any]:
    """The rest takes minutes."""
    return [
        pytest.param(
            result,
            id=f"{result['what']}, {result['image']}",
            marks=() if result["what"] == FEW_CLICKS and result["image"] == "coins" else pytest.mark.slow,
        )
        for result in OFFICIAL["results"]
    ]


def mask_of(counts: str, size: tuple[int, int]) -> np.ndarray:
    return rle.decode({"size": size, "counts": counts})


def near_threshold(model: Sam, image: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    """[H, W] bool, pixels where a logit of the record's click is as good as at the threshold."""
    x, y, width, height = record["crop_box"]
    predictor = SamPredictor(model)
    predictor.set_image(image[y : y + height, x : x + width])
    click = np.array(record["point"]) - (x, y)
    logits, _, _ = predictor.predict(click[None], np.array([1]), return_logits=True)
    near = np.zeros(image.shape[:2], bool)
    near[y : y + height, x : x + width] = (np.abs(logits) <= 1e-5 * np.abs(logits).max()).any(axis=0)
    return near


def test_of_these_weights(nano: Sam) -> None:
    assert OFFICIAL["model_hash"] == nano.model_hash, "run python -m benchmarks.official_masks again"
    assert sum(len(result["records"]) for result in OFFICIAL["results"]) > 100


@pytest.mark.parametrize("result", cases())
def test_equal(nano: Sam, result: dict[str, Any]) -> None:
    image = photographs()[result["image"]]
    size = image.shape[:2]
    # The official defaults are those of SAM's weights; without them the embedded model's own would be taken.
    records = SamAutomaticMaskGenerator(nano, **{**SAM_THRESHOLDS, **result["arguments"]}).generate(image)
    assert len(records) == len(result["records"])
    differing = 0
    for ours, theirs in zip(records, result["records"], strict=True):  # in the same order: matched F1 is 1
        differs = mask_of(coco_counts(ours["segmentation"]), size) != mask_of(theirs["counts"], size)
        differing += int(differs.sum())
        if differs.any() and "min_mask_region_area" not in result["arguments"]:
            assert not (differs & ~near_threshold(nano, image, theirs)).any()
        assert abs(ours["area"] - theirs["area"]) <= differs.sum()
        assert ours["crop_box"] == theirs["crop_box"]
        assert ours["point_coords"][0] == pytest.approx(theirs["point"], abs=1e-4)
        assert ours["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=2e-5)
        assert ours["stability_score"] == pytest.approx(theirs["stability_score"], abs=2e-5 + 2 / theirs["area"])
        if not differs.any():
            assert ours["bbox"] == theirs["bbox"]
    print(f"\n{result['what']}, {result['image']}: {len(records)} records, {differing} pixels differ")
