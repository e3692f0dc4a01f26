"""Limits of connections that uvicorn does not have: their number, heads, pieces of bodies and unread answers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Settings

MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED = 2**15, 100, 8
# This many pieces of a body may be tiny; each costs a call of Python, and a chunk of HTTP can hold a single byte.
MAX_TINY_PIECES, TINY_PIECE = 1024, 64
# Bytes per second at which an answer must be read.
MIN_RATE = 2**12
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class Connections:
    """The connections of one server, at most ``settings.max_connections``.

    Attributes:
        waiting: connections whose head or body the service waits for, the longest silent first.
        unread: connections whose answers wait to be read, the oldest first.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.open: set[Connection] = set()
        self.waiting: OrderedDict[Connection, None] = OrderedDict()
        self.unread: OrderedDict[Connection, None] = OrderedDict()

    def protocol(self, **arguments: Any) -> Connection:
        """Make the protocol of a new connection, for uvicorn."""
        return Connection(self, **arguments)

    def add(self, connection: Connection) -> bool:
        """Accept a connection, in place of the one silent for the longest; return False if all are being answered."""
        while len(self.open) >= self.settings.max_connections:
            if not self.waiting:
                return False
            next(iter(self.waiting)).give_up()
        self.open.add(connection)
        return True

    def remove(self, connection: Connection) -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.unread.pop(connection, None)

    def bound_unread(self) -> None:
        """Give up the oldest unread answers until the rest is within ``settings.max_unread_bytes``."""
        total = sum(connection.unread_bytes for connection in self.unread)
        for connection in list(self.unread)[:-1]:
            if total <= self.settings.max_unread_bytes:
                return
            total -= connection.unread_bytes
            connection.give_up()


class _Parser(httptools.HttpRequestParser):
    """A parser that knows no Upgrade: a server may ignore it (RFC 9110, 7.8), and then the body is still a body.

    httptools ends a message that asks for an upgrade with its head, so that its body would be read as a request. Such
    a head is parsed once more, without the field.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does: to answer pipelined requests
        self._connection = connection

    def feed_data(self, data: Any) -> None:
        while True:
            try:
                return super().feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                super().feed_data(self._connection.head_without_upgrade())
                data = data[upgrade.args[0] :]


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with a time limit wherever it waits for the client."""

    def __init__(self, all_of_them: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parser = _Parser(self)
        self._all, self._settings = all_of_them, all_of_them.settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        # Bytes since the parser last got anywhere: at the end of a head, in a body, at the end of a request.
        self._unparsed = 0
        # Counts of the request so far.
        self._head_bytes = self._headers = self._pieces = self._body_bytes = 0

    @property
    def unread_bytes(self) -> int:
        """Return the number of bytes of answers that the client has not read yet."""
        return self.transport.get_write_buffer_size()

    def give_up(self) -> None:
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        self._all.remove(self)
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._unread_timer = None

    # Its life ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._all.add(self):
            self._await_head()
        else:
            transport.write(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self in self._all.waiting:
            self._all.waiting.move_to_end(self)
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request, a trailer or a chunk's extension is too large.")

    def head_without_upgrade(self) -> bytes:
        """Return the head that was just parsed, without the field Upgrade."""
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        return b"".join([line, *fields, b"\r\n"])

    # What the parser finds; an error raised here ends the connection with status 400 ----------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._headers = self._pieces = self._body_bytes = 0
        if self._head_timer is not None:  # the time until a next head begins is not taken from the head's own
            self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._count_head(len(name) + len(value))
        if self._in_head:  # trailers are not the request's headers
            super().on_header(name, value)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or self._headers > MAX_HEADERS:
            raise ValueError("the head is too large")

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")
        if self.parser.should_upgrade():
            return  # it comes again
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests before the first answer")
        self._in_head, self._unparsed = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        self._pieces += 1
        self._body_bytes += len(body)
        if self._pieces > MAX_TINY_PIECES and self._body_bytes < self._pieces * TINY_PIECE:
            raise ValueError("the pieces of the body are too small")
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head, self._unparsed = True, 0
        if not self.cycle.response_complete:
            self._all.waiting.pop(self, None)
        super().on_message_complete()

    # Waiting for the client --------------------------------------------------------------------------------

    def _await_head(self) -> None:
        self._all.waiting[self] = None
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self._settings.head_seconds, self._on_no_head)

    def _on_no_head(self) -> None:
        self._head_timer = None
        if self.unread_bytes:  # it may still be reading
            self._await_head()
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        answered_last = not self.pipeline
        super().on_response_complete()
        if self.unread_bytes:
            self._await_reader()
        if answered_last and not self.transport.is_closing():
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()
        self._all.bound_unread()

    def _await_reader(self) -> None:
        self._all.unread[self] = None
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(
                self._settings.unread_seconds, self._on_reader_late, self.unread_bytes
            )

    def _on_reader_late(self, before: int) -> None:
        self._unread_timer = None
        left = self.unread_bytes
        if left == 0:
            self._all.unread.pop(self, None)
        elif before - left < MIN_RATE * self._settings.unread_seconds and before >= left:
            self.give_up()
        else:
            self._await_reader()


def as_protocol_class(connections: Connections) -> type[asyncio.Protocol]:
    """Return the factory of connections as the class that ``uvicorn.Config`` declares; it only calls it."""
    return cast("type[asyncio.Protocol]", connections.protocol)
