"""The service under more than it can answer: how fast it says no, and how full its batches are."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from models import random_image

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import SECONDS, Server, file_of, multipart

pytestmark = [pytest.mark.slow, pytest.mark.soak]
SMALL = ("--image-size", "256", "--device", "cpu")
BODY, KIND = multipart(file_of(random_image(50, 60)), {"prompts": [{"points": [[5, 5]]}]})


def press(server: Server, clients: int, until: Callable[[], bool]) -> dict[int, list[float]]:
    """Clients that ask again when they are answered, and a little later when they are refused: seconds by status."""
    seconds: dict[int, list[float]] = {}

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        while not until():
            start = time.perf_counter()
            connection.request("POST", "/v1/segment", BODY, {"Content-Type": KIND})
            answer = connection.getresponse()
            answer.read()
            seconds.setdefault(answer.status, []).append(time.perf_counter() - start)
            if answer.status != 200:
                time.sleep(0.05)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def counted(server: Server, name: str) -> float:
    found = re.search(rf"^sam_engine_{name}_total (\S+)$", server.get("/metrics")[1].decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_full_queue_says_no_at_once() -> None:
    with Server(*SMALL, "--max-queue", "4") as server:
        end = time.monotonic() + 10
        seconds = press(server, 12, lambda: time.monotonic() > end)
        assert server.stop() == 0
    assert set(seconds) == {200, 503}
    p50, p99 = np.percentile(seconds[503], [50, 99])
    print(f"\n{len(seconds[503])} rejections: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms")
    assert len(seconds[503]) > 200
    assert p99 < 0.05


def test_batches_are_full_under_saturation() -> None:
    with Server(*SMALL, "--max-batch", "8") as server:
        prompts, batches = (counted(server, name) for name in ("prompts", "prompt_batches"))
        end = time.monotonic() + 10
        seconds = press(server, 32, lambda: time.monotonic() > end)
        prompts, batches = counted(server, "prompts") - prompts, counted(server, "prompt_batches") - batches
        assert server.stop() == 0
    assert prompts == len(seconds[200])
    print(f"\n{prompts:.0f} prompts in {batches:.0f} batches of 8: {prompts / batches / 8:.1%} full")
    assert prompts / batches >= 0.9 * 8
