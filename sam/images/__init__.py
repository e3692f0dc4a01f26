"""Images: read from files within limits, checked, resized to the encoder's square."""

from .read import MAX_MEGAPIXELS, ImageTooLargeError, is_image_name, read_image
from .structure import DamagedImageError, UnsupportedImageError

__all__ = [
    "MAX_MEGAPIXELS",
    "DamagedImageError",
    "ImageTooLargeError",
    "UnsupportedImageError",
    "is_image_name",
    "read_image",
]
