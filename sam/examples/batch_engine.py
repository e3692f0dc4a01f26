"""Requests of many threads, batched by one engine: ``python -m sam.examples.batch_engine *.jpg``.

The engine is what the HTTP service runs on: a queue with a limit, deadlines, cancellation and a cache of embeddings.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import sam
from sam.engine import Engine, PromptMasks
from sam.images import read_image


def main(*photos: str) -> None:
    """Click into the middle of every photo, and ask a second time with a box; the image is encoded once."""
    engine = Engine(sam.load_model(), max_batch=16, deadline=60.0)

    def ask(photo: str) -> tuple[PromptMasks, PromptMasks]:
        image = engine.prepare(read_image(photo))  # checks and resizes, in the thread of whoever asks
        height, width = image.geometry.original_size
        click = engine.segment(image, [sam.Prompt([(width / 2, height / 2)], [1])]).result()
        box = sam.Prompt(box=(width / 4, height / 4, 3 * width / 4, 3 * height / 4))
        boxed = engine.segment(image, [box], multimask_output=False).result()
        return click[0], boxed[0]

    try:
        with ThreadPoolExecutor(8) as threads:
            for photo, (click, boxed) in zip(photos, threads.map(ask, photos), strict=True):
                print(f"{photo}: click {click.predicted_iou.max():.2f}, box {boxed.predicted_iou[0]:.2f}")
    finally:
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
