"""Bodies of requests, read into their parts within limits of size and time."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

import anyio
import anyio.to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .errors import ApiError
from .settings import MEBIBYTE, Settings

# Bytes of a body that are read without one of the places for large bodies.
SMALL_BODY = 2**16
# Bytes per second at which a body must arrive, after a grace of `Settings.body_seconds`.
MIN_RATE = 2**15
_MAX_FIELDS = 8
_MAX_CONTENT_TYPE = 512
# Larger pieces are parsed in a thread, and so many bytes at a time.
_SMALL_PIECE = 2**13
# What the parser goes through byte by byte, in Python: delimiters, of which a form has one a part and data none
# (RFC 2046, 5.1.1), and bytes in a row that are nothing, such as a delimiter's padding.
_MAX_DELIMITERS, _MAX_NOTHING = 4 * _MAX_FIELDS, 2**13
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Upload:
    """The parts of one request.

    Attributes:
        file: the part that is a file, if there is one; over a mebibyte it lies on disk.
        text: a JSON document, or the text of each other part.
        close: releases memory and disk; may be called again.
    """

    file: BinaryIO | None
    text: bytes | dict[str, str]
    close: Callable[[], None]

    @property
    def text_size(self) -> int:
        return len(self.text) if isinstance(self.text, bytes) else sum(map(len, self.text.values()))


class BodyReader:
    """Read bodies: large ones a few at a time, all together within a budget of bytes.

    Attributes:
        held: bytes of bodies that are being read, or whose files are not decoded.
        large: places for bodies of more than :data:`SMALL_BODY` that are being read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.held = 0
        self.large = anyio.CapacityLimiter(settings.max_uploads)
        self._parsing = anyio.CapacityLimiter(1)

    async def read(self, request: Request, deadline: float, file: str = "image") -> Upload:
        """Read the body of a request, multipart or JSON; the caller closes it.

        Args:
            deadline: on the event loop's clock; a body that lags behind :data:`MIN_RATE` is given up earlier.
            file: the name of the part that is a file.

        Raises:
            ApiError: too large, too slow, cut off, of another type, or not readable.
        """
        body = _body_for(request, self.settings, file)

        def close() -> None:
            self.held, body.received = self.held - body.received, 0
            body.close()

        try:
            await self._receive(request, body, deadline)
            part, text = body.parts()
            return Upload(part, text, close)
        except BaseException:
            close()
            raise

    async def _receive(self, request: Request, body: _Document | _Form, deadline: float) -> None:
        clock = asyncio.get_running_loop().time
        begun, large, waiting = clock(), False, False
        try:
            with anyio.fail_after(None) as scope:
                scope.deadline = min(deadline, begun + self.settings.body_seconds)
                async for piece in request.stream():
                    self._count(body, len(piece))
                    # Time spent waiting for a place and for the parser is not the client's.
                    before, scope.deadline, waiting = clock(), deadline, True
                    if body.received > SMALL_BODY and not large:
                        await self.large.acquire_on_behalf_of(request)
                        large = True
                    await self._feed(body, piece)
                    begun, waiting = begun + clock() - before, False
                    grace = self.settings.body_seconds + body.received / MIN_RATE
                    scope.deadline = min(deadline, begun + grace)
        except TimeoutError:
            raise ApiError("queue_full" if waiting else "request_timeout") from None
        finally:
            if large:
                self.large.release_on_behalf_of(request)

    def _count(self, body: _Document | _Form, size: int) -> None:
        body.received += size
        self.held += size
        if body.received > body.limit:
            raise ApiError("payload_too_large")
        if self.held > self.settings.max_held_bytes:
            raise ApiError("storage_full")

    async def _feed(self, body: _Document | _Form, piece: bytes) -> None:
        if len(piece) <= _SMALL_PIECE or isinstance(body, _Document):
            body.feed(piece)
        else:
            await anyio.to_thread.run_sync(body.feed, piece, limiter=self._parsing)


def _body_for(request: Request, settings: Settings, file: str) -> _Document | _Form:
    """Make an empty body of the kind that the headers announce; nothing else of them is believed."""
    if any(coding.strip().lower() != "identity" for coding in request.headers.getlist("content-encoding")):
        raise ApiError("unsupported_media_type")
    kinds = request.headers.getlist("content-type")
    if len(kinds) != 1 or len(kinds[0]) > _MAX_CONTENT_TYPE:
        raise ApiError("unsupported_media_type")
    kind, parameters = parse_options_header(kinds[0])
    _check_charset(parameters)
    if kind == b"application/json":
        body: _Document | _Form = _Document(settings.max_text_bytes)
    elif kind == b"multipart/form-data":
        body = _Form(parameters.get(b"boundary", b""), settings, file)
    else:
        raise ApiError("unsupported_media_type")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > body.limit:
        raise ApiError("payload_too_large")
    return body


def _check_charset(parameters: dict[bytes, bytes]) -> None:
    """Refuse a charset other than UTF-8; a codec that a client names is never looked up."""
    if parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise ApiError("unsupported_media_type")


class _Document:
    """A body that is one JSON document."""

    def __init__(self, limit: int) -> None:
        self.limit, self.received = limit, 0
        self._text = bytearray()

    def feed(self, piece: bytes) -> None:
        self._text += piece

    def parts(self) -> tuple[None, bytes]:
        return None, bytes(self._text)

    def close(self) -> None:
        pass


class _Form:
    """A multipart body: one file, in a part of the name that is expected, and texts of other names."""

    def __init__(self, boundary: bytes, settings: Settings, file_name: str) -> None:
        self._file_name = file_name
        self.limit, self.received = settings.max_body_bytes, 0
        self._text_left = settings.max_text_bytes
        self._file: SpooledTemporaryFile[bytes] | None = None
        self._texts: dict[str, bytearray] = {}
        self._part: SpooledTemporaryFile[bytes] | bytearray = bytearray()
        self._headers: dict[bytes, bytearray] = {}
        self._name, self._value = bytearray(), bytearray()
        self._complete = False
        self._delimiter, self._delimiters, self._nothing = b"\r\n--" + boundary, 0, 0
        try:
            if not boundary:
                raise FormParserError
            self._parser = MultipartParser(boundary, {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._extend(self._name, data[start:end]),
                "on_header_value": lambda data, start, end: self._extend(self._value, data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            })  # fmt: skip
        except FormParserError:
            raise ApiError("bad_request") from None

    def feed(self, piece: bytes) -> None:
        for start in range(0, len(piece), _SMALL_PIECE):
            if not self._complete:  # what follows the end is none of the form's
                self._parse(piece[start : start + _SMALL_PIECE])

    def _parse(self, piece: bytes) -> None:
        self._delimiters += piece.count(self._delimiter)
        if self._delimiters > _MAX_DELIMITERS:
            raise ApiError("bad_request")
        self._nothing += len(piece)
        try:
            self._parser.write(piece)
        except FormParserError:
            raise ApiError("bad_request") from None
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise ApiError("storage_full") from None
            raise
        if self._nothing > _MAX_NOTHING:
            raise ApiError("bad_request")

    def parts(self) -> tuple[BinaryIO | None, dict[str, str]]:
        if not self._complete:  # cut off: the parts behind the cut are missing
            raise ApiError("bad_request")
        if self._file is not None:
            self._file.seek(0)
        try:
            texts = {name: text.decode("utf-8-sig") for name, text in self._texts.items()}
        except UnicodeDecodeError:
            raise ApiError("bad_request") from None
        return cast("BinaryIO | None", self._file), texts

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _on_part_begin(self) -> None:
        self._headers, self._nothing = {}, 0

    def _extend(self, text: bytearray, more: bytes) -> None:
        self._nothing = 0
        text += more

    def _on_header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = self._value
        self._name, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        _check_charset(parse_options_header(bytes(self._headers.get(b"content-type", b"")))[1])
        kind, parameters = parse_options_header(bytes(self._headers.get(b"content-disposition", b"")))
        try:
            name = parameters.get(b"name", b"").decode()
        except UnicodeDecodeError:
            raise ApiError("bad_request") from None
        is_file = b"filename" in parameters
        again = name in self._texts or (name == self._file_name and self._file is not None)
        if kind != b"form-data" or again or is_file != (name == self._file_name) or len(self._texts) == _MAX_FIELDS:
            raise ApiError("bad_request")
        if is_file:
            self._part = self._file = SpooledTemporaryFile(max_size=MEBIBYTE)  # noqa: SIM115 - closed with the form
        else:
            self._part = self._texts[name] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._nothing = 0
        if isinstance(self._part, bytearray):
            self._text_left -= end - start
            if self._text_left < 0:
                raise ApiError("payload_too_large")
            self._part += data[start:end]
        else:
            self._part.write(data[start:end])

    def _on_end(self) -> None:
        self._complete = True
