"""Reading photographs from files, within limits."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_MEGAPIXELS = 50.0
# Modes with 8 bits a channel, which convert to RGB without losing range.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
# What turns an image upright, by its orientation in EXIF; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
                refusal = _refusal(image, max_megapixels)
                if refusal is None:
                    return upright_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path} has more pixels than the limit of {max_megapixels:g} megapixels; raise max_megapixels"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they please
        raise ValueError(f"{path} is a damaged image: {error}") from None
    raise ValueError(f"{path} {refusal}")


def upright_rgb(image: Image.Image) -> np.ndarray:
    """An image of PIL's -> [H, W, 3] uint8 RGB, turned as the orientation in its EXIF says.

    No other tag is read: PIL's ``exif_transpose`` writes all of them anew, and raises when one is odd.

    Raises:
        Exception: whatever PIL's decoder makes of a damaged image.
    """
    image.load()  # some formats have their EXIF behind the pixels, others turn themselves
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return np.array((image if turn is None else image.transpose(turn)).convert("RGB"))


def _refusal(image: Image.Image, max_megapixels: float | None) -> str | None:
    megapixels = image.width * image.height / 1e6
    if max_megapixels is not None and megapixels > max_megapixels:
        return (
            f"has {megapixels:.1f} megapixels ({image.width}x{image.height}), more than the limit of "
            f"{max_megapixels:g}; raise max_megapixels"
        )
    if image.mode not in MODES:
        return f"has pixels of mode {image.mode}; 8 bits a channel are needed"
    return None


def _open(path: Path, unlimited: bool) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if unlimited:
            Image.MAX_IMAGE_PIXELS = None
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
