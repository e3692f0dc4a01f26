"""Reading photographs from files, within limits."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..checks import path_of, require
from .channel_depth import bits_per_channel
from .structure import DamagedImageError, ImageStructure, UnsupportedImageError, walk

MAX_MEGAPIXELS = 50.0
# PIL's formats of single photographs; those of icons, documents, films and measurements are none. TGA has no signature.
_OPENED = ("TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "DDS", "PCX", "PSD", "QOI", "SGI", "TGA")
# Modes with 8 bits a channel, which convert to RGB without losing range.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
# How to turn an image upright, by its orientation in EXIF; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FROM_THE_END, _SIDEWAYS = (3, 4, 6, 7), (5, 6, 7, 8)
_PIXELS_PER_STRIP = 2**18


class _WebP(WebPImageFile):
    """A WebP image that frees libwebp's two canvases before PIL makes one of its own."""

    def load_prepare(self) -> None:
        self._decoder = None
        super().load_prepare()


_WALKED: dict[str, Callable[[BinaryIO], ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": _WebP}


class ImageTooLargeError(ValueError):
    """The image has more pixels than the limit."""


def read_image(path: str | os.PathLike[str], max_megapixels: float | None = MAX_MEGAPIXELS) -> np.ndarray:
    """Read an image file -> [H, W, 3] uint8 RGB, upright as its EXIF orientation says; alpha is dropped.

    Formats are JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, AVIF, JPEG 2000, DDS, PCX, PSD, QOI, SGI and TGA, the last ones
    as far as PIL reads them, and those that a plugin has been registered for with PIL, as for HEIF. Of several frames
    or pages the first is read. An orientation in XMP is not followed: browsers and OpenCV do not either.

    Raises:
        TypeError: no path, or a limit that is no number.
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        OSError: it cannot be read.
        ValueError: not an image in one of these formats, a damaged one, more than 8 bits per channel, or more pixels
            than ``max_megapixels`` (None lifts that). The limit is checked before anything is decoded.
    """
    path = path_of("the image file", path)
    if max_megapixels is not None:
        require("max_megapixels", max_megapixels, Real, "a number, or None for no limit")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an image")
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    if max_megapixels is not None and max_megapixels < 0:
        raise ValueError(f"max_megapixels must not be negative, got {max_megapixels:g}")
    max_pixels = None if max_megapixels is None else max_megapixels * 1e6
    with open(path, "rb") as file:
        try:
            structure = walk(file)
            if structure is None:
                return _decode_other(file, max_pixels)
            return decode(file, structure, max_pixels)
        except (ImageTooLargeError, UnsupportedImageError, DamagedImageError) as error:
            advice = "; raise max_megapixels" if isinstance(error, ImageTooLargeError) else ""
            damage = "is a damaged image: it " if isinstance(error, DamagedImageError) else ""
            raise type(error)(f"{path} {damage}{error}{advice}") from None


def is_image_name(path: Path) -> bool:
    """Return whether the name of a file ends as that of an image :func:`read_image` reads, and is not hidden."""
    known = Image.registered_extensions().get(path.suffix.lower())
    return not path.name.startswith(".") and known in (*_WALKED, *_formats_opened(), "MPO")


def _formats_opened() -> list[str]:
    """Return the formats that PIL opens for us: photographs of its own, and all that plugins of the program read."""
    Image.init()
    plugged = [name for name, (factory, _) in Image.OPEN.items() if not factory.__module__.startswith("PIL.")]
    return [*_OPENED[:-1], *plugged, _OPENED[-1]]


def decode(
    file: BinaryIO,
    structure: ImageStructure,
    max_pixels: float | None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file that was walked -> [H, W, 3] uint8 RGB, upright; alpha is dropped.

    Args:
        check_cancelled: called whenever the decoder asks for more of the file; what it raises ends the decoding.

    Raises:
        ImageTooLargeError: more pixels than ``max_pixels``.
        DamagedImageError: the decoder does not get through.
    """
    check_size(structure.width, structure.height, max_pixels)
    needed = io.BufferedReader(Pieces(file, structure.pieces, check_cancelled))
    # Not by Image.open: its own limit on pixels hangs on a variable of the process.
    return _pixels(lambda: _WALKED[structure.format](needed), lambda image: structure.orientation)


def _decode_other(file: BinaryIO, max_pixels: float | None) -> np.ndarray:
    def open_checked() -> ImageFile:
        image = _open(file)
        check_size(image.width, image.height, max_pixels)
        bits = bits_per_channel(image, file)
        if bits > 8:
            raise UnsupportedImageError(f"has {bits} bits per channel; 8 are needed")
        if image.mode not in _MODES:
            raise UnsupportedImageError(f"has pixels of mode {image.mode}; 8 bits per channel are needed")
        for xmp in ("xmp", "XML:com.adobe.xmp"):
            image.info.pop(xmp, None)  # where PIL looks for an orientation when EXIF has none
        return image

    return _pixels(open_checked, lambda image: image.getexif().get(_ORIENTATION, 1))


def _pixels(open_image: Callable[[], ImageFile], orientation_of: Callable[[ImageFile], int]) -> np.ndarray:
    try:
        with open_image() as image:
            image.load()
            return _upright_rgb(image, orientation_of(image))
    except (ImageTooLargeError, UnsupportedImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise UnsupportedImageError("has more pixels than PIL's MAX_IMAGE_PIXELS allows in its format") from None
    except Exception as error:  # decoders of damaged files raise whatever they please
        raise DamagedImageError(f"cannot be decoded: {error}") from None


def _open(file: BinaryIO) -> ImageFile:
    file.seek(0)
    head = file.read(16)
    failed = None
    for name in _formats_opened():
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None or (accepts is not None and accepts(head) is not True):
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # PIL's "not of this format"
            if accepts is not None:
                failed = failed or f"begins as a {name} file, but of a kind that is not read: {error}"
    raise UnsupportedImageError(failed or "is not an image in a known format")


def check_size(width: int, height: int, max_pixels: float | None) -> None:
    """Raise an :class:`ImageTooLargeError` for more pixels than ``max_pixels``."""
    if max_pixels is not None and not width * height <= max_pixels:  # NaN is no limit that anything keeps
        raise ImageTooLargeError(
            f"has {width * height / 1e6:.1f} megapixels ({width}x{height}), more than the limit of {max_pixels / 1e6:g}"
        )


def _upright_rgb(image: Image.Image, orientation: int) -> np.ndarray:
    """Convert a loaded image, strip by strip, so that there is no second copy of it, nor a third."""
    width, height = image.size
    sideways = orientation in _SIDEWAYS
    rgb = np.empty((width, height, 3) if sideways else (height, width, 3), np.uint8)
    rows = max(1, _PIXELS_PER_STRIP // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        strip = image.crop((0, top, width, bottom)).convert("RGB")
        if orientation in _TURNS:
            strip = strip.transpose(_TURNS[orientation])
        place = slice(height - bottom, height - top) if orientation in _FROM_THE_END else slice(top, bottom)
        rgb[(slice(None), place) if sideways else place] = np.asarray(strip)
    return rgb


class Pieces(io.RawIOBase):
    """Read pieces of another file and bytes as one file, as :class:`ImageStructure` lists them."""

    def __init__(self, file: BinaryIO, pieces: tuple[bytes | range, ...], check_cancelled: Callable[[], None]) -> None:
        self._file, self._pieces, self._check_cancelled = file, pieces, check_cancelled
        self._size = sum(map(len, pieces))
        self._position = self._index = self._start = 0  # the piece at hand, and the position of its first byte

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        if self._position < self._start:
            self._index = self._start = 0
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._check_cancelled()
        while self._index < len(self._pieces):
            piece = self._pieces[self._index]
            skipped = self._position - self._start
            if skipped < len(piece):
                part = piece[skipped : skipped + len(buffer)]
                if isinstance(part, range):
                    self._file.seek(part.start)
                    part = self._file.read(len(part))
                buffer[: len(part)] = part
                self._position += len(part)
                return len(part)
            self._index, self._start = self._index + 1, self._start + len(piece)
        return 0
