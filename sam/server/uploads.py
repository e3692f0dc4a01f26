"""Images of uploads, decoded within limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from ..images.decode_apart import decode_apart
from ..images.read import ImageTooLargeError, decode
from ..images.structure import DamagedImageError, UnsupportedImageError, walk
from .errors import ApiError


def decode_image(file: BinaryIO, max_pixels: int, check_cancelled: Callable[[], None] = lambda: None) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file -> [H, W, 3] uint8 RGB, upright; alpha is dropped.

    Args:
        check_cancelled: called now and then; an exception from it ends the decoding.

    Raises:
        ApiError: another format, more pixels than the limit (by the header, before decoding), or damaged.
    """
    try:
        structure = walk(file)
        if structure is None:
            raise ApiError("unsupported_image")
        decode_it = decode if structure.bounded else decode_apart
        return decode_it(file, structure, max_pixels, check_cancelled)
    except UnsupportedImageError:
        raise ApiError("unsupported_image") from None
    except ImageTooLargeError:
        raise ApiError("image_too_large") from None
    except DamagedImageError:
        raise ApiError("bad_image") from None
