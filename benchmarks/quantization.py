"""The cost of 8 bits on the embedded model: the gates of both schemes, and channels of outliers.

    python -m benchmarks.quantization [--scenes N]

Held-out scenes with the boxes of their largest objects, and clicks and automatic masks on them; fp8 by its formula. A
model with planted outliers is the same function, bit for bit, with 2 % of the channels that are quantised 64 times as
large. The result is kept in ``results/quantization.json``; the command fails where a gate is not passed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sam
from sam.fidelity import Gate, Report, report
from sam.modeling import quantization
from sam.training.scenes import held_out_scene

from .provenance import RESULTS, provenance

RESULT = RESULTS / "quantization.json"
# What nano has to reach, which is more than what writing a file takes.
NANO_GATES = {"int8": Gate(1.2, 0.995, 0.99, 0.99), "fp8": Gate(4.0, 0.99, 0.97, 0.98)}
# Smoothed, outliers may cost so many times what quantising the plain model costs.
OUTLIERS_LIMIT = 1.2
_OBJECTS, _MIN_PIXELS = 5, 400


def scenes(count: int) -> tuple[dict[str, np.ndarray], dict[str, list[sam.Prompt]]]:
    """Return held-out scenes and the boxes of their largest objects, by name."""
    images, boxes = {}, {}
    for index in range(count):
        scene = held_out_scene(index)
        masks = sorted(scene.masks(_MIN_PIXELS), key=lambda mask: -int(mask.sum()))[:_OBJECTS]
        images[f"scene {index}"] = scene.image
        boxes[f"scene {index}"] = [sam.Prompt(box=_box(mask)) for mask in masks]
    return images, boxes


def _box(mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return [float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])]


def plant_outliers(model: Any, share: float, factor: float) -> Any:
    """Return the same function with outliers in a share of the channels that are quantised after a norm or a value."""
    hard, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    maxima = quantization.estimated_maxima(hard)

    def scale(activations: Tensor, weight: Tensor) -> Tensor:
        return torch.where(torch.rand(activations.shape, generator=draw) < share, 1 / factor, 1.0)

    quantization.move_scales(hard, maxima, scale)
    return hard


def gates(count: int) -> dict[str, Report]:
    """Return the report of each scheme."""
    images, boxes = scenes(count)
    reports = {}
    for scheme, gate in NANO_GATES.items():
        model = sam.load_model(device="cpu", kernels="reference" if scheme == "fp8" else "auto")
        reports[scheme] = report(model, sam.quantize(model, scheme), images, boxes=boxes, gate=gate)
    return reports


@torch.no_grad()
def outliers(count: int) -> dict[str, Any]:
    """Return the mean errors of the embedding in int8: of the plain model, and with outliers planted."""
    images = list(scenes(count)[0].values())
    model = sam.load_model(device="cpu")
    truth = [model.encode(image).features for image in images]
    hard = plant_outliers(model, 0.02, 64.0)

    def error(quantized: Any) -> float:
        pairs = zip((quantized.encode(image).features for image in images), truth, strict=True)
        return sum(float((x - y).norm() / y.norm()) for x, y in pairs) / len(images)

    return {
        "bit_equal": all(torch.equal(hard.encode(x).features, y) for x, y in zip(images, truth, strict=True)),
        "plain": error(sam.quantize(model, "int8")),
        "outliers, not smoothed": error(sam.quantize(hard, "int8", smooth=False)),
        "outliers, smoothed by weights": error(sam.quantize(hard, "int8")),
        "outliers, smoothed by an image": error(sam.quantize(hard, "int8", images[:1])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8, help="held-out scenes (default: 8); only those are kept")
    count = parser.parse_args().scenes
    reports, errors = gates(count), outliers(count)
    for each in reports.values():
        print(each.to_markdown())
    print(json.dumps(errors, indent=1))
    smoothed = max(value for name, value in errors.items() if "smoothed by" in name)
    passed = all(each.passed for each in reports.values()) and errors["bit_equal"]
    passed = passed and smoothed <= OUTLIERS_LIMIT * errors["plain"]
    if count == 8:
        document = {scheme: each.to_dict() for scheme, each in reports.items()}
        RESULT.write_text(
            json.dumps({"provenance": provenance(), "passed": passed, **document, "outliers": errors}, indent=1) + "\n"
        )
    print("passed" if passed else "NOT PASSED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
