"""From a photograph to what goes to the encoder's device: check, measure, resize, hash. Needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..checks import require
from .geometry import ImageGeometry, ResizePolicy


@dataclass(frozen=True, eq=False)
class CheckedImage:
    """Pixels that a model can encode, as they were given.

    Attributes:
        pixels: [H, W, 3] uint8.
        geometry: their size, and what the model resizes them to.
    """

    pixels: np.ndarray
    geometry: ImageGeometry

    @classmethod
    def of(cls, image: Any, resize_policy: ResizePolicy) -> CheckedImage:
        """Check an image [H, W, 3], uint8 or floating-point in 0..1, and measure it.

        Raises:
            TypeError: not a numpy array, or of another dtype.
            ValueError: another shape, empty, floating-point pixels outside 0..1, or too long and thin to be resized.
        """
        pixels = validate_image(image)
        return cls(pixels, resize_policy(pixels.shape[0], pixels.shape[1]))

    def prepare(self, resize_on_device: bool = False) -> PreparedImage:
        """Return the image as it goes to the device: resized and hashed, unless the device is to resize it.

        An image that is stretched is always resized by the device, in floating point as officially; it is hashed as
        it is.
        """
        if resize_on_device or self.geometry.is_stretched:
            pixels = np.require(self.pixels, requirements=("C", "W"))
            return PreparedImage(pixels, self.geometry, None if resize_on_device else hash_image(pixels, self.geometry))
        resized = resize_image(self.pixels, self.geometry.input_size)
        return PreparedImage(resized, self.geometry, hash_image(resized, self.geometry))


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as it goes to the encoder's device; a queue of them stays small where they are resized.

    Attributes:
        pixels: [h, w, 3] uint8 in memory that torch can wrap, of the geometry's input size where they are resized; or
            floating-point [3, size, size] in 0..255, the whole square of the encoder.
        geometry: the sizes of the image.
        image_hash: 32 hex digits of these pixels and the geometry; None with ``resize_on_device``.
    """

    pixels: np.ndarray
    geometry: ImageGeometry
    image_hash: str | None

    @property
    def is_resized(self) -> bool:
        """Return whether the pixels have the encoder's input size already."""
        return self.image_hash is not None and not self.geometry.is_stretched


def prepare_image(image: Any, resize_policy: ResizePolicy, *, resize_on_device: bool = False) -> PreparedImage:
    """Check an image and make it ready for the encoder; see :class:`CheckedImage`, which also names the errors."""
    return CheckedImage.of(image, resize_policy).prepare(resize_on_device)


def hash_image(pixels: np.ndarray, geometry: ImageGeometry) -> str:
    """Return 32 hex digits of an image's content as a model of this input size takes it."""
    digest = hashlib.blake2b(repr(geometry).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def to_uint8(image: Any) -> np.ndarray:
    """Return pixels as uint8: an array of uint8 itself, and floating-point pixels in 0..1 times 255, rounded down.

    Raises:
        TypeError: not a numpy array, or an array of another dtype.
        ValueError: floating-point pixels outside 0..1.
    """
    require("the image", image, np.ndarray, "a numpy array [H, W, 3] of uint8")
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"the image must be uint8 in 0..255, or floating-point in 0..1, got {image.dtype}")
    low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 0.0)
    if not (255 * low > -1 and 255 * high < 256):
        raise ValueError(
            f"a floating-point image must lie in 0..1, got values from {low:g} to {high:g}; "
            "pixels in 0..255 are wanted as uint8, image.astype(np.uint8)"
        )
    return (image * 255).astype(np.uint8)


def validate_image(image: Any) -> np.ndarray:
    """Return an image [H, W, 3] as uint8, itself if it is uint8 already; see :func:`to_uint8`.

    Raises:
        TypeError: not a numpy array, or of another dtype.
        ValueError: another shape, empty, or floating-point pixels outside 0..1.
    """
    require("the image", image, np.ndarray, "a numpy array [H, W, 3] of uint8")
    if image.ndim != 3 or image.shape[2] != 3:
        hint = {1: " (grey? np.dstack([image] * 3))", 4: " (RGBA? image[..., :3])"}
        channels = 1 if image.ndim == 2 else image.shape[-1] if image.ndim == 3 else 0
        raise ValueError(f"the image must be [H, W, 3], got {list(image.shape)}{hint.get(channels, '')}")
    if image.size == 0:
        raise ValueError(f"the image is empty: {image.shape[0]}x{image.shape[1]} (height x width)")
    return to_uint8(image)


def to_pil_image(pic: np.ndarray) -> Image.Image:
    """Make a PIL image of pixels [H, W] or [H, W, C], 1 to 4 channels, as torchvision's function of this name.

    Raises:
        TypeError, ValueError: see :func:`to_uint8`; or another shape.
    """
    require("the image", pic, np.ndarray, "a numpy array [H, W, C] or [H, W]")
    if pic.ndim not in (2, 3) or (pic.ndim == 3 and pic.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"the image must be [H, W] or [H, W, C] of 1 to 4 channels, got {list(pic.shape)}")
    grey = pic[..., 0] if pic.ndim == 3 and pic.shape[2] == 1 else pic
    wide = grey.ndim == 2 and grey.dtype in (np.int16, np.int32)  # PIL has modes of one channel for these
    return Image.fromarray(grey if wide else to_uint8(grey))


def resize(img: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a PIL image to (height, width) with the antialiased bilinear filter that SAM was trained with."""
    height, width = size
    return img.resize((width, height), Image.Resampling.BILINEAR)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize pixels [H, W] or [H, W, C], as :func:`to_pil_image` takes them, to (height, width)."""
    return np.array(resize(to_pil_image(image), size))
