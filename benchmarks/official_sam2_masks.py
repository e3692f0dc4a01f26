"""What Meta's SAM 2 finds in an image by automatic masks, with weights that hide nothing, written down for the tests.

    python -m benchmarks.official_sam2_masks --sam2 PATH [--run NAME ...]

PATH is the folder from which ``import sam2`` works; see :mod:`benchmarks.official_sam2`. Other runs than those that are
named stay as they were written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from .official_sam2 import SIZE, official_model, random_sam2
from .official_sam2_prompts import photograph

TARGET = Path(__file__).parents[1] / "tests" / "official_sam2_masks.json"
VARIANT = "sam2.1_tiny"
# Low, so that there are masks; what overlaps stays, as an order among equals is nobody's.
_LOW = {"points_per_side": 5, "pred_iou_thresh": 0.35, "stability_score_thresh": 0.3}
_LOW |= {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
RUNS: dict[str, dict[str, Any]] = {
    "defaults": _LOW,
    "refined": _LOW | {"use_m2m": True},
    "single": _LOW | {"multimask_output": False, "points_per_side": 8},
    "refined single": _LOW | {"multimask_output": False, "use_m2m": True, "points_per_side": 8},
    "threshold": _LOW | {"mask_threshold": 0.7, "stability_score_offset": 0.5},
    "suppressed": _LOW | {"box_nms_thresh": 0.999, "points_per_side": 14, "pred_iou_thresh": 0.2},
    # Masks of few pixels: others are cut off by the edges of their crops.
    "crops": _LOW | {"crop_n_layers": 1, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.0, "mask_threshold": 5.0},
}
_ENLARGED = ("suppressed", "crops")
KEYS = ("area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box")


def image_of(run: str) -> np.ndarray:
    """Return the photograph, enlarged where boxes have to differ and to keep clear of the edges of crops."""
    image = photograph()
    return image.repeat(3, axis=0).repeat(3, axis=1) if run in _ENLARGED else image


def summary(record: dict[str, Any]) -> list[float]:
    """Return the numbers of a record: area, box, IoU, click, stability, crop."""
    ((x, y),) = record["point_coords"]
    numbers = [record["area"], *record["bbox"], record["predicted_iou"], x, y]
    return [float(f"{value:.7g}") for value in (*numbers, record["stability_score"], *record["crop_box"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", required=True, metavar="PATH", help="folder from which import sam2 works")
    parser.add_argument("--run", action="append", choices=RUNS, help="(default: all); may be repeated")
    args = parser.parse_args()
    model: Any = official_model(args.sam2, VARIANT)
    model.load_state_dict(random_sam2(VARIANT).state_dict())
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    figures = json.loads(TARGET.read_text()) if args.run else {}
    for name in args.run or RUNS:
        generator = SAM2AutomaticMaskGenerator(model, **RUNS[name])
        generator.predictor._bb_feat_sizes = [(SIZE // 4,) * 2, (SIZE // 8,) * 2, (SIZE // 16,) * 2]  # not of 1024 px
        figures[name] = [summary(record) for record in generator.generate(image_of(name))]
        print(name, len(figures[name]))
    TARGET.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
