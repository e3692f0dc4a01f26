"""The cost of narrower arithmetic in the masks of clicks: their mean IoU with those of fp32.

    python -m benchmarks.mask_iou [--checkpoint FILE]

A grid of clicks on each of scikit-image's photographs; of the three masks of a click, the one that the model in fp32
rates best. With the embedded model the result is kept for the README, and ``python -m benchmarks tables --write`` says
it there.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

import sam

from .provenance import RESULTS, describe, provenance

RESULT = RESULTS / "mask_iou.json"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
CLICKS_PER_SIDE = 6
NARROW = (torch.bfloat16, torch.float16)


def mask_iou(checkpoint: str | None) -> dict[str, float]:
    """Return the mean IoU of masks in each narrow dtype with those in fp32, by the dtype's name."""
    from skimage import data

    models = {dtype: sam.load_model(checkpoint, device="cpu", dtype=dtype) for dtype in (torch.float32, *NARROW)}
    scores: dict[torch.dtype, list[float]] = {dtype: [] for dtype in NARROW}
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        height, width = image.shape[:2]
        positions = np.linspace(0.1, 0.9, CLICKS_PER_SIDE)
        prompts = [sam.Prompt([(x * width, y * height)], [1]) for y in positions for x in positions]
        predictions = {dtype: model.predict(model.encode(image), prompts) for dtype, model in models.items()}
        best = predictions[torch.float32].iou_predictions.argmax(dim=1)
        rows = torch.arange(len(prompts))
        exact = predictions[torch.float32].masks[rows, best]
        for dtype in NARROW:
            masks = predictions[dtype].masks[rows, best]
            both, either = ((masks & exact).sum(dim=(1, 2)), (masks | exact).sum(dim=(1, 2)))
            scores[dtype] += torch.where(either > 0, both / either.clamp(min=1), 1.0).tolist()
    return {str(dtype).removeprefix("torch."): float(np.mean(values)) for dtype, values in scores.items()}


def sentence() -> str:
    """Format the stored result as a sentence."""
    document = json.loads(RESULT.read_text())
    figures = ", ".join(f"{value:.3f} in `{dtype}`" for dtype, value in document["mask_iou"].items())
    return (
        f"Mean IoU of a click's mask with that of `float32`: {figures} (`nano`, "
        f"{CLICKS_PER_SIDE**2 * len(PHOTOGRAPHS)} clicks on {len(PHOTOGRAPHS)} photographs, "
        f"`python -m benchmarks.mask_iou`;\n{describe(document['provenance'])})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="other weights than the embedded ones; nothing is kept then")
    checkpoint = parser.parse_args().checkpoint
    result = mask_iou(checkpoint)
    print(json.dumps(result, indent=1))
    if checkpoint is None:
        RESULT.write_text(json.dumps({"provenance": provenance(), "mask_iou": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
