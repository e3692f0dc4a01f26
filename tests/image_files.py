"""Image files made by hand: pieces of JPEG, PNG and WebP, and EXIF with an orientation."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from models import random_image
from PIL import Image, ImageOps
from serving import file_of

from sam.images.read import read_image

SIZE = (61, 97)
RGB = Image.fromarray(random_image(*SIZE)).resize(SIZE[::-1], Image.Resampling.BOX)
JPEG, PNG, WEBP = (file_of(RGB, kind) for kind in ("JPEG", "PNG", "WEBP"))
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:tiff="t" tiff:Orientation="6"/></x:xmpmeta>'


def read(tmp_path: Path, data: bytes) -> np.ndarray:
    (tmp_path / "image").write_bytes(data)
    return read_image(tmp_path / "image")


def decoded_by_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks: bytes) -> bytes:
    """The PNG with chunks behind its header."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def orientation(value: int, before: int = 0, order: str = "<", long: bool = False) -> bytes:
    """EXIF of ``before`` tags of no meaning and the orientation, a SHORT or a LONG."""
    tag = f"{order}HHIHxx"
    kind, field = (4, "I") if long else (3, "Hxx")
    entries = struct.pack(tag, 0x0100, 3, 1, 9) * before + struct.pack(f"{order}HHI{field}", 0x0112, kind, 1, value)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IH", 8, min(before + 1, 65535)) + entries + bytes(4)
