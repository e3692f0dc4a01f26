"""Reading photographs from files, within limits."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_MEGAPIXELS = 50.0
# Modes with 8 bits a channel, which convert to RGB without losing range.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def read_image(path: str | os.PathLike[str], max_megapixels: float | None = MAX_MEGAPIXELS) -> np.ndarray:
    """A file PIL can read -> [H, W, 3] uint8 RGB, upright as its EXIF orientation says; alpha is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no image, a damaged one, more than 8 bits a channel, or more pixels than ``max_megapixels``
            (None lifts that). The limit is checked before anything is decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with warnings.catch_warnings():
            # PIL's own limit on pixels; ours is told apart below, and a size over both is an error either way.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _open(path, unlimited=max_megapixels is None) as image:
                megapixels = image.width * image.height / 1e6
                if max_megapixels is not None and megapixels > max_megapixels:
                    raise ValueError(
                        f"{path} has {megapixels:.1f} megapixels ({image.width}x{image.height}), more than the limit "
                        f"of {max_megapixels:g}; raise max_megapixels"
                    )
                if image.mode not in _MODES:
                    raise ValueError(f"{path} has pixels of mode {image.mode}; 8 bits a channel are needed")
                upright = ImageOps.exif_transpose(image)
                return np.array(upright.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path} has more pixels than the limit of {max_megapixels:g} megapixels; raise max_megapixels"
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} is a damaged image: {error}") from None


def _open(path: Path, unlimited: bool) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if unlimited:
            Image.MAX_IMAGE_PIXELS = None
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
