"""Decoding of uploads can be ended, and its memory is bounded."""

from __future__ import annotations

import io
import struct
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models import TINY, random_image, random_model
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra serve")
from local_service import Local
from serving import file_of
from waiting import SECONDS, wait_until

from sam.engine import Engine
from sam.images import decode_apart
from sam.images.read import decode
from sam.images.structure import walk
from sam.server import Settings
from sam.server.errors import ApiError
from sam.server.uploads import decode_image

IMAGE = random_image(300, 200)
LOSSLESS = file_of(IMAGE, "WEBP", lossless=True)


class GoneError(BaseException):
    """As a cancellation is none of the errors that decoders of damaged files raise."""


def gone_at(call: int) -> Callable[[], None]:
    calls = iter(range(1, call))

    def check() -> None:
        if next(calls, None) is None:
            raise GoneError

    return check


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decoding_asks_whether_to_go_on(kind: str) -> None:
    """With every piece of the file it reads, so at least once in 64 KiB."""
    data = file_of(random_image(900, 700), kind)
    calls: list[None] = []
    decode_image(io.BytesIO(data), 10**6, lambda: calls.append(None))
    assert len(calls) >= (len(data) / 2**16 if kind != "WEBP" else 1)  # WebP is read whole, then decoded
    for call in range(1, min(len(calls), 4)):
        with pytest.raises(GoneError):
            decode_image(io.BytesIO(data), 10**6, gone_at(call))


def test_a_decoding_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the deadline: the thread, and with it the place, is free again."""
    begun, ended = threading.Event(), threading.Event()

    def endless(file: object, max_pixels: int, check_cancelled: Callable[[], None]) -> None:
        begun.set()
        try:
            while not ended.wait(0.01):
                check_cancelled()
        finally:
            ended.set()

    monkeypatch.setattr("sam.server.app.decode_image", endless)
    local = Local(Engine(random_model(TINY), deadline=0.3), Settings())
    try:
        while not begun.is_set():  # a machine that is busy may not come so far in time
            answer = local.error("/v1/embed", file_of(IMAGE))
            local.engine.deadline *= 2
        assert answer == (504, "deadline_exceeded")
        assert ended.wait(SECONDS)
        wait_until(lambda: local.service._decoding.borrowed_tokens == 0)
    finally:
        local.close()


class Bits:
    """Bits of a lossless WebP, low ones first."""

    def __init__(self) -> None:
        self.value, self.length = 0, 0

    def put(self, value: int, length: int) -> None:
        self.value |= value << self.length
        self.length += length

    def bytes(self) -> bytes:
        return self.value.to_bytes(self.length // 8 + 64, "little")


def webp_of_many_tables(side: int) -> bytes:
    """A grey square of which each 4x4 pixels have Huffman tables of their own, as the format allows."""
    bits = Bits()
    for value, length in ((0x2F, 8), (side - 1, 14), (side - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (1, 1), (0, 3)):
        bits.put(value, length)
    bits.put(0, 1)
    for symbols in (280, 256):  # green and red of the picture that numbers the tables: 256 codes of 8 bits
        bits.put(0, 1)
        bits.put(12 - 4, 4)
        for length in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8):
            bits.put(int(length in (0, 8)), 3)
        bits.put(0, 1)
        bits.put((1 << 256) - 1, symbols)
    for _ in range(3):
        bits.put(0b0001, 4)
    groups = (side // 4) ** 2
    reverse = [int(f"{value:08b}"[::-1], 2) for value in range(256)]
    numbers = b"".join(bytes([reverse[group & 255], reverse[group >> 8]]) for group in range(groups))
    bits.put(int.from_bytes(numbers, "little"), 16 * groups)
    bits.put(int("0001" * 5 * groups, 2), 20 * groups)
    data = bits.bytes()
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def test_lossless_webp_has_the_memory_that_its_size_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a small file of very many tables is refused, which with more memory would be an image."""
    bomb = webp_of_many_tables(600)
    assert len(bomb) < 110_000
    with pytest.raises(ApiError, match="bad_image"):
        decode_image(io.BytesIO(bomb), 10**6)
    monkeypatch.setattr(decode_apart, "_BYTES_OF_TABLES", 2**30)
    assert decode_image(io.BytesIO(bomb), 10**6).shape == (600, 600, 3)


@pytest.mark.parametrize("options", [{}, {"exif": b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}])
def test_a_process_of_its_own_decodes_the_same(options: dict[str, Any]) -> None:
    data = file_of(Image.fromarray(IMAGE).convert("RGBA"), "WEBP", lossless=True, **options)
    structure = walk(io.BytesIO(data))
    assert structure is not None
    assert not structure.bounded
    expected = decode(io.BytesIO(data), structure, None)
    np.testing.assert_array_equal(decode_image(io.BytesIO(data), 10**6), expected)
    with pytest.raises(ApiError, match="image_too_large"):
        decode_image(io.BytesIO(data), IMAGE.size // 3 - 1)
    with pytest.raises(ApiError, match="bad_image"):
        decode_image(io.BytesIO(data.replace(data[60:90], bytes(30))), 10**6)


def test_the_process_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(decode_apart, "_CHILD", f"import time; time.sleep({SECONDS})")

    def check() -> None:
        if started:
            raise GoneError

    with pytest.raises(GoneError):
        decode_image(io.BytesIO(LOSSLESS), 10**6, check)
    assert [process.returncode for process in started] == [-9]


def test_the_process_does_not_load_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    child = decode_apart._CHILD + "\nassert 'torch' not in sys.modules and 'sam.images' in sys.modules\n"
    monkeypatch.setattr(decode_apart, "_CHILD", child)
    assert decode_image(io.BytesIO(LOSSLESS), 10**6).shape == IMAGE.shape
