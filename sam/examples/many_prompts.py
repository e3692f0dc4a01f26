"""One image, 24 prompts, one call: ``python -m sam.examples.many_prompts`` writes ``coins.png``, the README's picture.

The image is encoded once; its handle answers any number of prompts, from any thread, and can be saved.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image
from skimage import data

import sam
from sam.masks.overlay import draw_overlay

# The middles of the coins in scikit-image's photograph of 384 x 303 pixels.
CLICKS = [
    *[(335, 44), (155, 51), (215, 51), (276, 52), (44, 54), (100, 56)],
    *[(271, 119), (45, 124), (205, 124), (336, 124), (102, 126), (154, 127)],
    *[(347, 187), (212, 193), (273, 194), (102, 196), (44, 197), (154, 198)],
    *[(46, 260), (172, 261), (301, 263), (244, 263), (114, 266), (358, 268)],
]


def main(out: str = "coins.png") -> None:
    """Click on every coin, and draw the best mask of each click."""
    photo = Image.fromarray(data.coins()).convert("RGB")
    image = np.array(photo.resize((3 * photo.width // 2, 3 * photo.height // 2), Image.Resampling.LANCZOS))
    model = sam.load_model()  # the embedded nano
    embedding = model.encode(image)
    prompts = [sam.Prompt(points=[(1.5 * x, 1.5 * y)], labels=[1]) for x, y in CLICKS]
    prediction = model.predict(embedding, prompts)
    best = prediction.iou_predictions.argmax(dim=1)
    masks = prediction.masks[torch.arange(len(prompts)), best].cpu().numpy()
    draw_overlay(image, masks, prompts).save(out, optimize=True)
    print(f"{out}: {len(masks)} coins, {masks.any(axis=0).mean():.0%} of the image")


if __name__ == "__main__":
    main(*sys.argv[1:])
