"""Automatic masks of Meta's package with the embedded weights, written down for the tests.

    python -m benchmarks.official_masks --segment-anything PATH

PATH is the folder from which ``import segment_anything`` works. A record is kept as its numbers and a hash of its
COCO string, which is enough to tell one pixel's difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import sam
from sam import rle

from .peers import import_segment_anything, official_copy

TARGET = Path(__file__).parents[1] / "tests" / "official_automatic_masks.json"
# The embedded model rates its masks low: with SAM's own thresholds, "default", next to nothing is left.
SUITED = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.8}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "suited": {**SUITED},
    "crops": {**SUITED, "points_per_side": 12, "crop_n_layers": 1, "output_mode": "coco_rle"},
    "small regions": {
        **SUITED,
        "points_per_side": 16,
        "min_mask_region_area": 100,
        "output_mode": "uncompressed_rle",
    },
}


def photographs() -> dict[str, np.ndarray]:
    """Three that come with scikit-image, [H, W, 3] uint8."""
    from skimage import data

    coins = np.repeat(data.coins()[:, :, None], 3, axis=2)
    return {"coins": coins, "coffee": data.coffee(), "astronaut": data.astronaut()}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a record of any output mode."""
    return {
        "area": int(record["area"]),
        "bbox": [int(side) for side in record["bbox"]],
        "predicted_iou": round(record["predicted_iou"], 6),
        "stability_score": round(record["stability_score"], 6),
        "point": [round(x, 4) for x in record["point_coords"][0]],
        "crop_box": record["crop_box"],
        "hash": hashlib.md5(coco_string(record["segmentation"]).encode()).hexdigest()[:12],
    }


def coco_string(segmentation: Any) -> str:
    """The compressed counts of a segmentation of any output mode."""
    if isinstance(segmentation, np.ndarray):
        (segmentation,) = rle.encode(torch.from_numpy(np.ascontiguousarray(segmentation))[None])
    counts = segmentation["counts"]
    return counts if isinstance(counts, str) else rle.compress(counts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_masks", description=__doc__)
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    package = import_segment_anything(parser.parse_args().segment_anything)
    model = official_copy(package, sam.load_model(device="cpu"))
    jobs = [(name, image, what) for what in ARGUMENTS for name, image in photographs().items()]
    found = []
    for name, image, what in tqdm(jobs, desc="official masks"):
        records = package.SamAutomaticMaskGenerator(model, **ARGUMENTS[what]).generate(image)
        found.append(
            {"image": name, "what": what, "arguments": ARGUMENTS[what], "records": list(map(summary, records))}
        )
    lines = [
        json.dumps({**entry, "records": []})[:-2]
        + "".join(f"\n  {json.dumps(record)}," for record in entry["records"]).rstrip(",")
        + "]}"
        for entry in found
    ]
    TARGET.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
