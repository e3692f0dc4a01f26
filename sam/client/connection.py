"""A connection to a service: requests, each with a deadline for its whole answer."""

from __future__ import annotations

import http.client
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..system.timed_response import timed_response
from .answers import Answer, ServiceError, read_refusal

T = TypeVar("T")


class Connection:
    """One connection, which is opened anew when the service ended it; for one thread."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 60.0,
        max_answer_bytes: int = 2**28,
        max_mask_bytes: int = 2**31,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"url must be http://HOST[:PORT] or https://HOST[:PORT], got {url!r}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII characters")
        if not timeout > 0:  # NaN is not
            raise ValueError(f"timeout must be positive, got {timeout}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port)
        self._connection.response_class = self._response  # type: ignore[assignment]
        self._timeout, self._max_answer_bytes = timeout, max_answer_bytes
        self._max_mask_bytes = max_mask_bytes
        self._deadline = math.inf
        self._base = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def close(self) -> None:
        """Close the connection; a later request opens a new one."""
        self._connection.close()

    def ask(self, path: str, request: dict[str, Any], read: Callable[[Answer], T], once: bool = False) -> T:
        """Send a document; see :meth:`call`."""
        return self.call("POST", path, json.dumps(request).encode(), "application/json", read, once)

    def send_file(
        self,
        path: str,
        name: str,
        content: bytes,
        fields: dict[str, Any],
        read: Callable[[Answer], T],
        once: bool = False,
    ) -> T:
        """Send a file, and fields beside it, as a form; see :meth:`call`."""
        boundary = secrets.token_hex(16)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
        parts = [f'{head}; filename="{name}"\r\n\r\n'.encode(), content, b"\r\n"]
        for field, value in fields.items():
            form_field = head.replace(f'name="{name}"', f'name="{field}"')
            parts.append(f"{form_field}\r\n\r\n{json.dumps(value)}\r\n".encode())
        body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
        return self.call("POST", path, body, f"multipart/form-data; boundary={boundary}", read, once)

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        content_type: str | None,
        read: Callable[[Answer], T],
        once: bool = False,
    ) -> T:
        """Return what ``read`` makes of the answer.

        Args:
            read: may raise what a wrong answer makes it raise.
            once: the request changes something: it goes out on a new connection, and is never repeated.
        """
        if once:
            self._connection.close()
        answer = self._send(method, path, body, {"Content-Type": content_type} if content_type else {}, once)
        try:
            if answer.status == 200:
                return read(answer)
            refusal = read_refusal(answer)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, MemoryError) as problem:
            message = f"not an answer of the service: {answer.content[:100]!r}"
            raise ServiceError(answer.status, "unknown", message, "unknown") from problem
        raise refusal

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str], once: bool = False) -> Answer:
        self._deadline = time.monotonic() + self._timeout
        for last in (True,) if once else (False, True):
            try:
                self._connection.timeout = self._seconds_left()
                if self._connection.sock is None:
                    self._connection.connect()
                self._connection.sock.settimeout(self._seconds_left())
                self._connection.request(method, self._base + path, body, {**self._headers, **headers})
                answer = self._connection.getresponse()
                return Answer(answer.status, answer.headers.get_content_type(), self._read(answer))
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._connection.close()  # the service ended an idle connection; asking again changes nothing there
                if last:
                    raise
            except TimeoutError as error:
                self._connection.close()
                raise TimeoutError(f"no whole answer within {self._timeout} s") from error
            except http.client.HTTPException as error:
                self._connection.close()
                there = f"{self._connection.host}:{self._connection.port}"
                raise ConnectionError(f"no whole answer of HTTP from {there}: {error!r}") from error
            except BaseException:
                self._connection.close()
                raise
        raise AssertionError

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        text = answer.read(self._max_answer_bytes + 1)
        if len(text) > self._max_answer_bytes:
            message = f"an answer of more than {self._max_answer_bytes} bytes: {text[:100]!r}"
            raise ServiceError(answer.status, "unknown", message, "unknown")
        if answer.length:  # a read of so many bytes takes an early end for the end
            raise http.client.IncompleteRead(b"", answer.length)
        return text

    def check_room(self, count: int, height: int, width: int) -> None:
        """Refuse masks that would take more memory than they may."""
        size = count * height * width
        if size > self._max_mask_bytes:
            message = f"{count} masks of {size} bytes in all, more than the limit of {self._max_mask_bytes}"
            raise ServiceError(200, "unknown", message, "unknown")

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _response(self, connection: socket.socket, *arguments: Any, **options: Any) -> http.client.HTTPResponse:
        return timed_response(self._seconds_left, connection, *arguments, **options)


def content_of(file: str | os.PathLike[str] | bytes) -> bytes:
    """Return the bytes of a file to send: a path's, or those that are given."""
    return file if isinstance(file, bytes) else Path(file).read_bytes()
