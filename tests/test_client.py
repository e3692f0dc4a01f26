"""The client, and answers that are not the service's: of a proxy, of a stranger on the port, broken off."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from waiting import SECONDS

from sam import rle
from sam.client import Client, RemoteImage, ServiceError

IMAGE = RemoteImage("0" * 32, 2, 3)
METHODS: list[Callable[[Client], object]] = [
    lambda client: client.embed(b"an image"),
    lambda client: client.segment(IMAGE, [{"points": [[1, 1]]}]),
    lambda client: client.automatic(IMAGE),
]


@contextmanager
def answered_by(answer: bytes) -> Iterator[Client]:
    """A client of someone who reads a request and sends these bytes."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request:
            request.readline()
            headers = http.client.parse_headers(request)
            request.read(int(headers.get("Content-Length", "0")))
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SECONDS) as client:
            yield client
        thread.join()


def http_answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def one_mask(size: list[int], counts: list[int] | str) -> bytes:
    mask = {"segmentation": {"size": size, "counts": counts}, "predicted_iou": 0.5}
    return json.dumps({"prompts": [{"best": 0, "masks": [mask]}], "result": None, "masks": [mask]}).encode()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (502, b"<html>Bad Gateway</html>"),
        (500, b""),
        (400, b"Invalid HTTP request received."),
        (301, b""),
        (500, b'{"detail": "x"}'),
        (500, b'{"error": "x", "request_id": "1"}'),
        (500, b"[]"),
        (503, b"[" * 100_000),
        (200, b"\xff<html>"),
        (200, b"{}"),
        (200, b'{"embedding": "x", "image": 7, "prompts": 7, "masks": 7}'),
        (200, b'{"prompts": [{"best": 0, "masks": []}], "result": null, "masks": [7]}'),
        (200, one_mask([2, 3], [1])),
        (200, one_mask([2, 3], rle.compress([2**62] * 4 + [6]))),
    ],
)
def test_answers_of_another_form(method: Callable[[Client], object], status: int, body: bytes) -> None:
    with answered_by(http_answer(status, body)) as client:
        with pytest.raises(ServiceError, match=rf"unknown \({status}\): not an answer of the service: b") as refused:
            method(client)
        assert (refused.value.status, refused.value.code, refused.value.request_id) == (status, "unknown", "unknown")


def test_refusals_and_masks() -> None:
    refusal = b'{"error": {"code": "queue_full", "message": "The server is busy."}, "request_id": "7"}'
    message = r"^queue_full \(503\): The server is busy. \[request 7\]$"
    with answered_by(http_answer(503, refusal)) as client, pytest.raises(ServiceError, match=message):
        client.automatic(IMAGE)
    with answered_by(http_answer(200, one_mask([2, 3], [1, 5]))) as client:
        (masks,) = client.segment(IMAGE, [{"points": [[1, 1]]}])
        assert masks.masks.tolist() == [[[False, True, True], [True, True, True]]]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"SSH-2.0-x\r\n", "BadStatusLine"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"a"', "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "LineTooLong"),
    ],
)
def test_no_whole_answer_of_http(answer: bytes, cause: str) -> None:
    message = rf"no whole answer of HTTP from 127.0.0.1:\d+: {cause}"
    for method in METHODS:
        with answered_by(answer) as client, pytest.raises(ConnectionError, match=message):
            method(client)
    with answered_by(answer) as client:
        assert not client.ready()
