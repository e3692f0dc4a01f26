"""``python -m benchmarks service --attacks``: the service as others have it while two clients attack it.

An attack is a function that a thread calls over and over: it opens connections of its own and sends what costs the
service the most for what it costs the sender. Meanwhile ``/v2/health/live`` is asked every 20 ms, and an honest client
uploads a small picture and clicks on it. Memory is read before and after, when the service has been idle for a while.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sam.client import Client

_BOUNDARY, _JSON = "multipart/form-data; boundary=b", "application/json"
_IMAGE_PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
_PATIENCE = 30
# Within it an attack holds what it has opened.
_HOLD_SECONDS = 2.0
_IDLE_SECONDS = 8.0


@dataclass(frozen=True)
class Outcome:
    """The service to others under one attack; seconds, and MB of resident memory beyond the start's."""

    name: str
    attacks: int
    health: list[float]
    honest: list[float]
    failed: int
    growth: float

    def row(self) -> str:
        health = np.percentile(self.health, [50, 99]) * 1000 if self.health else [np.nan] * 2
        honest = max(self.honest, default=np.nan)
        return (
            f"{self.name:<28}{self.attacks:>8}{health[0]:>12.1f}{health[1]:>12.1f}"
            f"{len(self.honest):>9}{honest:>12.2f}{self.failed:>8}{self.growth:>10.0f}"
        )


def head(path: str, kind: str, length: int | None, *more: str, method: str = "POST") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", size, *more, "", ""]
    ).encode()


def send(port: int, *pieces: bytes, read: bool = True, connections: int = 1, hold: float = 0.0) -> None:
    """Send the pieces on each of so many connections; then wait for an answer, or hold them open without reading."""
    with contextlib.ExitStack() as held:
        for _ in range(connections):
            with contextlib.suppress(OSError):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE))
                for piece in pieces:
                    connection.sendall(piece)
                if read:
                    connection.recv(2**16)
        time.sleep(hold)


def _post(path: str, body: bytes, kind: str = _BOUNDARY) -> Callable[[int], None]:
    return lambda port: send(port, head(path, kind, len(body)), body)


def _form(name: str, value: bytes) -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n--b--\r\n' % (name.encode(), value)


def _image(data: bytes) -> bytes:
    return _IMAGE_PART + data + b"\r\n--b--\r\n"


_MEBIBYTE = 2**20
_LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n"
_UNSENT = head("/v1/embed", _BOUNDARY, 1000)
_DOCUMENT = b'{"embedding":"%b","prompts":' % (b"0" * 32)
_MOST_POINTS = json.dumps([{"points": [[1.5, 2.5]] * 64, "labels": [1] * 64}] * 1024).encode()
# Refused when all is parsed: pydantic's error holds a copy of it.
_WRONG_POINTS = b'[{"points":[' + b"[1.5,2.5]," * 68_000 + b"[1,1]]}]"
ATTACKS: dict[str, Callable[[int], None]] = {
    "charset=punycode": _post("/v1/segment", _form("prompts", b"a" * _MEBIBYTE), f"{_BOUNDARY}; charset=punycode"),
    "cookie of backslashes": lambda port: send(
        port, _LIVE + b'Cookie: a="' + b"\\" * 30_000 + b'"\r\nConnection: close\r\n\r\n'
    ),
    "boundary over and over": _post("/v1/embed", b"\r\n--bx" * (4 * _MEBIBYTE // 6)),
    "tiny chunks": lambda port: send(port, head("/v1/embed", _BOUNDARY, None), b"1\r\na\r\n" * (_MEBIBYTE // 4)),
    "requests in one go": lambda port: send(port, (_LIVE + b"\r\n") * 5000),
    "heads that do not end": lambda port: send(port, _LIVE + b"X: ", read=False, connections=300, hold=_HOLD_SECONDS),
    "bodies that do not come": lambda port: send(port, _UNSENT, read=False, connections=150, hold=_HOLD_SECONDS),
    "large bodies that stop": lambda port: send(
        port, head("/v1/embed", _BOUNDARY, 10**7), _IMAGE_PART + bytes(100_000), read=False, connections=30,
        hold=_HOLD_SECONDS,
    ),
    "answers not read": lambda port: send(
        port, _LIVE.replace(b"/v2/health/live", b"/openapi.json") + b"\r\n", read=False, connections=30,
        hold=_HOLD_SECONDS,
    ),
    "JSON of empty arrays": _post("/v1/segment", _DOCUMENT + b"[" + b"[]," * 1_300_000 + b"[]]}", _JSON),
    "JSON of many points": _post("/v1/segment", _DOCUMENT + _MOST_POINTS + b"}", _JSON),
    "form of too many points": _post("/v1/segment", _form("prompts", _WRONG_POINTS)),
    "63 MiB of zeros": lambda port: send(
        port, head("/v1/embed", _BOUNDARY, 63 * _MEBIBYTE + len(_image(b""))), _IMAGE_PART, *[bytes(_MEBIBYTE)] * 63,
        b"\r\n--b--\r\n",
    ),
    "JPEG of tiny segments": _post("/v1/embed", _image(b"\xff\xd8" + b"\xff\xe1\0\x09Exif\0\0a" * 700_000)),
}  # fmt: skip


def measure(
    name: str, port: int, resident_bytes: Callable[[], int], picture: bytes, seconds: float, attackers: int = 2
) -> Outcome:
    """Attack for so many seconds, and count and time what others have meanwhile."""
    before, stop, attacks, failed = resident_bytes(), threading.Event(), [0], [0]
    health: list[float] = []
    honest: list[float] = []

    def attack() -> None:
        while not stop.is_set():
            ATTACKS[name](port)
            attacks[0] += 1

    def ask_health() -> None:
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)) as connection:
                    connection.request("GET", "/v2/health/live")
                    answer = connection.getresponse()
                    answer.read()
                health.append(time.perf_counter() - begun)
                failed[0] += answer.status != 200
            except (OSError, http.client.HTTPException):
                failed[0] += 1
            time.sleep(0.02)

    def click() -> None:
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                with Client(f"http://127.0.0.1:{port}", timeout=_PATIENCE) as client:
                    client.segment(client.embed(picture), [{"points": [[5, 5]]}])
                honest.append(time.perf_counter() - begun)
            except (OSError, RuntimeError):
                failed[0] += 1
            time.sleep(0.1)

    threads = [threading.Thread(target=work) for work in (*[attack] * attackers, ask_health, click)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    time.sleep(_IDLE_SECONDS)
    growth = (resident_bytes() - before) / 1e6
    return Outcome(name, attacks[0], health, honest, failed[0], growth)


TITLES = (
    f"{'under two attackers':<28}{'attacks':>8}{'live p50 ms':>12}{'live p99 ms':>12}"
    f"{'clicks':>9}{'slowest s':>12}{'failed':>8}{'MB more':>10}"
)
