"""Connections whose answers nobody reads, by an injected clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
import uvicorn
from uvicorn.server import ServerState

from sam.server import Settings
from sam.server.connections import Connection, Connections


class FakeLoop:
    """Timers that run when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def call_later(self, seconds: float, call: Callable[..., None], *arguments: Any) -> Any:
        timer = (self.now + seconds, call, arguments)
        self.timers.append(timer)

        class Handle:
            def cancel(handle) -> None:  # noqa: N805
                if timer in self.timers:
                    self.timers.remove(timer)

        return Handle()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.timers if timer[0] <= self.now]:
            self.timers.remove(timer)
            timer[1](*timer[2])


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.unread, self.ended = 0, ""

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def connected(connections: Connections, loop: FakeLoop) -> tuple[Connection, FakeTransport]:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    connection = connections.protocol(
        config=uvicorn.Config(app, log_config=None, ws="none"), server_state=ServerState(), app_state={}, _loop=loop
    )
    transport = FakeTransport()
    connection.connection_made(transport)
    return connection, transport


def test_answers_must_be_read_at_a_rate() -> None:
    loop, connections = FakeLoop(), Connections(Settings(unread_seconds=10, head_seconds=1000))
    for left, ended in ((10**6, "aborted"), (10**6 - 40_000, "aborted"), (10**6 - 41_000, ""), (0, "")):
        connection, transport = connected(connections, loop)
        transport.unread = 10**6
        connection.pause_writing()
        loop.advance(9)
        assert not transport.ended
        transport.unread = left
        loop.advance(1)
        assert transport.ended == ended
        assert (connection in connections.unread) == (0 < left < 10**6 - 40_000)
        loop.advance(10)  # and nothing more of it was read
        assert transport.ended == ("aborted" if left else "")
    assert not loop.timers or len(loop.timers) == len(connections.open)


def test_unread_answers_are_bounded_the_oldest_go() -> None:
    loop, connections = FakeLoop(), Connections(Settings(max_unread_bytes=250, unread_seconds=10, head_seconds=1000))
    transports = []
    for _ in range(4):
        connection, transport = connected(connections, loop)
        transport.unread = 100
        connection.pause_writing()
        transports.append(transport)
    assert [transport.ended for transport in transports] == ["aborted", "aborted", "", ""]
    connection, transport = connected(connections, loop)
    transport.unread = 1000  # one alone may be larger
    connection.pause_writing()
    assert not transport.ended
    assert len(connections.open) == 1


def test_an_idle_connection_is_closed_but_not_while_its_answer_is_read() -> None:
    loop, connections = FakeLoop(), Connections(Settings(unread_seconds=1000, head_seconds=10))
    _, transport = connected(connections, loop)
    transport.unread = 1
    loop.advance(10)
    assert not transport.ended
    transport.unread = 0
    loop.advance(10)
    assert transport.ended == "closed"


def test_a_connection_leaves_nothing_behind() -> None:
    loop, connections = FakeLoop(), Connections(Settings())
    connection, transport = connected(connections, loop)
    transport.unread = 1
    connection.pause_writing()
    assert loop.timers
    connection.connection_lost(None)
    assert [*loop.timers, *connections.open, *connections.waiting, *connections.unread] == []
