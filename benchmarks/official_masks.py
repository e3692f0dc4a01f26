"""Automatic masks of Meta's package with the embedded weights, written down for the tests.

    python -m benchmarks.official_masks --segment-anything PATH [--only NAME ...]

PATH is the folder from which ``import segment_anything`` works. To be run again when the embedded weights change.
It takes a quarter of an hour; ``--only`` does what it names and keeps what is there of the same weights.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import sam
from sam.amg.defaults import NANO_THRESHOLDS
from sam.masks import rle, rle_encode

from .peers import import_segment_anything, official_copy

TARGET = Path(__file__).parents[1] / "tests" / "official_automatic_masks.json"
LENIENT = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.5}
ARGUMENTS: dict[str, dict[str, Any]] = {
    # SAM's own thresholds, with which the embedded model returns next to nothing; with crops, Meta's code raises then.
    "default": {},
    "small regions, default": {"min_mask_region_area": 100},
    "suited": {**NANO_THRESHOLDS, "output_mode": "coco_rle"},
    "masks": {**NANO_THRESHOLDS, "points_per_side": 16, "output_mode": "binary_mask"},
    "small regions": {
        **NANO_THRESHOLDS,
        "points_per_side": 16,
        "min_mask_region_area": 100,
        "output_mode": "uncompressed_rle",
    },
    # So low that every photograph has many.
    "lenient": {**LENIENT, "points_per_side": 12},
    "lenient, all at once": {**LENIENT, "points_per_side": 6, "crop_n_layers": 1, "min_mask_region_area": 100},
    "crops": {**NANO_THRESHOLDS, "points_per_side": 12, "crop_n_layers": 1, "output_mode": "coco_rle"},
}


def photographs() -> dict[str, np.ndarray]:
    """Return three photographs of scikit-image, [H, W, 3] uint8."""
    from skimage import data

    coins = np.repeat(data.coins()[:, :, None], 3, axis=2)
    return {"coins": coins, "coffee": data.coffee(), "astronaut": data.astronaut()}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return the stored form of a record of any output mode."""
    return {
        "area": int(record["area"]),
        "bbox": [int(side) for side in record["bbox"]],
        "predicted_iou": round(record["predicted_iou"], 6),
        "stability_score": round(record["stability_score"], 6),
        "point": [round(x, 4) for x in record["point_coords"][0]],
        "crop_box": [int(side) for side in record["crop_box"]],
        "counts": coco_counts(record["segmentation"]),
    }


def coco_counts(segmentation: Any) -> str:
    """Return the compressed counts of a segmentation of any output mode."""
    if isinstance(segmentation, np.ndarray):
        (segmentation,) = rle_encode.encode(torch.from_numpy(np.ascontiguousarray(segmentation))[None])
    counts = segmentation["counts"]
    return counts if isinstance(counts, str) else rle.compress(counts)


def package_version() -> str:
    for name in ("segment-anything-py", "segment-anything"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "segment-anything, a checkout"


def _text(document: dict[str, Any]) -> str:
    """Format as JSON with one line per record."""
    head = {key: value for key, value in document.items() if key != "results"}
    results = [
        json.dumps({**result, "records": []})[:-2] + ",".join(f"\n  {json.dumps(r)}" for r in result["records"]) + "]}"
        for result in document["results"]
    ]
    return json.dumps(head)[:-1] + ', "results": [\n' + ",\n".join(results) + "\n]}\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_masks", description=__doc__)
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    parser.add_argument("--only", action="append", choices=ARGUMENTS, help="redo this and keep the rest")
    args = parser.parse_args()
    package = import_segment_anything(args.segment_anything)
    ours = sam.load_model(device="cpu")
    model = official_copy(package, ours)
    stored = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    same = stored.get("model_hash") == ours.model_hash
    results = {(record["what"], record["image"]): record for record in stored["results"]} if same else {}
    for what in tqdm(args.only or ARGUMENTS, desc="official masks"):
        for name, image in photographs().items():
            records = package.SamAutomaticMaskGenerator(model, **ARGUMENTS[what]).generate(image)
            results[what, name] = {
                "what": what,
                "image": name,
                "arguments": ARGUMENTS[what],
                "records": list(map(summary, records)),
            }
        document = {"package": package_version(), "model_hash": ours.model_hash, "results": list(results.values())}
        TARGET.write_text(_text(document))


if __name__ == "__main__":
    main()
