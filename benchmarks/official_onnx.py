"""Answers of Meta's ``SamOnnxModel`` with the embedded weights, written down for the tests.

    python -m benchmarks.official_onnx --segment-anything PATH

PATH is the folder from which ``import segment_anything`` works. To be run again when the embedded weights change.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sam

from .official_masks import package_version
from .peers import import_segment_anything, official_copy

TARGET = Path(__file__).parents[1] / "tests" / "official_onnx.json"
OPTIONS: list[dict[str, bool]] = [
    {"return_single_mask": False},
    {"return_single_mask": True},
    {"return_single_mask": True, "use_stability_score": True, "return_extra_metrics": True},
]
# Labels of each prompt, whether its mask input counts, and (height, width) of the original image.
PROMPTS: dict[str, tuple[list[list[int]], int, tuple[int, int]]] = {
    "one click": ([[1, -1]], 0, (300, 451)),
    "a box and a click, mask input": ([[2, 3, 0]], 1, (451, 300)),
    "five clicks, a small image": ([[1, 0, 1, 1, 1]], 0, (37, 20)),
    "three prompts of four points": ([[0, 1, 2, 3], [1, -1, -1, 0], [1, 1, 1, 1]], 1, (777, 640)),
}
OUTPUTS = ("masks", "scores", "stability", "areas", "low_res_logits")


def inputs_of(name: str, image_size: int) -> dict[str, Tensor]:
    """Return the inputs of one of ``PROMPTS``: waves, which need no generator of random numbers."""
    labels, has_mask, size = PROMPTS[name]
    grid = image_size // 16

    def wave(*shape: int, step: float) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(torch.arange(count, dtype=torch.float64) * step).reshape(shape).float()

    prompts, points = len(labels), len(labels[0])
    return {
        "image_embeddings": wave(1, 256, grid, grid, step=0.37),
        "point_coords": (wave(prompts, points, 2, step=1.7) + 1) * image_size / 2,
        "point_labels": torch.tensor(labels, dtype=torch.float32),
        "mask_input": 8 * wave(prompts, 1, 4 * grid, 4 * grid, step=0.011),
        "has_mask_input": torch.tensor([has_mask], dtype=torch.float32),
        "orig_im_size": torch.tensor(size, dtype=torch.float32),
    }


def summary(outputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return the stored form of the outputs: of masks and logits the shape and some 40 values spread over them."""
    names = OUTPUTS if len(outputs) == len(OUTPUTS) else ("masks", "scores", "low_res_logits")
    stored: dict[str, Any] = {}
    for name, values in zip(names, outputs, strict=True):
        flat = values.flatten()
        samples = flat[:: len(flat) // 40 + 1]
        stored[name] = {"shape": list(values.shape), "values": [round(float(value), 5) for value in samples]}
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_onnx", description=__doc__)
    parser.add_argument("--segment-anything", default="", metavar="PATH", help="folder of the package")
    package = import_segment_anything(parser.parse_args().segment_anything)
    official = importlib.import_module(f"{package.__name__}.utils.onnx").SamOnnxModel
    ours = sam.load_model(device="cpu")
    model = official_copy(package, ours)
    results = [
        {"options": options, "prompts": name, **summary(official(model, **options)(**inputs_of(name, 512)))}
        for options in OPTIONS
        for name in PROMPTS
    ]
    head = json.dumps({"package": package_version(), "model_hash": ours.model_hash})
    lines = ",\n".join(json.dumps(result) for result in results)
    TARGET.write_text(f'{head[:-1]}, "results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
