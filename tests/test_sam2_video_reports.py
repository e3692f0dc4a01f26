"""What users of SAM 2 report on videos: each kind of report in more ways than one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_sam2_video import _without_bars, begin
from test_sam2_video_programs import BOX, built, predictor

from benchmarks.official_sam2_video import HEIGHT, WIDTH
from fastsam_kernels.numerics import relative_error
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor

__all__ = ["_without_bars", "built", "predictor"]


# Prompts ---------------------------------------------------------------------------------------------------------


POINTS: dict[str, dict[str, Any]] = {
    "tuples": {"points": ((30, 40), (100, 20)), "labels": (1, 0)},
    "wide arrays": {"points": np.array([[30.0, 40], [100, 20]]), "labels": np.array([1, 0], np.int64)},
    "tensors": {"points": torch.tensor([[30, 40], [100, 20]]), "labels": torch.tensor([True, False])},
    "a batch of one": {"points": np.array([[[30, 40], [100, 20]]], np.float32), "labels": np.array([[1, 0]])},
    "parts of the frame": {
        "points": [[30 / WIDTH, 40 / HEIGHT], [100 / WIDTH, 20 / HEIGHT]],
        "labels": [1, 0],
        "normalize_coords": False,
    },
}
BOXES: dict[str, dict[str, Any]] = {
    "an array of wide numbers": {"box": np.array([60.0, 40, 110, 80])},
    "a box in a list": {"box": [[60, 40, 110, 80]]},
    "corners": {"points": [[60, 40], [110, 80]], "labels": [2, 3]},
    "corners in an array": {"box": np.array([[60, 40], [110, 80]], np.float32)},
}


@pytest.mark.parametrize("form", [*POINTS, *BOXES])
def test_prompts_in_every_form(predictor: SAM2VideoPredictor, form: str) -> None:
    """Also by the name that the first release had."""
    plain = {"points": [[30, 40], [100, 20]], "labels": [1, 0]} if form in POINTS else BOX
    given = POINTS.get(form) or BOXES[form]
    state = begin(predictor)
    for obj_id, (name, prompt) in enumerate((("new_points_or_box", plain), ("new_points", given))):
        call = getattr(predictor, f"add_{name}")
        frame, ids, masks = call(inference_state=state, frame_idx=1, obj_id=obj_id, **prompt)
        assert (frame, ids) == (1, [*range(obj_id + 1)])
    assert relative_error(masks[1], masks[0]) < 1e-6
