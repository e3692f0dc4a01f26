"""Ten thousand hostile requests and their memory: no crash, no 5xx, no growth."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from models import random_image
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import Server, file_of, multipart
from waiting import SECONDS

REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "10000"))
CORPUS, GENERATED = REQUESTS * 9 // 10, REQUESTS // 10  # schemathesis takes longer to make a case than to ask it
GROWTH = 100 * 2**20
PNG, JPEG, WEBP = (file_of(random_image(40, 50), kind) for kind in ("PNG", "JPEG", "WEBP"))
pytestmark = [pytest.mark.slow, pytest.mark.soak]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # A request may be valid and take long on a busy machine; how long is not what is tested here.
    with Server("--image-size", "64", "--device", "cpu", "--max-batch", "64", "--deadline", "300") as running:
        yield running
        assert running.stop() == 0


def _bomb(rng: random.Random) -> bytes:
    header = b"IHDR" + rng.randrange(2**31).to_bytes(4, "big") + rng.randrange(2**31).to_bytes(4, "big")
    header += bytes([rng.choice([1, 2, 4, 8, 16]), rng.choice([0, 2, 3, 4, 6]), 0, 0, rng.randrange(2)])
    return PNG[:8] + b"\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


def _mangled(rng: random.Random) -> bytes:
    data = bytearray(rng.choice([PNG, JPEG, WEBP]))
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _truncated(rng: random.Random) -> bytes:
    data = rng.choice([PNG, JPEG, WEBP])
    return data[: rng.randrange(len(data))]


def _other_images(rng: random.Random) -> bytes:
    size = (rng.randrange(1, 80), rng.randrange(1, 3000))
    mode = rng.choice(["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
    kind = "PNG" if mode in ("1", "P", "LA", "I;16") else rng.choice(["PNG", "GIF", "TIFF", "BMP", "WEBP"])
    image = Image.new(mode, size) if mode != "I;16" else Image.fromarray(np.zeros(size[::-1], np.uint16))
    return file_of(image, kind)


_SCALARS: list[Any] = [
    None, True, -1, 0, 1, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\0", "../../etc/passwd", {}, [],
    "http://127.0.0.1/", "0" * 32,
]  # fmt: skip


def _nonsense(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 4 or kind < 0.4:
        return rng.choice(_SCALARS)
    if kind < 0.7:
        return [_nonsense(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ["points", "labels", "box", "mask_input", "result", "prompt", "mask", "prompts", "x"]
    return {rng.choice(names): _nonsense(rng, depth + 1) for _ in range(rng.randrange(4))}


def _multipart_case(rng: random.Random) -> tuple[bytes, str]:
    make: Callable[[random.Random], bytes] = rng.choice([_bomb, _mangled, _truncated, _other_images])
    image = make(rng) if rng.random() < 0.7 else PNG
    fields: dict[str, Any] = {"prompts": rng.choice([[{"points": [[1, 1]]}], [{"box": [0, 0, 9, 9]}]])}
    if rng.random() < 0.5:
        name = rng.choice(["prompts", "output", "multimask", "embedding", "points_per_side", "url", "path"])
        fields[name] = _nonsense(rng)
    return multipart(image, fields)


def _json_case(rng: random.Random) -> tuple[bytes, str]:
    text = json.dumps({"embedding": rng.choice(["0" * 32, _nonsense(rng)]), "prompts": _nonsense(rng)})
    if rng.random() < 0.3:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["", "[", "{", '"', "\\u0000", "NaN", "1e999", "\x7f"]) + text[place:]
    return text.encode(), "application/json"


def _raw_case(rng: random.Random) -> tuple[bytes, str]:
    form = "multipart/form-data"
    kind = rng.choice(
        [
            form,
            f"{form}; boundary=b",
            f'{form}; boundary="',
            f"{form}; boundary=b; charset=utf-99",
            "application/json",
            "",
        ]
    )
    body = multipart(PNG, {"prompts": [{"points": [[1, 1]]}]})[0]
    return rng.choice([body[: rng.randrange(len(body))], body.replace(b"\r\n", b"\n"), rng.randbytes(300), b""]), kind


def _ask(server: Server, path: str, body: bytes, kind: str, chunked: bool) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    try:
        pieces = iter([body[: len(body) // 2] or b" ", body[len(body) // 2 :] or b" "]) if chunked else body
        connection.request("POST", path, pieces, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status >= 400:
            assert set(json.loads(text)) == {"error", "request_id"}
            assert b"Traceback" not in text
        return answer.status
    finally:
        connection.close()


def test_corpus(server: Server) -> None:
    rng = random.Random(0)
    statuses: Counter[int] = Counter()
    before = 0
    for case in range(CORPUS):
        body, kind = rng.choice([_multipart_case, _multipart_case, _json_case, _raw_case])(rng)
        path = rng.choice(["/v1/segment", "/v1/segment", "/v1/embed"])
        statuses[_ask(server, path, body, kind, chunked=rng.random() < 0.2)] += 1
        if case == CORPUS // 10:
            before = server.resident_bytes()
    growth = server.resident_bytes() - before
    print(f"\n{CORPUS} cases: {dict(statuses)}; resident memory grew by {growth / 2**20:.1f} MiB")
    assert not [status for status in statuses if status >= 500]
    assert statuses[200] > 0
    assert server.get("/v2/health/ready")[0] == 200
    assert growth <= GROWTH


def test_streams_over_the_limit(server: Server) -> None:
    """Pieces without an announced length, over 64 MiB: refused while they come, without holding them."""
    before = server.resident_bytes()
    for _ in range(10):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        pieces = iter([multipart(b"", {})[0][:-10], *(bytes(2**20) for _ in range(80))])
        try:
            connection.request("POST", "/v1/embed", pieces, {"Content-Type": "multipart/form-data; boundary=b"})
            assert connection.getresponse().status in (400, 413)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up on what was still coming
        finally:
            connection.close()
    assert server.get("/v2/health/ready")[0] == 200
    assert server.resident_bytes() - before <= GROWTH


def test_schemathesis(server: Server) -> None:
    """Requests made from the OpenAPI document, right ones and wrong ones, on every route."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    modes = list(schemathesis.GenerationMode)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 7
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    statuses: Counter[str] = Counter()
    requests: Counter[str] = Counter()

    def ask_often(operation: Any, mode: Any, times: int) -> None:
        @settings(
            max_examples=times,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def ask(data: st.DataObject) -> None:
            response = data.draw(operation.as_strategy(generation_mode=mode)).call(timeout=300)
            statuses[f"{operation.path} {response.status_code}"] += 1
            requests[operation.path] += 1
            assert response.status_code < 500, (operation.path, response.text, server.tracebacks())

        with contextlib.suppress(Unsatisfiable, schemathesis.errors.SchemathesisError):  # nothing can be wrong there
            ask()

    for operation in operations:
        for mode in modes:
            ask_often(operation, mode, max(1, GENERATED // (len(posts) * len(modes))) if operation in posts else 50)
    print(f"\n{sum(statuses.values())} cases: {dict(statuses)}")
    assert set(requests) == {operation.path for operation in operations}
    assert sum(requests[operation.path] for operation in posts) >= 0.7 * GENERATED
    assert server.get("/v2/health/ready")[0] == 200


def test_memory_over_ten_thousand_requests(server: Server) -> None:
    """Good requests, new images and old ones: what is kept keeps its budgets."""
    files = [file_of(random_image(60, 70, seed)) for seed in range(200)]
    prompts = {"prompts": [{"points": [[5, 5]]}]}
    before = 0
    for index in range(REQUESTS):
        if index == REQUESTS // 10:
            before = server.resident_bytes()
        body, kind = multipart(files[index % len(files)], prompts)
        assert _ask(server, "/v1/segment", body, kind, chunked=False) == 200
    growth = server.resident_bytes() - before
    print(f"\n{REQUESTS} requests: resident memory grew by {growth / 2**20:.1f} MiB")
    assert growth <= GROWTH
