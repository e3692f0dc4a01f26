"""The service among strangers: a client chooses no algorithm, holds no place for nothing, asks in nobody's name."""

from __future__ import annotations

import asyncio
import codecs
import errno
import http.cookies
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from tempfile import SpooledTemporaryFile
from typing import Any

import pytest
from models import TINY, random_model

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from fastapi import Request
from local_service import Local
from python_multipart.multipart import MultipartParser
from serving import multipart
from uploads_by_hand import CLICK, FORM, HEAD, NOISE, PNG, started
from waiting import SECONDS

from sam.engine import Engine
from sam.server import Settings, bodies, create_app
from sam.server.errors import KINDS, ApiError


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    running = started(Settings())
    yield running
    running.close()


def answer_to(running: Local, body: bytes, kind: str, **headers: str) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, text = running.request("POST", "/v1/segment", body, {"Content-Type": kind, **named})
    return status, json.loads(text)["error"]["code"] if status != 200 else ""


# Nothing on the event loop that a client chooses --------------------------------------------------------------


@pytest.mark.parametrize("charset", ["punycode", "idna", "latin-1", "no-such-codec", "utf-8-sig"])
@pytest.mark.parametrize("place", ["form", "document", "part", "twice"])
def test_no_codec_is_chosen_by_a_client(local: Local, charset: str, place: str) -> None:
    body, kind = multipart(PNG, {"prompts": CLICK})
    if place == "document":
        body, kind = b"{}", f"application/json; charset={charset}"
    elif place == "part":
        body = body.replace(
            b'name="prompts"', f'name="prompts"\r\nContent-Type: text/plain; charset={charset}'.encode()
        )
    else:
        kind += f'; charset="{charset}"' if place == "form" else f"; charset=utf-8; CHARSET={charset}"
    looked_up: list[str] = []

    def search(name: str) -> None:
        looked_up.append(name)

    codecs.register(search)
    try:
        assert answer_to(local, body, kind) == (415, "unsupported_media_type")
    finally:
        codecs.unregister(search)
    assert not [name for name in looked_up if name.startswith("no")]


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf8"'])
def test_utf_8_may_be_said(local: Local, charset: str) -> None:
    body, kind = multipart(PNG, {"prompts": CLICK})
    assert answer_to(local, body, f"{kind}; charset={charset}") == (200, "")


def test_cookies_queries_and_ranges_are_never_parsed(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unquoting a cookie of 60 KB of backslashes takes 16 s in Python 3.11.7; the framework parses for whoever asks."""
    monkeypatch.setattr("starlette.requests.cookie_parser", lambda text: pytest.fail("parsed"))
    monkeypatch.setattr(
        "starlette.datastructures.parse_qsl", lambda text, **options: pytest.fail("parsed") if text else []
    )
    monkeypatch.setattr(http.cookies, "_unquote", lambda text: pytest.fail("parsed"))
    headers = {"Cookie": 'a="' + "\\" * 1000 + '"', "Range": "bytes=" + "0-1," * 100 + "5-6"}
    for path in ("/v2/health/live", "/v2/models/custom", "/metrics", "/openapi.json", "/page.js"):
        status, _, whole = local.request("GET", path)
        assert local.request("GET", path + "?" + "&".join(["a=1"] * 100), headers=headers)[::2] == (status, whole) or (
            path == "/metrics"
        )
    assert local.post("/v1/embed", PNG, headers=headers)[0] == 200


def test_a_long_content_type_is_not_taken_apart(local: Local) -> None:
    assert answer_to(local, b"x", FORM + "; a=b" * 200) == (415, "unsupported_media_type")


def test_forms_are_parsed_beside_the_event_loop(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[int | None, int] = {}
    feed = bodies._Form.feed

    def noted(self: bodies._Form, piece: bytes) -> None:
        thread = threading.current_thread().ident
        threads[thread] = max(threads.get(thread, 0), len(piece))
        feed(self, piece)

    monkeypatch.setattr(bodies._Form, "feed", noted)
    assert local.error("/v1/embed", b"\r\n--x" * 50_000) == (415, "unsupported_image")
    assert threads.pop(local.thread.ident, 0) <= bodies._SMALL_PIECE
    assert max(threads.values()) > bodies._SMALL_PIECE


@pytest.mark.parametrize(
    "begun",
    [HEAD, HEAD + b"x\r\n--b", HEAD + b"x\r\n--b\r\n", HEAD + b"x\r\n--b\r\nX:", b"", b"\r\n"],
    ids=["data", "delimiter", "header", "value", "nothing", "preamble"],
)
@pytest.mark.parametrize("unit", [b"\r\n--b\r", b"\r\n--b-", b"\r\n--bx", b" ", b"\t", b"\r\n", b"\r\n--b \r"])
@pytest.mark.parametrize("piece", [1000, 2**18])
def test_what_costs_the_parser_much_is_refused_early(
    monkeypatch: pytest.MonkeyPatch, begun: bytes, unit: bytes, piece: int
) -> None:
    """Look-alikes of delimiters, and their padding: it goes through them byte by byte."""
    searched, parsed = 0, 0
    write = MultipartParser.write

    def noted(self: MultipartParser, data: bytes) -> int:
        nonlocal searched, parsed
        parsed += len(data)
        searched += data.count(b"\r\n--b")
        return write(self, data)

    monkeypatch.setattr(MultipartParser, "write", noted)
    form = bodies._Form(b"b", Settings(), "image")
    body = begun + (unit * 2**18)[: 2**18]
    plain_data = begun == HEAD and b"b" not in unit
    with nullcontext() if plain_data else pytest.raises(ApiError, match="bad_request"):
        for start in range(0, len(body), piece):
            form.feed(body[start : start + piece])
    form.close()
    assert searched <= bodies._MAX_DELIMITERS
    assert plain_data or parsed <= len(begun) + 3 * bodies._MAX_NOTHING


class SkippingLoop(asyncio.SelectorEventLoop):
    """Its clock can be put forward."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped


@pytest.mark.parametrize("queue", ["_parsing", "large"])
def test_the_wait_for_the_server_is_not_the_clients(queue: str) -> None:
    """For its parser as for a place: a body that lags behind by that alone is read."""
    body, kind = multipart(NOISE, {})
    half = len(body) // 2
    messages = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def read_while_others_wait() -> bytes:
        reader = bodies.BodyReader(Settings(body_seconds=SECONDS, max_uploads=1))
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
        limiter = getattr(reader, queue)
        await limiter.acquire_on_behalf_of("another")
        reading = asyncio.ensure_future(reader.read(Request(scope, receive), deadline=1e12))
        while not limiter.statistics().tasks_waiting:
            await asyncio.sleep(0)
        loop.skipped += 100 * SECONDS
        for _ in range(10):
            await asyncio.sleep(0.001)
        limiter.release_on_behalf_of("another")
        with closing(await reading) as upload:
            assert upload.file is not None
            return upload.file.read()

    loop = SkippingLoop()
    try:
        assert loop.run_until_complete(read_while_others_wait()) == NOISE
    finally:
        loop.close()


def test_who_waits_too_long_for_the_parser_is_told_to_come_again() -> None:
    """It is not the client that was slow."""
    running = started(Settings(), deadline=0.3)
    assert running.service._loop is not None

    async def hold() -> None:
        await running.service.bodies._parsing.acquire_on_behalf_of("another")

    asyncio.run_coroutine_threadsafe(hold(), running.service._loop).result(SECONDS)
    assert running.error("/v1/embed", NOISE[: bodies.SMALL_BODY // 2]) == (503, "queue_full")
    running.close()


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (errno.ENOSPC, 507, "storage_full"),
        (errno.EDQUOT, 507, "storage_full"),
        (errno.EFBIG, 507, "storage_full"),
        (errno.EIO, 500, "internal"),
    ],
)
def test_a_full_disk(local: Local, monkeypatch: pytest.MonkeyPatch, number: int, status: int, code: str) -> None:
    closed: list[bool] = []

    class Full(SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, data: Any) -> int:
            raise OSError(number, "no more")

        def close(self) -> None:
            closed.append(True)
            super().close()

    monkeypatch.setattr(bodies, "SpooledTemporaryFile", Full)
    assert local.error("/v1/embed", PNG) == (status, code)
    assert closed
    assert local.service.bodies.held == 0


# Whose request it is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "http://LOCALHOST"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost"}, 403),
        ({"Origin": "https://localhost"}, 200),  # behind a proxy that ends TLS
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "something-new"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://behind.example"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "LocalHost.:80"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "localhost:x"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": ""}, 403),
    ],
)
def test_whose_request_it_is(local: Local, headers: dict[str, str], status: int) -> None:
    assert local.post("/v1/embed", PNG, headers={"Host": "localhost", **headers})[0] == status


def test_two_hosts_are_none(local: Local) -> None:
    with socket.create_connection(("127.0.0.1", local.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert b" 403 " in connection.recv(100)


# Truncation, other encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 8, 40, 150, 400])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_that_ends_too_early(local: Local, cut: int, chunked: bool) -> None:
    body, kind = multipart(PNG, {"prompts": CLICK, "output": "png"})
    whole = body[:-2]  # a line's end may follow the last boundary
    assert local.request("POST", "/v1/segment", whole + b"\r\nmore", {"Content-Type": kind})[0] == 200
    rest: Any = iter([whole[:-cut]]) if chunked else whole[:-cut]
    assert answer_to(local, rest, kind) == (400, "bad_request")


def test_a_byte_order_mark_of_a_field_is_none_of_its_text(local: Local) -> None:
    """As of a document."""
    for mark in ("", "\ufeff"):
        fields = {"prompts": mark + json.dumps(CLICK), "output": mark + "png", "multimask": mark + "false"}
        assert local.post("/v1/segment", PNG, **fields)[0] == 200


@pytest.mark.parametrize("body", [b"", b"--b", b"\r\n\r\n", b"preamble only\r\n", HEAD[:-2], HEAD])
def test_a_form_without_parts(local: Local, body: bytes) -> None:
    assert answer_to(local, body, FORM) == (400, "bad_request")


@pytest.mark.parametrize(
    ("encoding", "status"),
    [("Identity", 200), (" identity ", 200), ("identity, gzip", 415), ("gzip", 415), ("x", 415)],
)
def test_content_encodings(local: Local, encoding: str, status: int) -> None:
    assert local.post("/v1/embed", PNG, headers={"Content-Encoding": encoding})[0] == status


# What operators see -------------------------------------------------------------------------------------------


def test_all_counters_exist_from_the_start(local: Local) -> None:
    engine = Engine(random_model(TINY))
    text = create_app(engine).state.service.metrics.render().decode()
    engine.close(SECONDS)
    expected = [f'sam_errors_total{{code="{code}"}} 0.0' for code in KINDS]
    answers = [(route.path, getattr(route, "responses", None) or (200,)) for route in local.app.routes]
    for path, statuses in answers:
        expected += [f'sam_requests_total{{route="{path}",status="{status}"}} 0.0' for status in statuses]
    assert len(expected) > len(KINDS) + 40
    expected += [f"sam_engine_{name}_total 0.0" for name in ("rejected", "failed_out_of_memory", "abandoned")]
    assert [line for line in expected if line not in text.splitlines()] == []
