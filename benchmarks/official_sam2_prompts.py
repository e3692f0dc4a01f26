"""What Meta's SAM2ImagePredictor answers with weights that hide nothing, written down for the tests.

    python -m benchmarks.official_sam2_prompts --sam2 PATH

PATH is the folder from which ``import sam2`` works; see :mod:`benchmarks.official_sam2`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .official_sam2 import COMPUTED, SIZE, official_model, random_sam2, sample

TARGET = Path(__file__).parents[1] / "tests" / "official_sam2_prompts.json"
HEIGHT, WIDTH = 180, 260
_POINTS = {"points": [(100, 50), (30, 40), (200, 150)], "labels": [1, 0, 1]}
_BOX = {"box": (20, 30, 150, 120)}


def photograph() -> np.ndarray:
    """Return an image [HEIGHT, WIDTH, 3] uint8: noise, and rectangles of other colours."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for left, top in generator.integers(0, (200, 120), (6, 2)):
        image[top : top + 60, left : left + 60] += generator.integers(0, 160, 3, dtype=np.uint8)
    return image


def prompts() -> dict[str, dict[str, Any]]:
    """Return prompts of every kind by name, with the arguments of :class:`sam.Prompt`."""
    mask = 5 * np.random.default_rng(1).normal(size=(1, SIZE // 4, SIZE // 4)).astype(np.float32)
    click = {"points": [(100, 50)], "labels": [1]}
    return {
        "click": click,
        "clicks": _POINTS,
        "box": _BOX,
        "box and clicks": _BOX | _POINTS,
        "click and mask": click | {"mask_input": mask},
        "box, clicks and mask": _BOX | _POINTS | {"mask_input": mask},
        "mask": {"mask_input": mask},
        "nothing": {},
    }


def _answers(predictor: Any, multimask_output: bool) -> dict[str, dict[str, list[float]]]:
    answers = {}
    scores: list[Tensor] = []
    decoder = predictor.model.sam_mask_decoder
    hook = decoder.register_forward_hook(lambda module, arguments, result: scores.append(result[3]))
    for name, prompt in prompts().items():
        arguments = [prompt.get(part) for part in ("points", "labels", "box", "mask_input")]
        given = [None if part is None else np.array(part) for part in arguments]
        masks, iou, low_res = predictor.predict(*given, multimask_output, return_logits=True)
        tensors = {"masks": torch.from_numpy(masks), "low_res": torch.from_numpy(low_res)}
        values = {part: sample(tensor, 48) for part, tensor in tensors.items()}
        values |= {"iou": torch.from_numpy(iou), "score": scores[-1][0]}
        answers[name] = {part: [float(f"{value:.7g}") for value in tensor] for part, tensor in values.items()}
    hook.remove()
    return answers


def _median_stability(predictor: Any) -> float:
    """Return a threshold of stability that half of the single masks reach."""
    decoder, found = predictor.model.sam_mask_decoder, []
    measure = decoder._get_stability_scores

    def measured(logits: Tensor) -> Tensor:
        found.append(float(measure(logits)))
        return measure(logits)

    decoder._get_stability_scores = measured
    _answers(predictor, multimask_output=False)
    del decoder._get_stability_scores
    return sum(sorted(found)[len(found) // 2 - 1 :][:2]) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", required=True, metavar="PATH", help="folder from which import sam2 works")
    path = parser.parse_args().sam2
    figures: dict[str, Any] = {}
    for variant in COMPUTED:
        model: Any = official_model(path, variant)
        model.load_state_dict(random_sam2(variant).state_dict())
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        predictor = SAM2ImagePredictor(model)
        predictor._bb_feat_sizes = [(SIZE // 4,) * 2, (SIZE // 8,) * 2, (SIZE // 16,) * 2]  # which are of 1024 px
        predictor.set_image(photograph())
        threshold = model.sam_mask_decoder.dynamic_multimask_stability_thresh = _median_stability(predictor)
        figures[variant] = {
            "threshold": threshold,
            "single": _answers(predictor, False),
            "alternatives": _answers(predictor, True),
        }
    TARGET.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
