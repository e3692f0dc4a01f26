"""Image files: their pixels are those of the first picture, upright and never degraded in silence."""

from __future__ import annotations

import io
import struct
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from image_files import (
    JPEG,
    PNG,
    RGB,
    SIZE,
    WEBP,
    XMP,
    chunk,
    decoded_by_pil,
    orientation,
    read,
    riff,
    segment,
    with_chunks,
)
from PIL import Image
from serving import file_of, jpeg_with_an_odd_tag

from sam.images.read import is_image_name, read_image
from sam.images.structure import UnsupportedImageError

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
