"""Image files: judged by their structure, within limits, and never degraded in silence."""

from __future__ import annotations

import io
import random
import struct
import types
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from models import random_image
from PIL import Image, ImageOps
from serving import file_of, jpeg_with_an_odd_tag

from sam.images import structure as image_structure
from sam.images.read import ImageTooLargeError, decode, is_image_name, read_image
from sam.images.structure import DamagedImageError, UnsupportedImageError, walk

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


# Pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True, "icc_profile": bytes(200_000), "comment": b"\xff\xda\xff\xd9"}),
        ("JPEG", "RGB", {"restart_marker_blocks": 1, "subsampling": 0, "dpi": (72, 72)}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "L", {}),
        ("MPO", "RGB", {"save_all": True, "append_images": [RGB.rotate(90)]}),
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        ("PNG", "P", {"transparency": 3, "optimize": True}),
        ("PNG", "RGB", {"save_all": True, "append_images": [RGB.rotate(90)]}),
        ("PNG", "RGB", {"save_all": True, "append_images": [RGB.rotate(90)], "default_image": True}),
        *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)),
        ("WEBP", "RGBA", {"exact": True, "icc_profile": bytes(77), "xmp": XMP}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [RGB.rotate(90)]}),
        *((kind, "RGB", {}) for kind in ("TIFF", "BMP", "GIF", "PPM", "AVIF", "DDS", "PCX", "QOI", "SGI", "TGA")),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"save_all": True, "append_images": [RGB.rotate(90)]}),
        ("JPEG2000", "RGB", {}),
        ("JPEG2000", "RGB", {"no_jp2": True}),
    ],
)
def test_pixels_are_those_of_the_first_picture(tmp_path: Path, kind: str, mode: str, options: dict[str, Any]) -> None:
    data = file_of(RGB.convert(mode), kind, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path, data), expected)


def test_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is converted in strips, of which the last may be lower."""
    monkeypatch.setattr("sam.images.read._PIXELS_PER_STRIP", 10 * SIZE[1])
    for value in range(1, 9):
        data = file_of(RGB, "PNG", exif=orientation(value))
        np.testing.assert_array_equal(read(tmp_path, data), decoded_by_pil(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_upright(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    for value in (*range(1, 9), 0, 99):
        exif[0x0112] = value
        data = file_of(RGB, kind, exif=exif)
        np.testing.assert_array_equal(read(tmp_path, data), decoded_by_pil(data))


@pytest.mark.parametrize(
    "data",
    [
        file_of(RGB, "JPEG", xmp=XMP),
        with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(orientation(6).hex().encode()))),
        file_of(RGB, "WEBP", xmp=XMP),
        file_of(RGB, "TIFF", tiffinfo={700: XMP}),
        file_of(RGB, "AVIF", xmp=XMP),
    ],
)
def test_only_exif_turns_an_image(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data).shape == (*SIZE, 3)


def test_exif(tmp_path: Path) -> None:
    """In either byte order, among odd tags, cut off, or too far behind: no error, and no turn where there is none."""
    turned, upright = (*SIZE[::-1], 3), (*SIZE, 3)
    many = orientation(6, before=65_535)
    for exif, shape in (
        (orientation(6, order=">"), turned),
        (orientation(6, long=True), turned),
        (orientation(6, order=">", long=True), turned),
        (orientation(2**16 + 6, long=True), upright),
        (b"Exif\0\0" + orientation(8, before=300), turned),
        (many, upright),
        (orientation(6)[:20], upright),
        (b"II*\0\xff\xff\xff\xff", upright),
        (orientation(6).replace(b"\x12\x01\x03", b"\x12\x01\x02"), upright),
        (b"", upright),
    ):
        assert read(tmp_path, with_chunks(chunk(b"eXIf", exif))).shape == shape
        still = WEBP[12:]
        extended = b"VP8X" + struct.pack("<II", 10, 0x08) + bytes([SIZE[1] - 1, 0, 0, SIZE[0] - 1, 0, 0])
        info = b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
        assert read(tmp_path, riff(extended, still, info)).shape == shape
        if len(exif) < 60_000:
            assert read(tmp_path, JPEG[:2] + segment(0xE1, b"Exif\0\0" + exif) + JPEG[2:]).shape == shape
    assert read(tmp_path, jpeg_with_an_odd_tag(np.array(RGB))).shape == turned


def test_a_long_orientation_turns_every_format(tmp_path: Path) -> None:
    """OpenCV follows it too, of the byte order of which it reads the lower half."""
    for kind in ("JPEG", "PNG", "WEBP", "AVIF"):
        for order in "<>":
            data = file_of(RGB, kind, exif=b"Exif\0\0" + orientation(6, order=order, long=True))
            assert read(tmp_path, data).shape == (*SIZE[::-1], 3), (kind, order)
    data = file_of(RGB, "JPEG", exif=b"Exif\0\0" + orientation(6, long=True))
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert theirs is not None
    assert theirs.shape == read(tmp_path, data).shape


@pytest.mark.parametrize("data", [JPEG, PNG, WEBP])
def test_what_lies_behind_the_end_does_not_count(tmp_path: Path, data: bytes) -> None:
    """The video of a motion photograph, where by chance anything stands, and a second picture of another size."""
    expected = decoded_by_pil(data)
    for behind in (b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 100_000, file_of(RGB.resize((9, 9)), "JPEG"), b"\xff\xd9"):
        np.testing.assert_array_equal(read(tmp_path, data + behind), expected)


def test_a_scan_in_a_thumbnail_is_none(tmp_path: Path) -> None:
    thumbnails = b"".join(segment(0xE2, b"\xff\xda" * 30_000) for _ in range(3))
    np.testing.assert_array_equal(read(tmp_path, JPEG[:2] + thumbnails + JPEG[2:]), decoded_by_pil(JPEG))


def test_no_name_of_the_process_is_written(tmp_path: Path) -> None:
    """PIL's limit on pixels is a variable of the process: it is not written, not even for a moment."""

    class Watched(types.ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            pytest.fail(f"PIL.Image.{name} was set")

    before, kind = Image.MAX_IMAGE_PIXELS, type(Image)
    files = {name: file_of(Image.new("L", (1000, 1000)), name) for name in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")}
    Image.MAX_IMAGE_PIXELS = 400_000
    try:
        Image.__class__ = Watched  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in ("JPEG", "PNG", "BMP"):
                assert read(tmp_path, files[name]).shape == (1000, 1000, 3)
            for name in ("WEBP", "TIFF"):  # PIL's classes for them ask, whatever opens them
                with pytest.raises(UnsupportedImageError, match="more pixels than PIL's MAX_IMAGE_PIXELS allows"):
                    read(tmp_path, files[name])
    finally:
        types.ModuleType.__setattr__(Image, "__class__", kind)
        Image.MAX_IMAGE_PIXELS = before


# Depth -------------------------------------------------------------------------------------------------------


def deep_png(colour: int, channels: int) -> bytes:
    header = struct.pack(">IIBBBBB", 9, 8, 16, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(9 * channels * 2)) * 8)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep_tiff(bits: int, kind: int, samples: int) -> bytes:
    """Uncompressed, 4x4, of integers (1) or floats (3)."""
    shorts = struct.pack(f"<{samples}H", *[bits] * samples)
    tags = [(256, 4), (257, 4), (258, bits), (259, 1), (262, 2 if samples == 3 else 1), (273, 300), (277, samples),
            (278, 4), (279, 16 * samples * bits // 8), (339, kind)]  # fmt: skip
    entries = b""
    for tag, value in tags:
        if tag == 258 and samples == 3:
            entries += struct.pack("<HHII", tag, 3, 3, 200)
        else:
            entries += struct.pack("<HHIHxx", tag, 3, 1, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return (head.ljust(200, b"\0") + shorts).ljust(300, b"\0") + bytes(16 * samples * bits // 8)


def jpeg_of_depth(bits: int) -> bytes:
    place = JPEG.index(b"\xff\xc0") + 4
    return JPEG[:place] + bytes([bits]) + JPEG[place + 1 :]


def sixteen_bit_jpeg2000(jp2: bool) -> bytes:
    return file_of(Image.fromarray(np.zeros((9, 9), np.uint16)), "JPEG2000", no_jp2=not jp2)


def deep_avif(bits: int) -> bytes:
    depth = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_SPEED, 9]
    return cv2.imencode(".avif", np.zeros((64, 64, 3), np.uint16), depth)[1].tobytes()


def bc6h_dds() -> bytes:
    head = bytearray(file_of(RGB, "DDS", pixel_format="BC5"))
    assert head[84:88] == b"DX10"
    head[128:132] = struct.pack("<I", 95)
    return bytes(head)


@pytest.mark.parametrize(
    ("data", "bits"),
    [
        *((deep_png(colour, channels), 16) for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4))),
        (deep_tiff(16, 1, 3), 16),
        (deep_tiff(16, 1, 1), 16),
        (deep_tiff(32, 3, 1), 32),
        (deep_tiff(12, 1, 1), 12),
        (jpeg_of_depth(12), 12),
        (b"P6 4 4 65535 " + bytes(96), 16),
        (b"P6 4 4 1023 " + bytes(96), 10),
        (b"P3 1 1 4095 1 2 3 ", 12),
        (b"P5 4 4 4095 " + bytes(32), 12),
        (struct.pack(">HBBHHHH", 474, 0, 2, 3, 4, 4, 3).ljust(512, b"\0") + bytes(96), 16),
        (sixteen_bit_jpeg2000(jp2=True), 16),
        (sixteen_bit_jpeg2000(jp2=False), 16),
        (deep_avif(10), 10),
        (deep_avif(12), 12),
        (bc6h_dds(), 16),
    ],
)
def test_more_than_8_bits_are_refused(tmp_path: Path, data: bytes, bits: int) -> None:
    with pytest.raises(UnsupportedImageError, match=rf"image has {bits} bits per channel; 8 are needed$"):
        read(tmp_path, data)


def test_grey_and_alpha(tmp_path: Path) -> None:
    for shape in ((8, 9), (8, 9, 4)):
        assert read(tmp_path, file_of(np.zeros(shape, np.uint8))).shape == (8, 9, 3)


def test_other_refusals(tmp_path: Path) -> None:
    arithmetic = JPEG.replace(b"\xff\xc0", b"\xff\xc9", 1)
    with pytest.raises(ValueError, match=r"image is a JPEG of a coding \(FFC9\) other than baseline and progressive$"):
        read(tmp_path, arithmetic)
    for data in (b"", b"%PDF-1.4\n", file_of(RGB, "ICO"), b"\x89HDF\r\n\x1a\n" + bytes(99), b"\0\0\1\xba" + bytes(99)):
        with pytest.raises(ValueError, match=r"image is not an image in a known format$"):
            read(tmp_path, data)
    with pytest.raises(ValueError, match=r"has pixels of mode LAB; 8 bits per channel are needed$"):
        read(tmp_path, file_of(Image.new("LAB", (9, 9)), "TIFF"))


@pytest.mark.parametrize("channels", [2, 5, 7])
def test_channels_that_are_not_read(tmp_path: Path, channels: int) -> None:
    """The format is named: it is a TIFF, if no photograph."""
    with pytest.raises(UnsupportedImageError, match=r"image begins as a TIFF file, but of a kind that is not read: \w"):
        read(tmp_path, deep_tiff(8, 1, channels))


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"^the image file must name a file or folder, got an empty name$"):
        read_image("")
    with pytest.raises(ValueError, match=r"got the URL https://a\.b/c\.png: download it first$"):
        read_image("https://a.b/c.png")


# Damage and limits -------------------------------------------------------------------------------------------


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
            places = rng.integers(2, min(len(data), rng.choice([60, 10_000])), 3)
            damaged[places] = rng.integers(0, 256, 3)
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


# Names -------------------------------------------------------------------------------------------------------


def test_names_of_images() -> None:
    for name in ("a.jpg", "A.JPEG", "a.png", "a.webp", "a.tif", "a.bmp", "a.gif", "a.ppm", "a.avif", "a.jp2", "a.mpo"):
        assert is_image_name(Path(name)), name
    for name in (
        "._a.jpg",
        ".a.png",
        "a.pdf",
        "a.h5",
        "a.mpg",
        "a.eps",
        "a.ico",
        "a.wmf",
        "a.txt",
        "a.fits",
        "jpg",
        "a",
    ):
        assert not is_image_name(Path(name)), name


def test_formats_of_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pillow-heif and its like register with PIL; here a format that is a PNG behind four bytes."""

    def opened(file: Any, name: Any) -> Any:
        file.seek(4)
        return Image.open(io.BytesIO(file.read()))

    Image.init()
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN, "PLUG": (opened, lambda head: head.startswith(b"PLUG"))})
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION, ".plug": "PLUG"})
    assert (read(tmp_path, b"PLUG" + PNG) == decoded_by_pil(PNG)).all()
    assert is_image_name(Path("a.plug"))
    with pytest.raises(UnsupportedImageError, match="is not an image in a known format"):
        read(tmp_path, b"GULP" + PNG)
