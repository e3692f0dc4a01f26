"""Ask a running service: ``python -m sam serve``, then ``python -m sam.examples.service_client photo.jpg 120 80``.

The client needs neither torch nor a model; it works where only numpy and Pillow are.
"""

from __future__ import annotations

import sys

from PIL import Image

from sam.client import Client


def main(photo: str, x: str, y: str, url: str = "http://127.0.0.1:8000", token: str | None = None) -> None:
    """Click once, correct with a second click in the corner, and write ``mask.png``."""
    with Client(url, token) as client:
        image = client.embed(photo)  # sent once; prompts name it
        (first,) = client.segment(image, [{"points": [[int(x), int(y)]]}])
        correction = {"points": [[int(x), int(y)], [1, 1]], "labels": [1, 0], "mask_input": first.reference}
        (second,) = client.segment(image, [correction], multimask_output=False)
    Image.fromarray(second.masks[0]).save("mask.png")
    print(f"mask.png: predicted IoU {first.predicted_iou.max():.2f}, corrected {second.predicted_iou[0]:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
