"""The service under more than it can answer: it says no, and goes on."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter

import pytest
from models import random_image

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import Server, file_of, multipart
from waiting import SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.soak]
REJECTIONS = 200


def test_a_full_queue_says_no_and_answers_whom_it_let_in() -> None:
    """Three times as many clients as fit; how long either takes is told by ``python -m benchmarks service``."""
    body, kind = multipart(file_of(random_image(50, 60)), {"prompts": [{"points": [[5, 5]]}]})
    statuses: Counter[int] = Counter()
    with Server("--image-size", "256", "--device", "cpu", "--max-queue", "4") as server:

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
            while statuses[503] < REJECTIONS:
                connection.request("POST", "/v1/segment", body, {"Content-Type": kind})
                answer = connection.getresponse()
                answer.read()
                statuses[answer.status] += 1
                if answer.status != 200:
                    time.sleep(0.05)
            connection.close()

        threads = [threading.Thread(target=client) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert server.stop() == 0
        logged = Counter(record["status"] for record in server.log if record.get("route") == "/v1/segment")
    assert set(statuses) == {200, 503}
    assert statuses == logged
