"""The structure of image files: damage, limits, and what does not reach the decoder."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_files import JPEG, PNG, RGB, SIZE, WEBP, chunk, decoded_by_pil, orientation, read, riff, segment, with_chunks
from models import random_image
from PIL import Image
from serving import file_of

from sam.images import structure as image_structure
from sam.images.read import ImageTooLargeError, decode, read_image
from sam.images.structure import DamagedImageError, UnsupportedImageError, walk


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xd8\xff", "has no frame and scan before its end"),
        (JPEG[:2] + b"\xff\xd9", "has no frame and scan before its end"),
        (JPEG[:2] + JPEG, "has a marker FFD8 where none may be, at byte 2"),
        (JPEG[:-2] + b"\xff\x5a\xff\xd9", "has a marker FF5A where none may be, at byte"),
        (JPEG[:2] + b"\xff\xe1\0\1", "has a segment FFE1 of 1 bytes, 2 before its end"),
        (JPEG[:2] + b"\xff\xe1\xff\xff" + JPEG[2:300], "has a segment FFE1 of 65535 bytes, 300 before its end"),
        (JPEG[:2] + b"\xff\xe1\0", "ends after 5 bytes, within a header"),
        (JPEG[:2] + segment(0xDA, b"\1\1\0\0\x3f\0"), "has a scan before its frame"),
        (JPEG.replace(b"\xff\xda", JPEG[JPEG.index(b"\xff\xc0") :][:19] + b"\xff\xda", 1), "has two frames"),
        (JPEG.replace(struct.pack(">HH", *SIZE), bytes(4), 1), "is 0x0 pixels large"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded: image file is truncated"),
        (PNG[:8] + PNG[33:], "does not begin with an image header"),
        (PNG[:33] + PNG[-12:], "has no header and data before its end"),
        (with_chunks(PNG[8:33]), "has a second IHDR"),
        (with_chunks(chunk(b"PLTE", bytes(3)), chunk(b"PLTE", bytes(3))), "has a second PLTE"),
        (PNG[:-12] + chunk(b"tEXt", b"") + chunk(b"IDAT", b"") + PNG[-12:], "has a second IDAT"),
        (PNG[: len(PNG) // 2], "cannot be decoded: image file is truncated"),
        (PNG[:40], "has no header and data before its end"),
        (WEBP[: len(WEBP) // 2], "before its end"),
        (riff(b"abcd\0\0\0\0"), "has no picture before its end"),
        (riff(b"VP8 " + struct.pack("<I", 10) + bytes(10)), "has a picture without a header"),
        (riff(b"VP8X" + struct.pack("<II", 10, 0) + bytes(6), WEBP[12:]), "has a picture of 97x61 on a canvas of an"),
    ],
)
def test_damage(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DamagedImageError, match=r"image is a damaged image: it ") as caught:
        read(tmp_path, data)
    assert message in str(caught.value)


def test_damage_that_pillow_has_other_errors_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "damaged.dds"
    whole = file_of(random_image(8, 9), "DDS")
    for place, value in ((80, 0), (12, 255)):  # NotImplementedError, ValueError
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=r"dds is a damaged image: it cannot be decoded: (Unknown pixel|not enough)"
        ):
            read_image(path)

    def out_of_memory(image: Image.Image) -> None:
        raise MemoryError

    path.write_bytes(whole)
    monkeypatch.setattr(Image.Image, "load", out_of_memory)
    with pytest.raises(MemoryError):
        read_image(path)


def test_any_bytes_are_an_image_or_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    outcomes = set()
    for data in (JPEG, PNG, WEBP, file_of(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)])):
        for _ in range(50):
            damaged = np.frombuffer(data, np.uint8).copy()
            positions = rng.integers(2, min(len(data), rng.choice([60, 10_000])), 3)
            damaged[positions] = rng.integers(0, 256, 3)
            try:
                read(tmp_path, damaged.tobytes()[: rng.integers(20, 2 * len(data))])
                outcomes.add(None)
            except ValueError as error:
                outcomes.add(type(error))
    assert outcomes >= {None, DamagedImageError}


class Counted(io.BytesIO):
    """A file that counts what is read of it."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def hostile() -> Iterator[tuple[bytes, str]]:
    """Files of several MiB that a decoder or its caller would walk for seconds, and what is said of them."""
    number = 2**19
    empty = chunk(b"tEXt", b"")
    still = WEBP[12:]
    extended = b"VP8X" + struct.pack("<II", 10, 0) + bytes([SIZE[1] - 1, 0, 0, SIZE[0] - 1, 0, 0])
    animated = b"VP8X" + struct.pack("<II", 10, 2) + bytes([SIZE[1] - 1, 0, 0, SIZE[0] - 1, 0, 0])
    animation = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    segments, chunks = "has more than 4096 segments", "has more than 65536 chunks"
    yield JPEG[:2] + b"\xff\xe1\x00\x09Exif\0\0a" * number + JPEG[2:], segments
    yield JPEG[:2] + b"\xff\xfe\x00\x02" * number + JPEG[2:], segments
    yield JPEG[:-2] + b"\xff\xd0" * number + segment(0xFE, b"") * number + JPEG[-2:], segments
    yield JPEG[:2] + segment(0xFE, b"") + b"junk" * 2000 + b"\xff\x01" * number + JPEG[2:], segments
    yield with_chunks(empty * number), chunks
    yield with_chunks(chunk(b"IDAT", b"") * number), chunks
    yield riff(extended, still, b"abcd\0\0\0\0" * number), chunks
    yield riff(extended, b"abcd\0\0\0\0" * number, still), chunks
    frame = bytes(16) + b"abcd\0\0\0\0" * number
    yield riff(animated, animation, b"ANMF" + struct.pack("<I", len(frame)) + frame), chunks


def test_many_pieces_are_refused_after_few_of_them() -> None:
    for data, message in hostile():
        file = Counted(data)
        with pytest.raises(DamagedImageError, match=message):
            walk(file)
        assert file.count < 2**21


@pytest.mark.parametrize("length", range(2, 9))
def test_exif_lies_within_its_segment(tmp_path: Path, length: int) -> None:
    """A segment that says it is shorter than its name: what would be its text is junk between segments."""
    short = b"\xff\xe1" + struct.pack(">H", length) + b"Exif\0\0"
    data = JPEG[:2] + short + orientation(6) + segment(0xE1, b"Exif\0\0" + orientation(8)) + JPEG[2:]
    (tmp_path / "image").write_bytes(data + bytes(2**20))
    with open(tmp_path / "image", "rb") as file:
        structure = walk(file)
    assert structure is not None
    assert structure == walk(io.BytesIO(data + bytes(2**20)))
    assert structure.orientation == 8


@pytest.mark.parametrize("length", [2, 3, 7])
def test_headers_lie_within_their_segments(length: int) -> None:
    frame, scan = JPEG.index(b"\xff\xc0"), JPEG.index(b"\xff\xda")
    with pytest.raises(DamagedImageError, match="ends within its frame header"):
        walk(io.BytesIO(JPEG[: frame + 2] + struct.pack(">H", length) + JPEG[frame + 4 :]))
    data = JPEG[: scan + 2] + struct.pack(">H", length) + JPEG[scan + 4 :]
    if length == 2:
        with pytest.raises(DamagedImageError, match="has a scan whose header is 2 bytes long"):
            walk(io.BytesIO(data))
    else:
        assert walk(io.BytesIO(data)) is not None  # the decoder says what it thinks of it


def test_nothing_of_a_negative_size_is_read() -> None:
    with pytest.raises(DamagedImageError, match="has a piece of -6 bytes at byte 10"):
        image_structure._Source(io.BytesIO(JPEG)).read(10, -6)


def test_mutated_files_are_walked_or_refused(tmp_path: Path) -> None:
    """Alike from a file and from memory."""
    chance = random.Random(0)
    exif = {"exif": orientation(6)}
    whole = [
        file_of(RGB, kind, **exif, **options)
        for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}))
    ]
    whole.append(file_of(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)], **exif))
    refused = 0
    with open(tmp_path / "image", "w+b") as file:
        for _ in range(1500):
            data = bytearray(chance.choice(whole))
            for _ in range(chance.randint(1, 4)):
                place = chance.randrange(min(len(data), chance.choice([80, 400, 5000])))
                change = chance.choice([bytes([chance.choice([0, 1, 2, 255, 0xD9, 0xE1])]), chance.randbytes(3)])
                data[place : place + chance.choice([0, len(change), 8])] = change
            file.truncate(0)
            file.seek(0)
            file.write(data)
            outcomes = []
            for source in (file, io.BytesIO(data)):
                try:
                    outcomes.append(walk(source))
                except (DamagedImageError, UnsupportedImageError) as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]
            refused += isinstance(outcomes[0], str)
    assert 100 < refused < 1400


def test_as_many_pieces_as_the_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(1 for _ in image_structure._chunks(image_structure._Source(io.BytesIO(PNG)), 8, len(PNG), ">I4s", 4))
    monkeypatch.setattr(image_structure, "MAX_CHUNKS", count)
    read(tmp_path, PNG)
    monkeypatch.setattr(image_structure, "MAX_CHUNKS", count - 1)
    with pytest.raises(DamagedImageError, match=f"more than {count - 1} chunks"):
        read(tmp_path, PNG)


def test_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(RGB, "JPEG", progressive=True)
    last_scan = data[data.rfind(b"\xff\xc4") : -2]
    most = image_structure.MAX_JPEG_PASSES - 14
    np.testing.assert_array_equal(read(tmp_path, data), decoded_by_pil(data))
    assert walk(io.BytesIO(data[:-2] + last_scan * most + data[-2:])) is not None
    with pytest.raises(DamagedImageError, match="has scans of more than 40 components in all"):
        read(tmp_path, data[:-2] + last_scan * (most + 1) + data[-2:])


@pytest.mark.parametrize(("height", "most"), [(5000, 40), (5001, 20), (60_000, 20)])
def test_large_pictures_have_fewer_scans(height: int, most: int) -> None:
    """A pass takes as long as the picture is large; libjpeg's own 14 are read of every size."""
    data = file_of(RGB, "JPEG", progressive=True)
    size = data.index(b"\xff\xc2") + 5
    data = data[:size] + struct.pack(">HH", height, 5000) + data[size + 4 :]
    last_scan = data[data.rfind(b"\xff\xc4") : -2]
    assert walk(io.BytesIO(data[:-2] + last_scan * (most - 14) + data[-2:])) is not None
    with pytest.raises(DamagedImageError, match=f"has scans of more than {most} components in all"):
        walk(io.BytesIO(data[:-2] + last_scan * (most - 13) + data[-2:]))


def test_what_is_no_picture_does_not_reach_the_decoder() -> None:
    """Bombs of text and profiles, tags, later frames: a decoder gets about as much as of the file without them."""
    bomb = zlib.compress(bytes(10**7))
    exif = orientation(6, before=65_535)
    files = [
        (PNG, with_chunks(chunk(b"iCCP", b"x\0\0" + bomb), chunk(b"zTXt", b"x\0\0" + bomb), chunk(b"eXIf", exif))),
        (PNG, file_of(RGB, "PNG", save_all=True, append_images=[RGB.rotate(turn) for turn in range(9)])),
        (JPEG, file_of(RGB, "JPEG", icc_profile=bytes(10**6), comment=bytes(60_000), exif=bytes(60_000))),
        (WEBP, file_of(RGB, "WEBP", icc_profile=bytes(10**6), exif=bytes(10**6), xmp=bytes(10**6))),
        (WEBP, file_of(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(turn) for turn in range(9)])),
    ]
    for plain, data in files:
        structure = walk(io.BytesIO(data))
        assert structure is not None
        assert sum(map(len, structure.pieces)) < 1.2 * len(plain) + 200 < len(data)


def test_a_limit_that_is_no_number_is_kept_by_no_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"^max_megapixels must not be negative, got -1$"):
        read_image(tmp_path / "image", -1)
    for limit in (float("nan"), 0):
        with pytest.raises(
            ImageTooLargeError, match=rf"has 0.0 megapixels \(97x61\), more than the limit of {limit:g}; "
        ):
            read_image(tmp_path / "image", limit)


def test_nothing_is_logged_of_what_a_file_says(caplog: pytest.LogCaptureFixture) -> None:
    """65,535 tags were 17 MB of log; a warning with the picture's size in its text stays in the process for good."""
    tags = orientation(6, before=65_535)
    with caplog.at_level("DEBUG"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (with_chunks(chunk(b"eXIf", tags)), file_of(RGB, "WEBP", exif=tags), JPEG):
            structure = walk(io.BytesIO(data))
            assert structure is not None
            decode(io.BytesIO(data), structure, None)
    assert len(caplog.records) < 20
