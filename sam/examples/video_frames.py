"""Follow an object through frames: ``python -m sam.examples.video_frames 120 80 frames/*.png``.

Frames are read, resized and copied while the model works on earlier ones. Each frame is asked with the middle of the
mask before it, and with that mask's logits: a tracker of the simplest kind, for objects that move little per frame.
"""

from __future__ import annotations

import sys

import numpy as np

import sam


def main(x: str, y: str, *frames: str) -> list[np.ndarray]:
    """Return one mask [H, W] per frame, of the object at pixel (x, y) of the first one."""
    model = sam.load_model()
    click, logits = (float(x), float(y)), None
    masks = []
    for frame, embedding in zip(frames, sam.encode_stream(model, frames), strict=True):
        prediction = model.predict(embedding, [sam.Prompt([click], [1], mask_input=logits)])
        best = int(prediction.iou_predictions[0].argmax())
        mask = prediction.masks[0, best].cpu().numpy()
        if not mask.any():
            print(f"{frame}: lost")
            break
        rows, columns = np.nonzero(mask)
        click, logits = (float(columns.mean()), float(rows.mean())), prediction.low_res_logits[0, best][None].cpu()
        masks.append(mask)
        print(f"{frame}: at {click[0]:.0f}, {click[1]:.0f}, {mask.sum()} pixels")
    return masks


if __name__ == "__main__":
    main(*sys.argv[1:])
