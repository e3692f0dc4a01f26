"""From the bytes of a request to an image and JSON, never holding more than the limits allow."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..image_structure import DamagedImageError, UnsupportedImageError, walk
from ..images import ImageTooLargeError, decode
from .errors import ApiError
from .settings import Settings

_MAX_NAMES = 16


@dataclass(frozen=True)
class Upload:
    """What a request brought.

    Attributes:
        image: a file that holds it.
        text: a JSON document, or the text of each other part.
    """

    image: BinaryIO | None
    text: bytes | dict[str, str]

    @property
    def text_size(self) -> int:
        return len(self.text) if isinstance(self.text, bytes) else sum(map(len, self.text.values()))

    def values(self) -> dict[str, Any]:
        """The text, read. Parts are JSON where they are JSON, else strings: ``output=png`` needs no quotes.

        Raises:
            ApiError: a document that is no JSON object.
        """
        if isinstance(self.text, bytes):
            values = _json(self.text)
            if not isinstance(values, dict):
                raise ApiError("invalid_request", [])
            return values
        return {name: _json_or_text(part) for name, part in self.text.items()}


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
        yield Upload(None, body)
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


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
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
    image: BinaryIO | None = None
    text: dict[str, str] = {}
    for name, value in items:
        if name in text or (name == "image") != isinstance(value, UploadFile):
            raise ApiError("bad_request")
        if isinstance(value, UploadFile):
            image = value.file
        else:
            text[name] = value
    return Upload(image, text)


def _json(text: bytes | str) -> Any:
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        raise ApiError("bad_request") from None


def _json_or_text(text: str) -> Any:
    try:
        return _json(text)
    except ApiError:
        return text


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """No request has objects of many names, and checking them would take long."""
    if len(pairs) > _MAX_NAMES:
        raise ValueError("too many names")
    return dict(pairs)


def decode_image(file: BinaryIO, max_pixels: int, check_cancelled: Callable[[], None] = lambda: None) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file -> [H, W, 3] uint8 RGB, upright; alpha is dropped.

    Args:
        check_cancelled: called now and then while it decodes; what it raises ends the decoding.

    Raises:
        ApiError: another format, more pixels than the limit (by the header, before decoding), or damaged.
    """
    try:
        structure = walk(file)
        if structure is None:
            raise ApiError("unsupported_image")
        return decode(file, structure, max_pixels, check_cancelled)
    except UnsupportedImageError:
        raise ApiError("unsupported_image") from None
    except ImageTooLargeError:
        raise ApiError("image_too_large") from None
    except DamagedImageError:
        raise ApiError("bad_image") from None
