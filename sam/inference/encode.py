"""Images to handles: checks, preparation and passes of the encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..checks import naming
from ..embedding import ImageEmbedding
from ..images.prepare import CheckedImage, PreparedImage
from ..system.device_profile import device_profile
from .parts import Model


def encode(
    model: Model,
    images: Sequence[np.ndarray | PreparedImage],
    batch_size: int | None,
    resize_on_device: bool,
) -> list[ImageEmbedding]:
    """Encode images of any sizes, ``batch_size`` per pass; nothing is encoded when one of them is refused.

    Raises:
        TypeError, ValueError: an image of another kind, named by its place, or a batch below 1.
    """
    if not isinstance(images, Sequence):
        raise TypeError(f"an array [H, W, 3] or a list of them is wanted, got {type(images).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    checked: list[CheckedImage | PreparedImage] = []
    for index, image in enumerate(images):
        with naming(f"image {index}" if len(images) > 1 else None):
            if isinstance(image, PreparedImage):
                model.check_prepared(image)
                checked.append(image)
            else:
                checked.append(CheckedImage.of(image, model.image_geometry))
    if batch_size is None:
        batch_size = device_profile(model.device).images_per_pass
    embeddings = []
    for start in range(0, len(checked), batch_size):
        chunk = checked[start : start + batch_size]
        batch = [i if isinstance(i, PreparedImage) else i.prepare(resize_on_device) for i in chunk]
        pixels = [model.encoder_input(torch.from_numpy(image.pixels).to(model.device), image) for image in batch]
        embeddings += model.embed(torch.stack(pixels), batch)
    return embeddings
