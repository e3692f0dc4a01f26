"""``SAM2AutomaticMaskGenerator``: the official records, by the pipeline and by the loop that programs change."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models import SMALL_2, TINY_2, random_image, random_model, randomise

import sam
from benchmarks.official_sam2 import random_sam2
from benchmarks.official_sam2_masks import KEYS, RUNS, VARIANT, image_of, summary
from sam import SamAutomaticMaskGenerator
from sam.amg.defaults import NANO_THRESHOLDS
from sam.amg.memory_plan import Demands, MemoryPlan
from sam.inference.decode import shared_image
from sam.inference.low_rank_decoder import CLICKS_AT_ONCE
from sam.masks import rle
from sam.sam2 import automatic_mask_generator
from sam.sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

OFFICIAL = json.loads((Path(__file__).parent / "official_sam2_masks.json").read_text())
IMAGE = random_image(40, 70)
ALL = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@pytest.fixture(scope="module")
def official_weights() -> sam.SAM2Base:
    return random_sam2(VARIANT)


@pytest.fixture(scope="module")
def small() -> sam.SAM2Base:
    model = sam.build_from_config(SMALL_2)
    randomise(model)
    return model.requires_grad_(False)


def matched(records: list[list[float]], others: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """Pair records one to one: of one click in one crop by their predicted IoU."""

    def place(record: list[float]) -> tuple[float, ...]:
        return (*record[9:], *(round(x, 3) for x in record[6:8]), record[5])

    assert len(records) == len(others)
    return list(zip(sorted(records, key=place), sorted(others, key=place), strict=True))


def assert_alike(records: list[dict[str, Any]], others: list[dict[str, Any]], pixels: int = 3) -> None:
    """Hold records against others up to pixels whose logits are at the threshold."""
    for ours, theirs in matched([*map(summary, records)], [*map(summary, others)]):
        assert_same_record(ours, theirs, pixels)


def assert_same_record(ours: list[float], theirs: list[float], pixels: int = 3) -> None:
    assert abs(ours[0] - theirs[0]) <= pixels, KEYS
    assert ours[1:5] == theirs[1:5]
    assert ours[5:8] == pytest.approx(theirs[5:8], rel=1e-3)
    assert ours[8] == pytest.approx(theirs[8], abs=1e-5 + pixels / max(theirs[0], 1), nan_ok=True)
    assert ours[9:] == theirs[9:]


# One of a kind in every run of the suite.
QUICK = ("defaults", "refined", "crops")


@pytest.mark.parametrize("run", [run if run in QUICK else pytest.param(run, marks=pytest.mark.slow) for run in RUNS])
def test_records_are_the_official_ones(official_weights: sam.SAM2Base, run: str) -> None:
    records = SAM2AutomaticMaskGenerator(official_weights, **RUNS[run]).generate(image_of(run))
    assert len(records) >= 50
    assert len({tuple(record["crop_box"]) for record in records}) == (5 if run == "crops" else 1)
    for ours, theirs in matched([*map(summary, records)], OFFICIAL[run]):
        assert_same_record(ours, theirs)
    for record in records[:3]:
        assert [*record] == [
            "segmentation",
            "area",
            "bbox",
            "predicted_iou",
            "point_coords",
            "stability_score",
            "crop_box",
        ]
        kinds = [type(record[name]) for name in ("area", "predicted_iou", "stability_score")]
        assert kinds == [int, float, float]
        assert {type(number) for name in ("bbox", "crop_box") for number in record[name]} == {float}
        assert record["segmentation"].sum() == record["area"]


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "refined": {"use_m2m": True},
    "single": {"multimask_output": False},
    "crops": {"crop_n_layers": 1, "crop_nms_thresh": 1.0, "points_per_side": 2},
    "cleaned": {"min_mask_region_area": 12},
    "cleaned and refined": {"min_mask_region_area": 12, "use_m2m": True, "points_per_side": 2},
    "threshold": {"mask_threshold": 1.5, "stability_score_thresh": 0.2, "pred_iou_thresh": 0.05},
    "suppressed": {"box_nms_thresh": 0.9},
}


class Unchanged(SAM2AutomaticMaskGenerator):
    """As a program's subclass: each method is there, and calls the official one."""

    def _process_batch(self, *args: Any, **options: Any) -> Any:
        return super()._process_batch(*args, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_pipeline_answers_as_the_official_loop(small: sam.SAM2Base, name: str) -> None:
    options = {**ALL, **OPTIONS[name]}
    expected = Unchanged(small, **options).generate(IMAGE)
    records = SAM2AutomaticMaskGenerator(small, **options).generate(IMAGE)
    assert len(expected) > 1
    assert_alike(records, expected)


def test_cleaning_is_in_pixels_of_the_low_resolution_logits(small: sam.SAM2Base) -> None:
    plain = SAM2AutomaticMaskGenerator(small, **ALL).generate(IMAGE)
    cleaned = SAM2AutomaticMaskGenerator(small, **ALL, min_mask_region_area=12).generate(IMAGE)
    assert len(plain) == len(cleaned)
    assert [record["area"] for record in plain] != [record["area"] for record in cleaned]


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_found_is_an_empty_list(small: sam.SAM2Base, layers: int) -> None:
    options = {"points_per_side": 2, "crop_n_layers": layers, "pred_iou_thresh": 1.0}
    assert SAM2AutomaticMaskGenerator(small, **options).generate(IMAGE) == []
    assert Unchanged(small, **options).generate(IMAGE) == []


@pytest.mark.parametrize("mode", ["coco_rle", "uncompressed_rle"])
def test_run_lengths(small: sam.SAM2Base, mode: str) -> None:
    expected = SAM2AutomaticMaskGenerator(small, **ALL).generate(IMAGE)
    for kind in (SAM2AutomaticMaskGenerator, Unchanged):
        records = kind(small, **ALL, output_mode=mode).generate(IMAGE)
        for record, plain in zip(records, expected, strict=True):
            assert (rle.decode(record["segmentation"]) != plain["segmentation"]).sum() <= 3


def test_what_a_program_overrides_is_called_as_officially(small: sam.SAM2Base) -> None:
    calls: list[tuple[str, Any]] = []

    class Noted(SAM2AutomaticMaskGenerator):
        def _generate_masks(self, image: np.ndarray) -> Any:
            calls.append(("_generate_masks", image.shape))
            return super()._generate_masks(image)

        def _process_crop(self, *args: Any, **options: Any) -> Any:
            data = super()._process_crop(*args, **options)
            calls.append(("_process_crop", (args[1:], options, sorted(name for name, _ in data.items()))))
            return data

        def _process_batch(
            self, points: Any, im_size: Any, crop_box: Any, orig_size: Any, normalize: bool = False
        ) -> Any:
            calls.append(("_process_batch", (points.shape, im_size, crop_box, orig_size, normalize)))
            return super()._process_batch(points, im_size, crop_box, orig_size, normalize)

    Noted(small, **ALL, points_per_batch=5).generate(IMAGE)
    columns = ["boxes", "crop_boxes", "iou_preds", "low_res_masks", "points", "rles", "stability_score"]
    size, box = (40, 70), [0, 0, 70, 40]
    assert calls == [
        ("_generate_masks", (40, 70, 3)),
        ("_process_batch", ((5, 2), size, box, size, True)),
        ("_process_batch", ((4, 2), size, box, size, True)),
        ("_process_crop", ((box, 0, size), {}, columns)),
    ]


def test_patched_predictors_and_functions_are_called(small: sam.SAM2Base) -> None:
    expected = SAM2AutomaticMaskGenerator(small, **ALL).generate(IMAGE)
    generator, seen = SAM2AutomaticMaskGenerator(small, **ALL), []
    predict: Callable[..., Any] = generator.predictor._predict

    def noted(*args: Any, **options: Any) -> Any:
        seen.append((len(args), sorted(options), list(args[0].shape)))
        return predict(*args, **options)

    generator.predictor._predict = noted  # type: ignore[method-assign]
    assert_alike(generator.generate(IMAGE), expected)
    assert seen == [(2, ["multimask_output", "return_logits"], [9, 1, 2])]
    few = {**ALL, "box_nms_thresh": 0.5}
    with mock.patch.object(automatic_mask_generator, "batched_nms", lambda boxes, *a: torch.arange(len(boxes))):
        assert len(SAM2AutomaticMaskGenerator(small, **few).generate(IMAGE)) == len(expected)
    assert len(SAM2AutomaticMaskGenerator(small, **few).generate(IMAGE)) < len(expected)
    hooked = copy.deepcopy(small)
    hooked.sam_mask_decoder.register_forward_hook(lambda module, arguments, output: seen.append(output[0].shape[0]))
    assert_alike(SAM2AutomaticMaskGenerator(hooked, **ALL).generate(IMAGE), expected)
    assert seen[1:] == [9]


def test_our_options_and_the_official_refusals(small: sam.SAM2Base) -> None:
    done: list[tuple[int, int]] = []
    generator = SAM2AutomaticMaskGenerator(
        small, **ALL, max_memory="1GB", progress=lambda *counts: done.append(counts), output_mode="uncompressed_rle"
    )
    batch = generator.generate_batch([IMAGE, IMAGE[:20]])
    assert done[-1] == (18, 18)
    assert [record["segmentation"]["size"] for records in batch for record in records[:1]] == [[40, 70], [20, 70]]
    with pytest.raises(TypeError, match=r"SAM2AutomaticMaskGenerator takes no 'typo'"):
        SAM2AutomaticMaskGenerator(small, typo=1)
    with pytest.raises(ValueError, match=r"exactly one of points_per_side and point_grids"):
        SAM2AutomaticMaskGenerator(small, None)
    with pytest.raises(ValueError, match=r"max_memory does not apply to the official loop"):
        Unchanged(small, **ALL, max_memory="1GB").generate(IMAGE)
    grid = {**ALL, "points_per_side": None, "point_grids": [np.array([[0.5, 0.5]])]}
    assert [r["point_coords"] for r in SAM2AutomaticMaskGenerator(small, **grid).generate(IMAGE)] == [[[35, 20]]] * 3


def test_our_generator_takes_a_sam2_model(small: sam.SAM2Base) -> None:
    expected = SAM2AutomaticMaskGenerator(small, **ALL).generate(IMAGE)
    records = SamAutomaticMaskGenerator(small, **ALL, max_memory="1GB").generate(IMAGE)
    assert_alike(records, expected)

    class Changed(SamAutomaticMaskGenerator):
        def _process_batch(self, *args: Any) -> Any:
            return super()._process_batch(*args)

    with pytest.raises(ValueError, match=r"the official loop of SAM takes no SAM 2 model.*_process_batch"):
        Changed(small, **ALL).generate(IMAGE)
    with pytest.raises(TypeError, match=r"SAM 2 model.*SAM2ImagePredictor"):
        sam.SamPredictor(small)  # type: ignore[arg-type]


def test_what_needs_memory_is_counted(official_weights: sam.SAM2Base) -> None:
    """Masks that are prompts again, regions that are removed, and the tables that all clicks share."""

    def clicks(size: int, **demands: Any) -> int:
        plan = MemoryPlan.plan(official_weights, (1024, 1024), 2000, size * 10**6, Demands(**demands))
        return plan.points_at_once

    assert 1 < clicks(140, asked_again=True) < clicks(140)
    assert 1 < clicks(140, cleans_logits=True) < clicks(140)
    assert 1 < clicks(140) < clicks(140, masks_per_click=1)
    shared = shared_image(official_weights, official_weights.encode(IMAGE))
    assert shared is not None
    assert 0 < clicks(80, low_rank=shared) < CLICKS_AT_ONCE < clicks(1000, low_rank=shared)
    for size, has_room in ((78, False), (80, True)):
        plan = MemoryPlan.plan(official_weights, (256, 256), 64, size * 10**6, Demands(low_rank=shared))
        assert (plan.low_rank is shared) == has_room
    without = MemoryPlan.plan(official_weights, (8000, 9000), 64, 3 * 10**9)
    assert without == MemoryPlan.plan(official_weights, (8000, 9000), 64, 3 * 10**9, Demands(cleans_masks=True))
    with pytest.raises(ValueError, match=r"max_memory of 2000 MB is too little .* at least 2368 MB"):
        MemoryPlan.plan(official_weights, (8000, 9000), 64, 2 * 10**9, Demands(cleans_masks=True))
    twice = {"points_per_side": 2, "use_m2m": True, "max_memory": "75MB"}
    assert SAM2AutomaticMaskGenerator(official_weights, **twice, multimask_output=False).generate(IMAGE) == []
    with pytest.raises(ValueError, match=r"max_memory of 75 MB is too little"):
        SAM2AutomaticMaskGenerator(official_weights, **twice).generate(IMAGE)


@pytest.mark.parametrize(
    ("options", "demands"),
    [
        ({}, Demands()),
        ({"use_m2m": True}, Demands(asked_again=True)),
        ({"multimask_output": False}, Demands(masks_per_click=1)),
        ({"min_mask_region_area": 5}, Demands(cleans_logits=True)),
    ],
)
def test_the_plan_knows_what_a_generator_does(
    small: sam.SAM2Base, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], demands: Demands
) -> None:
    seen: list[Demands] = []
    plan = MemoryPlan.plan
    monkeypatch.setattr(MemoryPlan, "plan", lambda *given: seen.append(given[-1]) or plan(*given))
    SAM2AutomaticMaskGenerator(small, 4, pred_iou_thresh=1.0, **options).generate(IMAGE)
    SamAutomaticMaskGenerator(small, 3, pred_iou_thresh=1.0, min_mask_region_area=5).generate(IMAGE)
    assert replace(seen[0], low_rank=None) == demands
    assert (seen[0].low_rank is not None) == (demands.masks_per_click == 3 and not demands.asked_again)
    assert seen[1] == Demands(cleans_masks=True)  # nine clicks are too few to share an image


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("side", "options", "size"),
    [(16, {}, 400), (12, {"min_mask_region_area": 20}, 400), (4, {"use_m2m": True}, 600)],
    ids=["clicks", "cleaned", "asked again"],
)
def test_the_memory_is_kept_within(side: int, options: dict[str, Any], size: int) -> None:
    """In a process of its own, with the encoder: the most that was resident."""
    script = f"""
import sys, numpy as np, torch
from benchmarks.generate import resident_growth
from benchmarks.official_sam2 import random_sam2
from sam.sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
torch.set_num_threads(1)
model = random_sam2("sam2.1_tiny", 1024)
image = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
generator = SAM2AutomaticMaskGenerator(
    model, {side}, 1024, pred_iou_thresh=0.6, stability_score_thresh=0.0, output_mode="coco_rle", **{options},
    max_memory=sys.argv[1],
)
print(resident_growth(lambda: generator.generate(image)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    command = [sys.executable, "-c", script, f"{size}MB"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    print(f"\n{size} MB: {int(done.stdout) / 1e6:.0f} MB")
    assert int(done.stdout) <= 1.2e6 * size


def test_boxes_of_several_groups_do_not_meet() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    scores = torch.tensor([0.5, 0.9, 0.7])
    same, apart = torch.zeros(3), torch.tensor([0, 1, 0])
    assert automatic_mask_generator.batched_nms(boxes, scores, same, 0.5).tolist() == [1, 2]
    assert automatic_mask_generator.batched_nms(boxes, scores, apart, iou_threshold=0.5).tolist() == [1, 2, 0]


def test_thresholds_that_nobody_says(nano: sam.Sam, tiny: sam.Sam) -> None:
    """SAM's are the official ones, whatever a variant is called; the embedded model and SAM 2 have their own."""

    def thresholds(model: Any, **given: float) -> tuple[float, float]:
        automatic = SamAutomaticMaskGenerator(model, 2, **given)
        return automatic.pred_iou_thresh, automatic.stability_score_thresh

    second = random_model(TINY_2)
    assert second.name == tiny.name == "custom"
    assert thresholds(tiny) == (0.88, 0.95)
    assert thresholds(second) == (0.8, 0.95)
    assert thresholds(nano) == (NANO_THRESHOLDS["pred_iou_thresh"], NANO_THRESHOLDS["stability_score_thresh"])
    assert thresholds(torch.compile(second)) == (0.8, 0.95)
    for model in (nano, tiny, second):
        assert thresholds(model, pred_iou_thresh=0.88) == (0.88, thresholds(model)[1])
        assert thresholds(model, pred_iou_thresh=0.0, stability_score_thresh=0.5) == (0.0, 0.5)
