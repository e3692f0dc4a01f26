"""Answers of HTTP that are read within one deadline."""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Callable
from typing import Any


def timed_response(
    seconds_left: Callable[[], float], connection: socket.socket, *arguments: Any, **options: Any
) -> http.client.HTTPResponse:
    """Make the answer that a connection reads, each piece of it within the seconds that are left of one deadline.

    Args:
        seconds_left: called before each piece; it raises ``TimeoutError`` when there are none.
        connection, arguments, options: of ``http.client.HTTPResponse``.
    """
    answer = http.client.HTTPResponse(connection, *arguments, **options)
    answer.fp = _Forward(_InTime(connection, answer.fp.detach(), seconds_left))
    return answer


class _Forward(io.BufferedReader):
    """A reader that refuses chunks of a negative size, which would mean all bytes that ever come."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise http.client.HTTPException(f"a chunk of {size} bytes")
        return super().read(size)


class _InTime(io.RawIOBase):
    """Bytes received by a socket, each piece within the time left of one deadline for them all."""

    def __init__(self, connection: socket.socket, pieces: io.RawIOBase, seconds_left: Callable[[], float]) -> None:
        self._connection, self._pieces, self._seconds_left = connection, pieces, seconds_left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(self._seconds_left())
        return self._pieces.readinto(buffer)

    def close(self) -> None:
        self._pieces.close()
        super().close()
