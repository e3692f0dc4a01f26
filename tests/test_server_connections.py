"""Connections: heads that do not end, tiny pieces, too many at once, silence."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import resource
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gate import Gate
from models import TINY, random_image, random_model

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from local_service import Local
from serving import file_of
from waiting import SECONDS, wait_until

from sam.engine import Engine
from sam.server import Settings, run
from sam.server.connections import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, MAX_TINY_PIECES, TINY_PIECE, Connection

PNG = file_of(random_image(60, 90))
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n"
UPLOAD = (
    b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    running = Local(Engine(random_model(TINY)), Settings())
    yield running
    running.close()


def answers_to(port: int, *pieces: bytes) -> bytes:
    """All that comes back until the other side closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            while piece := connection.recv(2**16):
                answer += piece
        except ConnectionError:
            pass  # it was not read to its end
    return answer


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]


# The parser's work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [b"POST /v1/embed", b"GET /v2/health/live", b"POST /nothing"])
def test_a_body_of_tiny_chunks_ends_early(local: Local, monkeypatch: pytest.MonkeyPatch, method: bytes) -> None:
    """Also where nobody reads it: each chunk costs a call, and the parser takes all that came in one go."""
    pieces: list[int] = []
    on_body = Connection.on_body

    def counted(self: Connection, body: bytes) -> None:
        pieces.append(len(body))
        on_body(self, body)

    monkeypatch.setattr(Connection, "on_body", counted)
    answers = answers_to(local.port, UPLOAD.replace(b"POST /v1/embed", method), b"1\r\na\r\n" * 20_000)
    assert len(pieces) <= MAX_TINY_PIECES + 1
    assert set(statuses(answers)) <= {200, 400, 404, 405}


def test_chunks_of_a_usual_size_are_welcome(local: Local) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + PNG + b"\r\n--b--\r\n"
    parts = [form[start : start + TINY_PIECE] for start in range(0, len(form), TINY_PIECE)]
    few_tiny = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    assert statuses(answers_to(local.port, UPLOAD[:-2] + b"Connection: close\r\n\r\n", b"".join(few_tiny))) == [200]


@pytest.mark.parametrize(
    "head",
    [
        LIVE + b"".join(b"X-%d: 1\r\n" % index for index in range(MAX_HEADERS)) + b"\r\n",
        LIVE + b"X: " + b"a" * 2**15 + b"\r\n\r\n",
        LIVE + b"X: " + b"a" * 2**17,
        b"GET /" + b"a" * 2**15 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 2**17,
        b"\r\n" * 2**16,
        UPLOAD + b"0\r\n" + b"X: 1\r\n" * 200 + b"\r\n",
    ],
)
def test_heads_are_bounded(local: Local, head: bytes) -> None:
    assert statuses(answers_to(local.port, head))[-1] == 400
    assert statuses(answers_to(local.port, *(head[start : start + 9000] for start in range(0, len(head), 9000)))) in (
        [400],
        [400, 400],
        [],  # reset while it was being sent
    )


def parsed_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that connections are given from now on."""
    sizes: list[int] = []
    data_received = Connection.data_received

    def counted(self: Connection, data: bytes) -> None:
        sizes.append(len(data))
        data_received(self, data)

    monkeypatch.setattr(Connection, "data_received", counted)
    return sizes


@pytest.mark.parametrize(
    "begun",
    [b"0\r\nX: ", b"0\r\n", b"5;a=", b"5;", b"5\r\nhello\r\n5;a=", b"0\r\nX: y\r\nZ: "],
    ids=["trailer", "name of a trailer", "extension", "name of an extension", "later extension", "later trailer"],
)
@pytest.mark.parametrize("method", [b"POST /v1/embed", b"GET /v2/health/live", b"POST /nothing"])
def test_what_stands_around_a_body_is_bounded(
    local: Local, monkeypatch: pytest.MonkeyPatch, begun: bytes, method: bytes
) -> None:
    """The parser joins a value from the pieces it comes in, so it shall not grow without end."""
    sizes = parsed_bytes(monkeypatch)
    answers = answers_to(local.port, UPLOAD.replace(b"POST /v1/embed", method) + begun, *[b"a" * 2**18] * 40)
    assert set(statuses(answers)) <= {200, 400, 404}
    # What comes in one go, of 256 KiB, is parsed in one go: the piece with the head, and the one with the limit.
    assert sum(sizes) <= MAX_HEAD_BYTES + 2 * 2**18


def test_large_bodies_of_a_few_chunks_are_not_what_stands_around_them(local: Local) -> None:
    chunk = b"%x;x=y\r\n%b\r\n" % (2**18, b"x" * 2**18)
    close = UPLOAD[:-2].replace(b"POST /v1/embed", b"GET /v2/health/live") + b"Connection: close\r\n\r\n"
    received = answers_to(local.port, close, chunk * 3, b"0\r\nX: y\r\n\r\n")
    assert statuses(received) in ([200], [])  # closed with the answer, so it may be lost to what was still being sent


# Upgrade ------------------------------------------------------------------------------------------------------

FORM = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + PNG + b"\r\n--b--\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
TYPE = b"Host: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"x"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("packets", [1, 2, 3])
def test_an_upgrade_is_ignored(local: Local, protocol: bytes, chunked: bool, packets: int) -> None:
    """The body is a body, by its length or its chunks, and the next requests are answered."""
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(FORM), FORM) if chunked else FORM
    length = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(FORM)
    head = b"POST /v1/embed HTTP/1.1\r\n" + TYPE + length + UPGRADE % protocol + b"\r\n"
    nothing = LIVE + UPGRADE % protocol + b"\r\n"
    rest = head + body + nothing + LIVE + b"Connection: close\r\n\r\n"
    whole = head + body + rest
    cuts = [0, *[len(head) + 7 * cut for cut in range(packets - 1)], len(whole)]
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = b""
        for start, stop in itertools.pairwise(cuts):
            connection.sendall(whole[start:stop])
        while piece := connection.recv(2**16):
            answers += piece
    assert statuses(answers) == [200] * 4
    assert answers.count(b'"embedding"') == 2


def test_the_body_of_an_upgrade_is_no_request(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a packet of its own it used to be run as one, past whatever stands before the service."""
    smuggled = b"GET /v2/models/tiny HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: smuggled\r\n\r\n"
    head = b"POST /v1/embed HTTP/1.1\r\n" + TYPE + b"Content-Length: %d\r\n" % len(smuggled) + UPGRADE % b"x"
    sizes = parsed_bytes(monkeypatch)
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as connection:
        connection.sendall(head + b"\r\n")
        wait_until(lambda: sum(sizes) == len(head) + 2)
        connection.sendall(smuggled + LIVE + b"Connection: close\r\n\r\n")
        answers = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert statuses(answers) == [400, 200]
    assert b"smuggled" not in answers


def test_the_service_is_no_proxy(local: Local) -> None:
    for target in (b"localhost:443", b"/v2/health/live"):
        answers = answers_to(
            local.port, b"CONNECT " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" + LIVE + b"\r\n"
        )
        assert statuses(answers) == [400]


def test_requests_before_the_first_answer_are_bounded(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bytes] = []
    on_headers_complete = Connection.on_headers_complete

    def counted(self: Connection) -> None:
        on_headers_complete(self)
        begun.append(self.url)

    monkeypatch.setattr(Connection, "on_headers_complete", counted)
    assert statuses(answers_to(local.port, (LIVE + b"\r\n") * 5000))[-1] == 400
    assert len(begun) == MAX_PIPELINED + 1
    few = (LIVE + b"\r\n") * MAX_PIPELINED + LIVE + b"Connection: close\r\n\r\n"
    assert statuses(answers_to(local.port, few)) == [200] * (MAX_PIPELINED + 1)


# Silence ------------------------------------------------------------------------------------------------------


def test_who_is_silent_is_left() -> None:
    """A head that does not begin, begins, ends but for a byte; lines without a request; the rest of an unread body."""
    running = Local(Engine(random_model(TINY)), Settings(head_seconds=0.3))
    for silent in (b"", b"G", LIVE, b"\r\n\r\n"):
        assert answers_to(running.port, silent) == b""
    unread = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx"
    # Sent at once, but on a machine that is busy not always in time.
    wait_until(lambda: statuses(answers_to(running.port, unread)) == [404])
    wait_until(lambda: statuses(answers_to(running.port, LIVE + b"\r\n")) == [200])
    running.close()


def test_the_longest_silent_make_room() -> None:
    """Whoever waits for a head or a body; not those whose answers are being computed."""
    model = random_model(TINY)
    gate = Gate(model)
    gate.open.set()
    running = Local(Engine(model), Settings(max_connections=4, body_seconds=SECONDS))
    gate.open.clear()
    body_to_come = UPLOAD + b"5\r\n--b\r\n\r\n"
    silent = [socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) for _ in range(4)]
    for connection, begun in zip(silent, (b"", LIVE, body_to_come, LIVE), strict=True):
        connection.sendall(begun)
    wait_until(lambda: running.service.bodies.held == 5)
    with ThreadPoolExecutor(4) as pool:
        requests = []
        for count in range(4):
            requests.append(pool.submit(running.post, "/v1/embed", PNG))
            wait_until(lambda count=count: running.service.in_flight == count + 1)
            assert silent[count].recv(1) == b""
        assert statuses(answers_to(running.port, LIVE + b"\r\n")) in ([503], [])
        gate.open.set()
        assert [future.result(SECONDS)[0] for future in requests] == [200] * 4
    assert running.request("GET", "/v2/health/live")[0] == 200
    running.close()


def test_nobody_reads_an_answer_of_megabytes(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real socket; the test runs the timer itself."""
    unread: list[Connection] = []
    wait = Connection._await_reader

    def noted(self: Connection) -> None:
        wait(self)
        unread.append(self)

    monkeypatch.setattr(Connection, "_await_reader", noted)
    monkeypatch.setattr(local.service.metrics, "render", lambda: b"x" * 2**25)
    with socket.create_connection(("127.0.0.1", local.port), timeout=SECONDS) as reader:
        reader.sendall(LIVE.replace(b"/v2/health/live", b"/metrics") + b"Connection: close\r\n\r\n")
        wait_until(lambda: bool(unread))
        connection = unread[0]
        wait_until(lambda: connection in connection.connections and connection.unread_bytes > 2**20)
        connection.loop.call_soon_threadsafe(connection._on_reader_late, connection.unread_bytes)
        wait_until(lambda: connection not in connection.connections)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := reader.recv(2**20):
                received += len(piece)
        assert received < 2**25


# The process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "most", "connections", "requested"),
    [
        (1024, 1024, 400, None),
        (256, 4096, 400, 2 * 400 + 192),
        (256, resource.RLIM_INFINITY, 400, 2 * 400 + 192),
        (256, 256, 32, 256),
        (64, 64, 1, 64),
    ],
)
def test_connections_fit_the_descriptors(
    monkeypatch: pytest.MonkeyPatch, allowed: int, most: int, connections: int, requested: int | None
) -> None:
    """Each may have a file on disk beside it."""
    raised: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(run.resource, "getrlimit", lambda which: (allowed, most))
    monkeypatch.setattr(run.resource, "setrlimit", lambda which, limits: raised.append(limits))
    assert run._within_descriptors(Settings()).max_connections == connections
    assert raised == ([] if requested is None else [(requested, most)])


def test_what_is_odd_in_an_image_is_neither_logged_nor_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are remembered by their text, for good, and a client can make as many texts as it likes."""
    for name in ("sam.server", "uvicorn.error", "PIL", "python_multipart"):
        logger = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))
    registry: dict[Any, Any] = {}
    with warnings.catch_warnings(record=True) as seen:
        run._log_as_json()
        for index in range(100):
            where = ("TiffImagePlugin.py", 1, "PIL.TiffImagePlugin", registry)
            warnings.warn_explicit(f"tag {index} had too many entries", UserWarning, *where)
        warnings.warn_explicit("of ours", UserWarning, "x.py", 1, "sam.x", {})
    assert [str(warning.message) for warning in seen] == ["of ours"]
    assert len(registry) <= 1
    assert not logging.getLogger("python_multipart.multipart").isEnabledFor(logging.WARNING)
