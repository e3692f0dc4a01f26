"""Label images with the palette of PASCAL VOC and DAVIS, by which tools of video segmentation know objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def voc_palette() -> np.ndarray:
    """Return the 256 colours [256, 3] uint8: each bit of a value goes to a channel in turn, the lowest weigh most."""
    values = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for step in range(8):
        for channel in range(3):
            palette[:, channel] |= ((values >> (3 * step + channel) & 1) << (7 - step)).astype(np.uint8)
    return palette


def write_labels(path: Path, masks: np.ndarray, values: Sequence[int], size: tuple[int, int]) -> None:
    """Write masks [O, H, W] bool as one PNG of ``size`` (height, width); later ones lie over earlier ones.

    Args:
        values: of the pixels of each, 1 to 255; 0 is background.
    """
    labels = np.zeros(size, np.uint8)
    for mask, value in zip(masks, values, strict=True):
        labels[mask] = value
    image = Image.fromarray(labels, "P")
    image.putpalette(voc_palette().tobytes())
    image.save(path, "PNG")


def read_labels(path: Path) -> dict[int, np.ndarray]:
    """Return the masks [H, W] bool of a label image by their value: a picture with a palette, or of grey levels.

    Raises:
        ValueError: a picture of colours, or without a mask.
        OSError: no picture.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1", "I", "I;16"):
            raise ValueError(f"{path} must be a picture with a palette or of grey levels, got mode {image.mode}")
        labels = np.array(image).astype(np.int64)
    masks = {int(value): labels == value for value in np.unique(labels) if value > 0}
    if not masks:
        raise ValueError(f"{path} has no mask: all of its pixels are 0")
    return masks
