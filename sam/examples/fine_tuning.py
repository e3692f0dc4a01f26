"""Fine-tune the mask decoder on masks of one's own, and validate: ``python -m sam.examples.fine_tuning tuned.pth``.

The encoder is frozen, so images are encoded once. Training calls the official modules; ``predict`` validates between
the steps and always sees the weights of the last one.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F

import sam
from sam.utils.transforms import ResizeLongestSide


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """Draw a ring on noise: an image, the mask of the ring and its hole, and a box. Put a data set of your own here."""
    random = np.random.default_rng(seed)
    x, y, radius = random.integers(60, 140, 3) // (1, 1, 2)
    distance = np.hypot(np.arange(200)[None] - x, np.arange(200)[:, None] - y)
    ring = (distance < radius) & (distance > radius / 2)
    image = random.integers(0, 80, (200, 200, 3)) + 150 * ring[..., None]
    return image.astype(np.uint8), distance < radius, (x - radius, y - radius, x + radius, y + radius)


def main(out: str, steps: str = "30") -> tuple[float, float]:
    """Train for some steps, save, and return the mean IoU on held-out scenes before and after."""
    model = sam.build_sam_nano()
    model.image_encoder.requires_grad_(False)
    model.prompt_encoder.requires_grad_(False)
    scenes = [scene(seed) for seed in range(4)]
    embeddings = [model.encode(image) for image, _, _ in scenes]

    def validate() -> float:
        overlaps = []
        for embedding, (_, mask, box) in list(zip(embeddings, scenes, strict=True))[2:]:
            found = model.predict(embedding, [sam.Prompt(box=box)], multimask_output=False).masks[0, 0].cpu().numpy()
            overlaps.append((found & mask).sum() / (found | mask).sum())
        return float(np.mean(overlaps))

    before = validate()
    transform = ResizeLongestSide(model.image_size)
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), lr=3e-4)
    for step in range(int(steps)):
        (_, mask, box), embedding = scenes[step % 2], embeddings[step % 2]
        corners = transform.apply_boxes_torch(torch.tensor([box], device=model.device), mask.shape)
        sparse, dense = model.prompt_encoder(points=None, boxes=corners, masks=None)
        pe = model.prompt_encoder.get_dense_pe()
        logits, _ = model.mask_decoder(embedding.features, pe, sparse, dense, multimask_output=False)
        logits = model.postprocess_masks(logits, embedding.geometry.input_size, mask.shape)
        target = torch.from_numpy(mask).to(logits)[None, None]
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = validate()
    sam.save_checkpoint(model, out)
    print(f"{out}: mean IoU {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:])
