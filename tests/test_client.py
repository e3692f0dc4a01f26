"""The client, and answers that are not the service's: of a proxy, of a stranger on the port, broken off."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models import random_image
from serving import file_of
from waiting import SECONDS

from sam.client import Client, RemoteImage, RemoteVideo, ServiceError
from sam.masks import rle, rle_encode

HANDLE = "0" * 32
IMAGE = RemoteImage(HANDLE, 2, 3)
PNG = file_of(random_image(20, 30))
METHODS: list[Callable[[Client], object]] = [
    lambda client: client.embed(PNG),
    lambda client: client.segment(IMAGE, [{"points": [[1, 1]]}]),
    lambda client: client.automatic(IMAGE),
    lambda client: client.open_video(),
    lambda client: RemoteVideo(client, HANDLE).push(PNG),
    lambda client: RemoteVideo(client, HANDLE).prompt({"a": {"points": [[1, 1]]}}),
    lambda client: RemoteVideo(client, HANDLE).masks(0),
    lambda client: RemoteVideo(client, HANDLE).state(),
]


@contextmanager
def answered_by(*pieces: bytes, forever: bytes = b"", **options: Any) -> Iterator[Client]:
    """A client of someone who reads a request and sends these bytes, then ``forever`` until the client has gone."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request, contextlib.suppress(ConnectionError):
            request.readline()
            headers = http.client.parse_headers(request)
            request.read(int(headers.get("Content-Length", "0")))
            for piece in pieces:
                connection.sendall(piece)
            while forever and not gone.wait(0.01):
                connection.sendall(forever)

    gone = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", **{"timeout": SECONDS, **options}) as client:
            yield client
        gone.set()
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
        *(
            (422, b'{"error": {"code": "x", "message": "x", "where": %b}, "request_id": "1"}' % where)
            for where in (b"7", b"[null]", b"[-1]", b"[true]", b'["%b"]' % (b"x" * 1001), b"[%b0]" % (b"0, " * 16))
        ),
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
    refusal = (
        b'{"error": {"code": "out_of_image", "message": "Outside.", "where": ["prompts", 1, "points", 0]},'
        b' "request_id": "7"}'
    )
    message = r"^out_of_image \(422\): Outside. At prompts.1.points.0. \[request 7\]$"
    with answered_by(http_answer(422, refusal)) as client, pytest.raises(ServiceError, match=message) as refused:
        client.segment(IMAGE, [])
    assert refused.value.where == ("prompts", 1, "points", 0)
    assert ServiceError(503, "queue_full", "Busy.", "7").where == ()
    with answered_by(http_answer(200, one_mask([2, 3], [1, 5]))) as client:
        (masks,) = client.segment(IMAGE, [{"points": [[1, 1]]}])
        assert masks.masks.tolist() == [[[False, True, True], [True, True, True]]]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"SSH-2.0-x\r\n", "BadStatusLine"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"a"', "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "LineTooLong"),
        (CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", r"HTTPException\('a chunk of -5 bytes'\)"),
        (CHUNKED + b"-1\r\nhello", r"HTTPException\('a chunk of -1 bytes'\)"),
        (CHUNKED + b"5\r\nhello\r\n-2\r\nhello", r"HTTPException\('a chunk of -2 bytes'\)"),
        (CHUNKED + b"x\r\nhello", "IncompleteRead"),
    ],
)
def test_no_whole_answer_of_http(answer: bytes, cause: str) -> None:
    message = rf"no whole answer of HTTP from 127.0.0.1:\d+: {cause}"
    for method in METHODS:
        with answered_by(answer) as client, pytest.raises(ConnectionError, match=message):
            method(client)
    with answered_by(answer) as client:
        assert not client.ready()


# Answers that say what cannot be ------------------------------------------------------------------------------

EMBEDDED = {"embedding": HANDLE, "image": {"height": 20, "width": 30}}
RECORD = {
    "segmentation": {"size": [2, 3], "counts": rle.compress([1, 5])}, "area": 5, "bbox": [0, 0, 3, 2],
    "predicted_iou": 0.5, "point_coords": [[1.5, 1.0]], "stability_score": None, "crop_box": [0, 0, 3, 2],
}  # fmt: skip
ANSWERED = {"prompts": [{"best": 0, "masks": [RECORD]}], "result": HANDLE, "masks": [RECORD]}


def changed(document: Any, path: list[Any], value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return copy


def test_true_answers_are_believed() -> None:
    embedded, answered = (json.dumps(document).encode() for document in (EMBEDDED, ANSWERED))
    with answered_by(http_answer(200, embedded)) as client:
        assert client.embed(PNG) == RemoteImage(HANDLE, 20, 30)
    turned = json.dumps(changed(EMBEDDED, ["image"], {"height": 30, "width": 20})).encode()
    with answered_by(http_answer(200, turned)) as client:
        assert client.embed(PNG) == RemoteImage(HANDLE, 30, 20)
    with answered_by(http_answer(200, answered)) as client:
        (masks,) = client.segment(IMAGE, [{"points": [[1, 1]]}])
        assert masks.reference == {"result": HANDLE, "prompt": 0, "mask": 0}
        assert masks.object_score is None
    scored = changed(ANSWERED, ["prompts", 0, "object_score"], -1.5)
    with answered_by(http_answer(200, json.dumps(scored).encode())) as client:
        assert client.segment(IMAGE, [{"points": [[1, 1]]}])[0].object_score == -1.5
    with answered_by(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", answered) as client:
        assert client.automatic(IMAGE)[0]["segmentation"].sum() == 5
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, answered[i : i + 1]) for i in range(len(answered))) + b"0\r\n\r\n"
    with answered_by(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunks) as client:
        assert client.automatic(IMAGE)[0]["segmentation"].sum() == 5


@pytest.mark.parametrize(
    ("method", "path", "values"),
    [
        (0, ["embedding"], [7, None, "", "../../x", HANDLE + "\n", HANDLE.replace("0", "G"), [HANDLE]]),
        (0, ["image"], [None, [], 7]),
        (0, ["image", "height"], [0, -20, True, 20.0, "20", 2**62, 21, 30, None]),
        (1, ["prompts"], [[], [7], 7, None, ANSWERED["prompts"] * 2]),
        (1, ["result"], [7, "x", HANDLE * 2, {}]),
        (1, ["prompts", 0, "best"], [-1, 1, 0.0, True, "0", None]),
        (1, ["prompts", 0, "object_score"], ["1", True, [], float("inf")]),
        (1, ["prompts", 0, "masks"], [[], [RECORD] * 4, {}, None]),
        (1, ["prompts", 0, "masks", 0, "predicted_iou"], ["0.5", None, True, float("nan"), 10**400]),
        (1, ["prompts", 0, "masks", 0, "segmentation", "size"], [[3, 2], [2**31, 2**31], [2, 3, 1], [2], "23"]),
        (1, ["prompts", 0, "masks", 0, "segmentation", "counts"], [[1, 5.0], [1, True, 4], "x" * 10**4, [0] * 99, 7]),
        (2, ["masks"], [[RECORD] * (3 * 32 * 32 + 1), {}, [7]]),
        (2, ["masks", 0, "segmentation", "size"], [[2**31, 2**31], [3, 2]]),
        (2, ["masks", 0, "area"], [7, -1, "5", None, 5.0]),
        (2, ["masks", 0, "bbox"], [[0, 0, 3, 2, 1], [0, 0, "3", 2], None]),
        (2, ["masks", 0, "stability_score"], ["1", [], float("inf")]),
        (2, ["masks", 0, "point_coords"], [[[1, 2, 3]], [1], [[None, 1]], 7]),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_true(
    monkeypatch: pytest.MonkeyPatch, method: int, path: list[Any], values: list[Any]
) -> None:
    """Sizes are compared before any mask is decoded."""
    if "size" in path:
        monkeypatch.setattr(rle, "decode", lambda encoded: pytest.fail("decoded"))
    for value in values:
        answer = json.dumps(changed(ANSWERED if method else EMBEDDED, path, value)).encode()
        with answered_by(http_answer(200, answer)) as client, pytest.raises(ServiceError, match="unknown"):
            METHODS[method](client)


@pytest.mark.parametrize("text", ['{"code": 7, "message": "x"}', '{"code": "x", "message": ["x"]}', "7"])
def test_refusals_of_other_types(text: str) -> None:
    refusal = b'{"error": %b, "request_id": "1"}' % text.encode()
    with answered_by(http_answer(503, refusal)) as client, pytest.raises(ServiceError, match="not an answer"):
        client.automatic(IMAGE)


@pytest.mark.parametrize("head", [b"Content-Length: 5000", b"Connection: close", b"Transfer-Encoding: chunked"])
def test_answers_are_read_up_to_a_limit(head: bytes) -> None:
    body = b"%x\r\n" % 5000 + b"a" * 5000
    too_long = pytest.raises(ServiceError, match=r"unknown \(200\): an answer of more than 1000 bytes: b'")
    with answered_by(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body, max_answer_bytes=1000) as client, too_long:
        client.automatic(IMAGE)


def test_nothing_is_read_without_a_limit() -> None:
    """A chunk of -1 bytes would be read to the end, which need not come."""
    refused = pytest.raises(ConnectionError, match="a chunk of -1 bytes")
    with answered_by(CHUNKED + b"-1\r\n", forever=b"x" * 2**20) as client, refused:
        client.embed(PNG)
    with answered_by(CHUNKED + b"-1\r\n", forever=b"x" * 2**20) as client:
        assert not client.ready()


@pytest.mark.parametrize("ask", METHODS[1:3])
def test_masks_take_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch, ask: Callable[[Client], object]) -> None:
    """A run of background is a few bytes, whatever the image's size; they are counted before any is decoded."""
    mask = ANSWERED["masks"][0]
    answer = {"prompts": [{"best": 0, "masks": [mask] * 3}], "result": None, "masks": [mask] * 3}
    text = http_answer(200, json.dumps(answer).encode())
    with answered_by(text, max_mask_bytes=3 * 2 * 3) as client:
        ask(client)
    monkeypatch.setattr(rle, "decode", lambda encoded: pytest.fail("decoded"))
    message = r"unknown \(200\): 3 masks of 18 bytes in all, more than the limit of 17 "
    with answered_by(text, max_mask_bytes=17) as client, pytest.raises(ServiceError, match=message):
        ask(client)


def test_masks_of_all_prompts_share_the_limit() -> None:
    prompt = {"best": 0, "masks": [RECORD]}
    text = http_answer(200, json.dumps({"prompts": [prompt] * 4, "result": None}).encode())
    with answered_by(text, max_mask_bytes=23) as client, pytest.raises(ServiceError, match="4 masks of 24 bytes"):
        client.segment(IMAGE, [{"points": [[1, 1]]}] * 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (64, 64)])
def test_no_mask_has_a_longer_string_than_its_pixels(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """The busiest ones, and those whose counts change the most; a longer string is not decoded."""
    pixels = size[0] * size[1]
    columns = np.arange(pixels)
    busy = [columns % 2 == 0, columns % 2 == 1, columns % 17 == 0, columns % 32 < 16, columns % 33 < 32, columns < 0]
    busy += [columns % 18 > 0, columns == 0, columns < pixels, np.random.default_rng(0).random(pixels) < 0.5]
    image = RemoteImage(HANDLE, *size)
    for flat in busy:
        mask = torch.from_numpy(flat.reshape(size[::-1]).T.copy())
        counts = rle.compress(rle_encode.encode(mask[None])[0]["counts"])
        with answered_by(http_answer(200, one_mask(list(size), counts))) as client:
            (masks,) = client.segment(image, [{"points": [[1, 1]]}])
        assert (masks.masks[0] == mask.numpy()).all()
    monkeypatch.setattr(rle, "decode", lambda encoded: pytest.fail("decoded"))
    for counts in ("0" * (pixels + 2), [0] * (pixels + 2)):
        with answered_by(http_answer(200, one_mask(list(size), counts))) as client, pytest.raises(ServiceError):
            client.segment(image, [{"points": [[1, 1]]}])


@pytest.mark.parametrize(
    ("head", "drip"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n", b"a"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_one_deadline_for_the_whole_answer(head: bytes, drip: bytes) -> None:
    """Something always comes, so no single piece is late."""
    for method in METHODS:
        late = pytest.raises(TimeoutError, match=r"no whole answer within 0\.2 s")
        with answered_by(head, forever=drip, timeout=0.2) as client, late:
            method(client)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"timeout": float("nan")}, "timeout must be positive, got nan"),
        ({"token": "a\r\nX: b"}, "the token must be printable ASCII"),
        ({"token": "schlüssel"}, "the token must be printable ASCII"),
    ],
)
def test_mistakes_of_the_caller(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client(**options)
