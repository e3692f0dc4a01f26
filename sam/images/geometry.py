"""The sizes that tie an image to the encoder's square and to its masks.

Three frames of coordinates, all (x, y) in pixels with sizes given as (height, width): the original image, the
resized input that the model was trained to see, and the padded square around it, which shares its origin. SAM 2
stretches images, so its resized input is the whole square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


def resized_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return (height, width) after the longer side became ``long_side``, rounded half up as SAM was trained.

    Raises:
        ValueError: a side is 0.
    """
    if min(height, width) < 1:
        raise ValueError(f"the image is empty: {height}x{width} (height x width)")
    scale = long_side * 1.0 / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


@dataclass(frozen=True)
class ImageGeometry:
    """The sizes that tie an image to its embedding and its masks.

    Attributes:
        original_size: (height, width) of the image as given; masks come back in it.
        input_size: (height, width) after resizing.
        image_size: side of the padded square that the encoder sees.
        is_stretched: each side was resized to the square by a factor of its own, and one resize leads from
            low-resolution logits to masks; else both by the same factor, and a resize to the square comes first.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    image_size: int
    is_stretched: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("original_size", "input_size"):
            try:
                height, width = (int(side) for side in getattr(self, name))
            except (TypeError, ValueError):
                raise TypeError(f"{name} must be (height, width) in pixels, got {getattr(self, name)!r}") from None
            if min(height, width) < 1:
                raise ValueError(f"{name} must be at least 1x1 (height x width), got {height}x{width}")
            object.__setattr__(self, name, (height, width))
        if self.is_stretched and self.input_size != (self.image_size, self.image_size):
            raise ValueError(f"a stretched image fills its square of {self.image_size} px, got {self.input_size}")
        if max(self.input_size) > self.image_size:
            raise ValueError(f"input_size {self.input_size} does not fit the model's square of {self.image_size} px")

    @classmethod
    def longest_side(cls, height: int, width: int, image_size: int) -> ImageGeometry:
        """Return the geometry of an image whose longer side is resized to ``image_size``, as SAM was trained.

        Raises:
            ValueError: a side is 0, or so short that it vanishes when the longer one is resized.
        """
        input_size = resized_size(height, width, image_size)
        if min(input_size) < 1:
            raise ValueError(
                f"an image of {height}x{width} (height x width) resized to {image_size} px on its longer side has a "
                f"side of 0 px; the aspect ratio may be at most 1:{2 * image_size}"
            )
        return cls((height, width), input_size, image_size)

    @classmethod
    def stretched(cls, height: int, width: int, image_size: int) -> ImageGeometry:
        """Return the geometry of an image that is stretched to the square, as SAM 2 was trained.

        Raises:
            ValueError: a side is 0.
        """
        if min(height, width) < 1:
            raise ValueError(f"the image is empty: {height}x{width} (height x width)")
        return cls((height, width), (image_size, image_size), image_size, is_stretched=True)

    @property
    def scale(self) -> tuple[float, float]:
        """Return the factors (x, y) from the original image to the resized input.

        Where it is not stretched they are those of ``ResizeLongestSide``, also for an input of another size, such as a
        square that is padded already.
        """
        height, width = self.original_size
        if self.is_stretched:
            return self.image_size / width, self.image_size / height
        resized_height, resized_width = resized_size(height, width, self.image_size)
        return resized_width / width, resized_height / height


# How a model wants images resized: (height, width) of an image to its geometry.
ResizePolicy = Callable[[int, int], ImageGeometry]
