"""Walks through the structure of a JPEG, PNG or WebP file, without decoding any of it.

A decoder is then given the pieces of the file that pixels are made of, and no others. So what it does is bounded by
the size of the picture and the limits below: profiles, texts, thumbnails, previews, later frames and whatever lies
behind the end of the picture never reach it, however many and large they are.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

# A photograph has tens of segments; depth maps and thermal data are hundreds of 64 KiB.
MAX_JPEG_SEGMENTS = 4096
# Each pass over a component costs time for all of its blocks, with next to no bytes. libjpeg's own script has 14
# passes, in 10 scans, and those of optimisers a few more. Of pictures of more than 25 megapixels half as many are read,
# so that those of 50 take no longer than these, which are a second or two of one core.
MAX_JPEG_PASSES, MAX_JPEG_PASSES_OF_LARGE, LARGE_JPEG_PIXELS = 40, 20, 25_000_000
# libpng writes chunks of 8 KiB, and an animation has a few a frame.
MAX_CHUNKS = 2**16
# The orientation stands among the first tags.
MAX_EXIF_BYTES = 2**16

# A marker is 0xFF and a byte other than 0x00 and 0xFF; within a scan, restarts are part of the data.
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_MARKER_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_START, _END, _SCAN, _EXIF_SEGMENT = 0xD8, 0xD9, 0xDA, 0xE1
_ALONE = (0x01, *range(0xD0, 0xD8))
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
# Tables, restart intervals, and the two segments that say what the colours are: JFIF's and Adobe's.
_KEPT_SEGMENTS = (*_HUFFMAN_FRAMES, 0xC4, 0xDB, 0xDD, 0xE0, 0xEE)
_KEPT_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANIMATED = 0x02
# EXIF's SHORT, which an orientation is, and LONG, which some programs write.
_INTEGERS = {3: "H", 4: "I"}


class UnsupportedImageError(ValueError):
    """The image may be whole, but it is of a kind that is not read here."""


class DamagedImageError(ValueError):
    """The file is not what its format asks for, or is beyond a limit of this module."""


@dataclass(frozen=True)
class ImageStructure:
    """Describe an image file after a walk.

    Attributes:
        format: ``"JPEG"``, ``"PNG"`` or ``"WEBP"``.
        width, height: in pixels, as stored.
        orientation: 1 to 8 as in EXIF; 1 is upright.
        pieces: what a decoder needs, in order: bytes, or ranges of the file.
        bounded: the decoder's memory is bounded by the size of the picture and of the pieces.
    """

    format: str
    width: int
    height: int
    orientation: int
    pieces: tuple[bytes | range, ...]
    bounded: bool = True


def walk(file: BinaryIO) -> ImageStructure | None:
    """Return the structure of a JPEG, PNG or WebP file; None for any other file.

    Of several frames (APNG, animated WebP, the pictures of an MPO) the first is the image.

    Raises:
        UnsupportedImageError: more than 8 bits per channel, or a coding other than Huffman's in a JPEG.
        DamagedImageError: damaged, or beyond one of the limits.
    """
    source = _Source(file)
    head = source.read(0, 12)
    if head.startswith(b"\xff\xd8\xff"):
        return _walk_jpeg(source)
    if head.startswith(_PNG_SIGNATURE):
        return _walk_png(source)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _walk_webp(source)
    return None


class _Source:
    """Read a file at any position."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)

    def read(self, start: int, size: int) -> bytes:
        if size < 0:  # to a file that would mean all of it
            raise DamagedImageError(f"has a piece of {size} bytes at byte {start}")
        self._file.seek(start)
        return self._file.read(size)

    def read_whole(self, start: int, size: int) -> bytes:
        data = self.read(start, size)
        if len(data) < size:
            raise DamagedImageError(f"ends after {self.size} bytes, within a header")
        return data

    def find(self, pattern: re.Pattern[bytes], start: int) -> int | None:
        """Return the position of the first match, which is of two bytes; blocks of reads let other threads run."""
        size = 2**6
        while start < self.size - 1:
            match = pattern.search(self.read(start, size))
            if match is not None:
                return start + match.start()
            start, size = start + size - 1, min(4 * size, 2**20)
        return None


def _walk_jpeg(source: _Source) -> ImageStructure:
    pieces: list[bytes | range] = [b"\xff\xd8"]
    size, exif = None, b""
    segments = passes = 0
    place = source.find(_MARKER, 2)
    while place is not None:
        marker, start = source.read(place + 1, 1)[0], place + 2
        if marker == _END:
            pieces.append(b"\xff\xd9")
            break
        segments += 1
        if segments > MAX_JPEG_SEGMENTS:
            raise DamagedImageError(f"has more than {MAX_JPEG_SEGMENTS} segments")
        stop = start if marker in _ALONE else _segment_end(source, marker, start)
        if marker in _FRAMES:
            if size is not None:
                raise DamagedImageError("has two frames in one picture")
            size = _frame_size(source.read(start, min(8, stop - start)), marker)
        elif marker == _SCAN:
            if size is None:
                raise DamagedImageError("has a scan before its frame")
            if stop - start < 3:
                raise DamagedImageError(f"has a scan whose header is {stop - start} bytes long")
            passes += source.read_whole(start + 2, 1)[0]
            most = MAX_JPEG_PASSES if size[0] * size[1] <= LARGE_JPEG_PIXELS else MAX_JPEG_PASSES_OF_LARGE
            if passes > most:
                raise DamagedImageError(f"has scans of more than {most} components in all")
            place = source.find(_MARKER_IN_SCAN, stop)
            pieces += [b"\xff\xda", range(start, source.size if place is None else place)]
            continue
        elif marker == _EXIF_SEGMENT and not exif:
            head, _, body = source.read(start + 2, stop - start - 2).partition(b"\0\0")
            exif = body if head == b"Exif" else b""
        if marker in _KEPT_SEGMENTS:
            pieces += [bytes([0xFF, marker]), range(start, stop)]
        place = source.find(_MARKER, stop)
    if size is None or not passes:
        raise DamagedImageError("has no frame and scan before its end")
    return ImageStructure("JPEG", *size, orientation_of(exif), tuple(pieces))


def _segment_end(source: _Source, marker: int, start: int) -> int:
    if marker == _START or not 0xC0 <= marker <= 0xFE or 0xF0 <= marker < 0xFE:
        raise DamagedImageError(f"has a marker FF{marker:02X} where none may be, at byte {start - 2}")
    length = int.from_bytes(source.read_whole(start, 2), "big")
    if length < 2 or start + length > source.size:
        raise DamagedImageError(f"has a segment FF{marker:02X} of {length} bytes, {source.size - start} before its end")
    return start + length


def _frame_size(frame: bytes, marker: int) -> tuple[int, int]:
    if len(frame) < 8:
        raise DamagedImageError("ends within its frame header")
    _, bits, height, width, _ = struct.unpack(">HBHHB", frame)
    _check_depth(bits)
    if marker not in _HUFFMAN_FRAMES:
        raise UnsupportedImageError(f"is a JPEG of a coding (FF{marker:02X}) other than baseline and progressive")
    return _checked_size(width, height)


def _walk_png(source: _Source) -> ImageStructure:
    pieces: list[bytes | range] = [_PNG_SIGNATURE]
    size, exif, data_end, palette = None, b"", 0, False
    for kind, start, body, stop in _chunks(source, len(_PNG_SIGNATURE), source.size, ">I4s", trailer=4):
        if size is None:
            if kind != b"IHDR" or len(body) != 13:
                raise DamagedImageError("does not begin with an image header")
            width, height, bits = struct.unpack(">IIB", source.read_whole(body.start, 9))
            _check_depth(bits)
            size = _checked_size(width, height)
        elif kind == b"IHDR" or (kind == b"PLTE" and palette) or (kind == b"IDAT" and data_end not in (0, start)):
            raise DamagedImageError(f"has a second {kind.decode()}")
        elif kind == b"eXIf" and not exif:
            exif = source.read(body.start, min(len(body), MAX_EXIF_BYTES))
        palette |= kind == b"PLTE"
        if kind in _KEPT_CHUNKS:
            last = pieces[-1]
            joined = range(last.start, stop) if isinstance(last, range) and last.stop == start else None
            pieces[-1 if joined else len(pieces) :] = [joined or range(start, stop)]
        if kind == b"IDAT":
            data_end = stop
        elif kind == b"IEND":
            break
    if size is None or not data_end:
        raise DamagedImageError("has no header and data before its end")
    return ImageStructure("PNG", *size, orientation_of(exif), tuple(pieces))


def _walk_webp(source: _Source) -> ImageStructure:
    """Walk a WebP without its alpha chunk, which stands beside a lossy picture."""
    end = min(source.size, 8 + int.from_bytes(source.read(4, 4), "little"))
    canvas: tuple[int, int] | None = None
    picture: tuple[bytes, range] | None = None
    animation, frame, exif = b"", b"", b""
    for kind, start, body, _ in _chunks(source, 12, end, "<4sI"):
        if kind == b"VP8X" and start == 12:
            extended = source.read_whole(body.start, 10)
            canvas = _checked_size(_uint24(extended[4:7]) + 1, _uint24(extended[7:10]) + 1)
        elif kind in (b"VP8 ", b"VP8L") and picture is None:
            picture = kind, body
            if canvas is None:
                break
        elif kind == b"ANIM" and canvas is not None and not animation:
            animation = source.read(start, 14)
        elif kind == b"ANMF" and animation and picture is None:
            frame = source.read(body.start, 16)
            inner = _chunks(source, body.start + 16, body.stop, "<4sI")
            picture = next(((kind, place) for kind, _, place, _ in inner if kind in (b"VP8 ", b"VP8L")), None)
        elif kind == b"EXIF" and not exif:
            exif = source.read(body.start, min(len(body), MAX_EXIF_BYTES))
    if picture is None:
        raise DamagedImageError("has no picture before its end")
    kind, body = picture
    size = _webp_size(kind, source.read(body.start, 10))
    padding = b"\0" * (len(body) % 2)
    data: list[bytes | range] = [kind + struct.pack("<I", len(body)), body, padding]
    if frame:
        assert canvas is not None
        size = canvas
        length = 16 + 8 + len(body) + len(padding)
        data = [_extended(size), animation, b"ANMF" + struct.pack("<I", length) + frame, *data]
    elif canvas not in (None, size):
        raise DamagedImageError(f"has a picture of {size[0]}x{size[1]} on a canvas of another size")
    head = b"RIFF" + struct.pack("<I", 4 + sum(map(len, data))) + b"WEBP"
    return ImageStructure("WEBP", *size, orientation_of(exif), (head, *data), bounded=kind == b"VP8 ")


def _chunks(
    source: _Source, start: int, end: int, header: str, trailer: int = 0
) -> Iterator[tuple[bytes, int, range, int]]:
    """Yield kind, start, body and end of each chunk of a PNG or RIFF file; RIFF pads to even lengths.

    A PNG's last chunk may be cut off (its decoder says so), a RIFF file's may not.
    """
    for count in range(1, MAX_CHUNKS + 2):
        if end - start < 8:
            return
        fields = struct.unpack(header, source.read_whole(start, 8))
        kind, length = fields if header[0] == "<" else fields[::-1]
        body = range(start + 8, start + 8 + length)
        if count > MAX_CHUNKS:
            raise DamagedImageError(f"has more than {MAX_CHUNKS} chunks")
        if body.stop > end and not trailer:
            raise DamagedImageError(f"has a chunk of {length} bytes, {end - body.start} before its end")
        stop = body.stop + (trailer or length % 2)
        yield kind, start, body, min(stop, end)
        start = stop


def _webp_size(kind: bytes, head: bytes) -> tuple[int, int]:
    if kind == b"VP8L" and head[:1] == b"\x2f" and len(head) >= 5:
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a" and len(head) == 10:
        width, height = struct.unpack_from("<HH", head, 6)
        return _checked_size(width & 0x3FFF, height & 0x3FFF)
    raise DamagedImageError("has a picture without a header")


def _extended(size: tuple[int, int]) -> bytes:
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    return b"VP8X" + struct.pack("<II", 10, _ANIMATED) + sides


def _uint24(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _check_depth(bits: int) -> None:
    if bits > 8:
        raise UnsupportedImageError(f"has {bits} bits per channel; 8 are needed")


def _checked_size(width: int, height: int) -> tuple[int, int]:
    if not width or not height:
        raise DamagedImageError(f"is {width}x{height} pixels large")
    return width, height


def orientation_of(exif: bytes) -> int:
    """Return the orientation of the image in ``exif``'s first directory; 1 where it is missing or none of 1 to 8."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    count = int.from_bytes(exif[start : start + 2], "little" if order == "<" else "big")
    entries = exif[start + 2 : start + 2 + 12 * count]
    whole = entries[: len(entries) // 12 * 12]
    for tag, kind, values, field in struct.iter_unpack(f"{order}HHI4s", whole):
        if tag == 0x0112 and kind in _INTEGERS and values == 1:
            (value,) = struct.unpack_from(order + _INTEGERS[kind], field)
            return value if 1 <= value <= 8 else 1
    return 1
