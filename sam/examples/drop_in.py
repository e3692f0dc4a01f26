"""A program written for ``segment_anything``, with one line before its imports.

``python -m sam.examples.drop_in photo.jpg 120 80`` writes ``mask.png``; ``fastsam run`` needs not even the one line.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

import sam


def main(photo: str, x: str, y: str, out: str = "mask.png") -> None:
    """Segment what is at pixel (x, y) of a photo, and write its mask."""
    with sam.as_segment_anything():
        from segment_anything import SamPredictor, sam_model_registry

    model = sam_model_registry["nano"]()  # or ["vit_b"](checkpoint="sam_vit_b_01ec64.pth").to("cuda")
    predictor = SamPredictor(model)
    predictor.set_image(np.array(Image.open(photo).convert("RGB")))
    masks, scores, _ = predictor.predict(point_coords=np.array([[int(x), int(y)]]), point_labels=np.array([1]))
    best = masks[scores.argmax()]
    Image.fromarray(best).save(out)
    print(f"{out}: {best.mean():.1%} of the image, predicted IoU {scores.max():.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
