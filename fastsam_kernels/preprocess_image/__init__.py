"""One pass from a photograph in 8 bits to the encoder's input."""

from .api import preprocess_image

__all__ = ["preprocess_image"]
