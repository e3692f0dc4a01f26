"""From the bytes of a request to an image and JSON, never holding more than the limits allow."""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from fastapi import Request
from PIL import Image, ImageOps
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from .errors import ApiError
from .settings import Settings

_FORMATS = ("JPEG", "PNG", "WEBP")
# Modes with 8 bits a channel, which convert to RGB without losing range.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Upload:
    """What a request brought: a file that holds the image, and the other values."""

    image: BinaryIO | None
    values: dict[str, Any]


@asynccontextmanager
async def read_upload(request: Request, settings: Settings) -> AsyncIterator[Upload]:
    """The body of a request, multipart or JSON. Files over a mebibyte lie on disk until the block ends.

    Raises:
        ApiError: too large, of another type, or not readable.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError("unsupported_media_type")
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        body = b"".join([chunk async for chunk in _limited(request, settings.max_text_bytes)])
        yield Upload(None, _object(_json(body)))
    elif kind == "multipart/form-data":
        parser = MultiPartParser(
            request.headers,
            _limited(request, settings.max_body_bytes),
            max_files=1,
            max_fields=8,
            max_part_size=settings.max_text_bytes,
        )
        try:
            form = await parser.parse()
        except (MultiPartException, FormParserError, ValueError, LookupError):
            raise ApiError("bad_request") from None
        try:
            yield _upload_of(form.multi_items())
        finally:
            await form.close()
    else:
        raise ApiError("unsupported_media_type")


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's pieces, counted as they come; a length that is announced is believed when it is too large."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise ApiError("payload_too_large")
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise ApiError("payload_too_large")
        yield chunk


def _upload_of(items: list[tuple[str, Any]]) -> Upload:
    """Text parts are JSON where they are JSON, else strings: ``output=png`` needs no quotes."""
    image: BinaryIO | None = None
    values: dict[str, Any] = {}
    for name, value in items:
        if name in values or (name == "image") != isinstance(value, UploadFile):
            raise ApiError("bad_request")
        if isinstance(value, UploadFile):
            image = value.file
        else:
            try:
                values[name] = _json(value)
            except ApiError:
                values[name] = value
    return Upload(image, values)


def _json(text: bytes | str) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        raise ApiError("bad_request") from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError("invalid_request", [])
    return value


def decode_image(file: BinaryIO, max_pixels: int) -> np.ndarray:
    """A JPEG, PNG or WebP file -> [H, W, 3] uint8 RGB, upright; alpha is dropped.

    Raises:
        ApiError: another format, more pixels than the limit (by the header, before decoding), or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL about sizes (the limit here is stricter) and odd metadata
            try:
                image = Image.open(file, formats=_FORMATS)
            except Image.DecompressionBombError:
                raise ApiError("image_too_large") from None
            except Exception:
                raise ApiError("unsupported_image") from None
            with image:
                if image.width * image.height > max_pixels:
                    raise ApiError("image_too_large")
                if image.mode not in _MODES:
                    raise ApiError("unsupported_image")
                # Decoders of hostile bytes raise whatever they please, struct.error and KeyError among it.
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (ApiError, MemoryError):
        raise
    except Exception:
        raise ApiError("bad_image") from None
