"""Bits per channel of image files whose pixels PIL hands out in 8 bits whatever they were stored in."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image

_BITS_PER_SAMPLE = 258
_BC6H = range(94, 97)
_JPEG2000_START = b"\xff\x4f\xff\x51"


def bits_per_channel(image: Image.Image, file: BinaryIO) -> int:
    """Return the largest number of bits of a channel of ``image``, which PIL has opened from ``file`` and not loaded.

    For formats that only have 8 bits or fewer, and those whose depth PIL's mode tells, it is 8.
    """
    depth = _DEPTHS.get(image.format or "")
    if depth is None:
        return 8
    position = file.tell()  # where some decoders go on
    try:
        return depth(image, file)
    finally:
        file.seek(position)


def _tiff(image: Image.Image, file: BinaryIO) -> int:
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(_BITS_PER_SAMPLE, 1)
    return max(bits) if isinstance(bits, tuple) else bits


def _ppm(image: Image.Image, file: BinaryIO) -> int:
    arguments = image.tile[0].args  # type: ignore[attr-defined]
    return max(8, arguments[1].bit_length()) if isinstance(arguments, tuple) else 8


def _sgi(image: Image.Image, file: BinaryIO) -> int:
    return 8 * _read(file, 3, 1)[0]


def _dds(image: Image.Image, file: BinaryIO) -> int:
    """Return 16 for BC6H, the one block compression of floats."""
    head = _read(file, 84, 48)
    return 16 if head[:4] == b"DX10" and int.from_bytes(head[44:], "little") in _BC6H else 8


def _jpeg2000(image: Image.Image, file: BinaryIO) -> int:
    start = 0
    if _read(file, 0, 4) != _JPEG2000_START:
        start = next(body.start for kind, body in _boxes(file, range(_size(file))) if kind == b"jp2c")
    components = int.from_bytes(_read(file, start + 40, 2), "big")
    depths = _read(file, start + 42, 3 * components)[::3]
    return max((depth & 0x7F) + 1 for depth in depths)


def _avif(image: Image.Image, file: BinaryIO) -> int:
    """Return the largest depth of the coded images of the file, of which a grid has several."""
    spans = [range(_size(file))]
    for name, skipped in ((b"meta", 4), (b"iprp", 0), (b"ipco", 0), (b"av1C", 2)):
        inner = (body for span in spans for kind, body in _boxes(file, span) if kind == name)
        spans = [range(body.start + skipped, body.stop) for body in inner]
    flags = [_read(file, span.start, 1)[0] for span in spans]
    return max(8 if not flag & 0x40 else 12 if flag & 0x20 else 10 for flag in flags)


_DEPTHS: dict[str, Callable[[Image.Image, BinaryIO], int]] = {
    "TIFF": _tiff,
    "PPM": _ppm,
    "SGI": _sgi,
    "DDS": _dds,
    "JPEG2000": _jpeg2000,
    "AVIF": _avif,
}


def _boxes(file: BinaryIO, span: range) -> Iterator[tuple[bytes, range]]:
    """Yield kind and body of the boxes of JPEG 2000 and AVIF within ``span``."""
    start = span.start
    while start + 8 <= span.stop:
        size, kind = struct.unpack(">I4s", _read(file, start, 8))
        head = 8
        if size == 1:
            size, head = int.from_bytes(_read(file, start + 8, 8), "big"), 16
        elif size == 0:
            size = span.stop - start
        if size < head:
            raise ValueError(f"a box of {size} bytes at byte {start}")
        yield kind, range(start + head, start + size)
        start += size


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"it ends {size - len(data)} bytes too early")
    return data


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)
