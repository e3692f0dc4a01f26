"""Images: read from files within limits, checked, resized to the encoder's square."""

from .geometry import ImageGeometry
from .prepare import CheckedImage, PreparedImage, prepare_image
from .read import MAX_MEGAPIXELS, ImageTooLargeError, is_image_name, read_image
from .structure import DamagedImageError, UnsupportedImageError

__all__ = [
    "MAX_MEGAPIXELS",
    "CheckedImage",
    "DamagedImageError",
    "ImageGeometry",
    "ImageTooLargeError",
    "PreparedImage",
    "UnsupportedImageError",
    "is_image_name",
    "prepare_image",
    "read_image",
]
