"""``python -m benchmarks service``: the HTTP service under load, beside the engine without HTTP.

Closed loop: so many clients, each asking again as soon as it is answered. Open loop: requests at a fixed rate, whoever
is answered or not, their latency counted from when they were due.

Every request is a click on an image of 640 x 480 that is embedded already; it is answered with three masks and their
logits, which the service keeps as later mask inputs. The engine's clients are threads of this process and take its
answers as they are, uncompressed RLEs. The service is a process of its own, started by ``python -m sam serve``; that it
compresses the RLEs, measures areas and boxes and writes JSON is its cost. Both may use the same cores and as many
threads of OpenMP. The service's load comes from threads of this process over sockets, on the same cores as well, so
what that takes (a few tenths of a millisecond a request) counts against the service.
"""

from __future__ import annotations

import io
import json
import os
import queue
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sam
from sam import Prompt
from sam.engine import Engine

from .provenance import describe, provenance
from .service_attacks import ATTACKS, TITLES, measure

_SIZE, _LARGE = (480, 640), (6120, 8160)
_CLICK = (320.0, 240.0)
_START_SECONDS = 120
_PATIENCE = 600


@dataclass(frozen=True)
class Load:
    """The result of one load; latencies in milliseconds."""

    name: str
    requests: int
    failed: int
    per_second: float
    p50: float
    p95: float
    p99: float


def run(seconds: float, rounds: int, clients: int, checkpoint: str | None, json_file: Path | None) -> int:
    """Measure and print; ``seconds`` for each load."""
    image, large = _image(_SIZE), _image(_LARGE)
    model = sam.load_model(checkpoint)
    rows, shares = [], []
    with Engine(model, deadline=_PATIENCE) as engine, _Server(checkpoint) as server:
        embedding = engine.embed(image).result()
        request = [Prompt([_CLICK], [1])]
        ask_engine = lambda: engine.segment(embedding, request, keep_logits=True).result()  # noqa: E731
        for turn in range(1, rounds + 1):  # in turn, so that a drifting machine drifts for both
            both = [
                _closed(f"{name}, {clients} clients, closed loop, round {turn}", make, seconds, clients)
                for name, make in (("engine", lambda: ask_engine), ("service", lambda: server.click(image)))
            ]
            rows += both
            shares.append(both[1].per_second / both[0].per_second)
        capacity = statistics.median(row.per_second for row in rows[1::2])
        for part in (0.5, 0.8):
            name = f"service, open loop at {part:.0%} of its throughput"
            rows.append(_open(name, lambda: server.click(image), seconds, part * capacity))
        rows.append(_closed("service, one client", lambda: server.click(image), seconds, 1))
        for name, on, prompts in (("1,024 prompts", image, 1024), ("8 prompts on 50 megapixels", large, 8)):
            huge = server.click(on, prompts)
            rows.append(_beside(f"service, one client beside {name}", huge, lambda: server.click(image), seconds))
        prompts, batches = server.counted("prompts"), server.counted("prompt_batches")
    with _Server(checkpoint, "--max-queue", "4") as full:
        rows.append(_refusals("service, refusals of a full queue, 12 clients for 4 places", full, image, seconds))
    print(describe(provenance()))
    print(f"\n{'':<56}{'requests':>9}{'failed':>8}{'per s':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}")
    for row in rows:
        print(
            f"{row.name:<56}{row.requests:>9}{row.failed:>8}{row.per_second:>9.1f}"
            f"{row.p50:>9.1f}{row.p95:>9.1f}{row.p99:>9.1f}"
        )
    each = ", ".join(f"{share:.0%}" for share in shares)
    print(f"\nthe service's batches held {prompts / batches:.1f} prompts on average")
    print(f"of what the engine answers without HTTP, the service answers {statistics.median(shares):.0%} ({each})")
    if json_file is not None:
        document = {"provenance": provenance(), "shares": shares, "loads": [vars(row) for row in rows]}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def run_attacks(seconds: float, checkpoint: str | None) -> int:
    """Print what others have of the service under each attack, each against a service of its own."""
    picture = io.BytesIO()
    Image.fromarray(_image((48, 64))).save(picture, "PNG")
    print(describe(provenance()))
    print(f"\n{TITLES}")
    for name in ATTACKS:
        with _Server(checkpoint) as server:
            print(measure(name, server.port, server.resident_bytes, picture.getvalue(), seconds).row(), flush=True)
    return 0


class NotStartedError(RuntimeError):
    """The service did not start; the text is its own."""


class _Server:
    """The service in a process of its own, with as many threads of torch as this one."""

    def __init__(self, checkpoint: str | None, *options: str) -> None:
        arguments = [*options, "--checkpoint", checkpoint] if checkpoint else options
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sam", "serve", "--port", "0", "--deadline", str(_PATIENCE), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )

    def __enter__(self) -> _Server:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if not line.startswith("{"):  # no record of its log: why it did not start
                raise NotStartedError((line + self._process.stderr.read()).strip())
            record = json.loads(line)
            if record["event"] == "listening":
                self.port = int(record["url"].rsplit(":", 1)[1])
            if record["event"] == "ready":
                break
        else:
            raise NotStartedError(f"the service ended with status {self._process.wait()} before it was ready")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(_START_SECONDS)

    def counted(self, name: str) -> float:
        """Return one of the engine's counters."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            match = re.search(rf"^sam_engine_{name}_total (\S+)$", answer.read().decode(), re.MULTILINE)
        assert match is not None
        return float(match[1])

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def click(self, image: np.ndarray, prompts: int = 1) -> Callable[[], None]:
        """Return a client with a connection of its own, that embedded the image."""
        client = _Client(self.port)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        upload = client.question(
            "/v1/embed", head + file.getvalue() + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
        )
        embedding = json.loads(client.ask(upload))["embedding"]
        document = {"embedding": embedding, "prompts": [{"points": [_CLICK]}] * prompts}
        question = client.question("/v1/segment", json.dumps(document).encode(), "application/json")

        def ask() -> None:
            client.ask(question)

        return ask


class _RefusedError(RuntimeError):
    """The queue had no place for the request."""


class _Client:
    """A connection that sends what was written beforehand; it reads an answer to its end without parsing it."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)

    @staticmethod
    def question(path: str, body: bytes, kind: str) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def ask(self, question: bytes) -> bytes:
        """Return the body of the answer; _RefusedError if its status is 503, RuntimeError if it is not 200."""
        self._socket.sendall(question)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._receive()
        head, body = answer.split(b"\r\n\r\n", 1)
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if length is None:
            raise RuntimeError(f"answered {head[:80]!r}")
        pieces, missing = [body], int(length[1]) - len(body)
        while missing > 0:
            pieces.append(self._receive())
            missing -= len(pieces[-1])
        if not head.startswith(b"HTTP/1.1 200 "):
            raise (_RefusedError if head.startswith(b"HTTP/1.1 503 ") else RuntimeError)(f"answered {head[:80]!r}")
        return b"".join(pieces)

    def _receive(self) -> bytes:
        piece = self._socket.recv(2**18)
        if not piece:
            raise ConnectionResetError("the service closed the connection")
        return piece


def _closed(name: str, make: Callable[[], Callable[[], Any]], seconds: float, clients: int) -> Load:
    asks = [make() for _ in range(clients)]
    latencies, failures = [], []
    start = time.perf_counter()

    def client(ask: Callable[[], Any]) -> None:
        while (begun := time.perf_counter()) < start + seconds:
            try:
                ask()
                latencies.append(time.perf_counter() - begun)
            except (OSError, RuntimeError) as failure:
                failures.append(failure)

    _in_threads([lambda ask=ask: client(ask) for ask in asks])
    return _load(name, latencies, len(failures), time.perf_counter() - start)


def _open(name: str, make: Callable[[], Callable[[], Any]], seconds: float, rate: float) -> Load:
    due: queue.Queue[float | None] = queue.Queue()
    latencies, failures = [], []
    clients = 64
    asks = [make() for _ in range(clients)]

    def client(ask: Callable[[], Any]) -> None:
        while (at := due.get()) is not None:
            try:
                ask()
                latencies.append(time.perf_counter() - at)
            except (OSError, RuntimeError) as failure:
                failures.append(failure)

    start = time.perf_counter()

    def clock() -> None:
        for index in range(int(seconds * rate)):
            at = start + index / rate
            time.sleep(max(0.0, at - time.perf_counter()))
            due.put(at)
        for _ in range(clients):
            due.put(None)

    _in_threads([clock, *(lambda ask=ask: client(ask) for ask in asks)])
    return _load(name, latencies, len(failures), time.perf_counter() - start)


def _beside(name: str, huge: Callable[[], Any], make: Callable[[], Callable[[], Any]], seconds: float) -> Load:
    """Click one after another while huge requests are under way all the time."""
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            huge()

    background = threading.Thread(target=keep_asking)
    background.start()
    time.sleep(0.5)
    row = _closed(name, make, seconds, 1)
    stop.set()
    background.join()
    return row


def _refusals(name: str, server: _Server, image: np.ndarray, seconds: float) -> Load:
    """Time the refusals of those who do not fit; they ask again a little later."""
    asks = [server.click(image) for _ in range(12)]
    latencies, failures = [], []
    start = time.perf_counter()

    def client(ask: Callable[[], Any]) -> None:
        while (begun := time.perf_counter()) < start + seconds:
            try:
                ask()
            except _RefusedError:
                latencies.append(time.perf_counter() - begun)
                time.sleep(0.05)
            except (OSError, RuntimeError) as failure:
                failures.append(failure)

    _in_threads([lambda ask=ask: client(ask) for ask in asks])
    return _load(name, latencies, len(failures), time.perf_counter() - start)


def _in_threads(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _load(name: str, latencies: list[float], failed: int, seconds: float) -> Load:
    cuts = statistics.quantiles([1000 * latency for latency in latencies], n=100, method="inclusive")
    return Load(name, len(latencies), failed, len(latencies) / seconds, cuts[49], cuts[94], cuts[98])


def _image(size: tuple[int, int]) -> np.ndarray:
    """Draw a disc on a gradient: masks of a usual complexity."""
    height, width = size
    y, x = np.ogrid[:height, :width]
    disc = (x - _CLICK[0]) ** 2 + (y - _CLICK[1]) ** 2 < 90**2
    grey = np.where(disc, 220, x * 100 // width + y * 60 // height).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
